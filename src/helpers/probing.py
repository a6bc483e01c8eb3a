"""Linear probes on features, controls that see no features, and scores with intervals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from helpers.files import DataError
from helpers.slides import spot_table
from helpers.splits import Fold, Splits, blocks, units

if TYPE_CHECKING:
    from helpers.slides import Spots


logger = logging.getLogger(__name__)

MEASURES = ("macro_f1", "balanced_accuracy")
"""Means over the classes that occur in the truth: of F1, and of the share that is found."""

PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
"""What `logistic` chooses from: ``alpha / 2 * |w|^2`` is added to the mean loss of a spot."""

TOLERANCE = 1e-3
"""Largest slope of the mean loss at which a fit ends: same scores, in two thirds of the time."""


# --------------------------------------------------------------------------- predictors


@dataclass(frozen=True)
class TrainingData:
    """What a predictor may learn from: the labelled spots of a training part.

    Attributes
    ----------
    x
        Features ``(n, d)``.
    y
        Labels ``(n,)``.
    spots
        The table of these spots: slide, donor, coordinates.
    within
        Splits them further, as the fold was split; see `helpers.splits.Splits`.
    """

    x: np.ndarray
    y: np.ndarray
    spots: pd.DataFrame
    within: Callable[[pd.DataFrame], Splits]


@dataclass(frozen=True)
class Prediction:
    """What a predictor returns for ``n`` spots.

    Attributes
    ----------
    classes
        The labels it knows, sorted ``(k,)``.
    probability
        Of each class, ``(n, k)``. The largest one decides; the first of equals.
    setting
        What was chosen, such as a penalty; NaN where there is no choice.
    """

    classes: np.ndarray
    probability: np.ndarray
    setting: float = np.nan


Predictor = Callable[[TrainingData, np.ndarray, pd.DataFrame], Prediction]
"""Takes the training data, the features of the test part and its table of spots, unlabelled."""
Features = np.ndarray | pd.DataFrame | Callable[[Fold], np.ndarray]


def logistic(
    known: TrainingData, x: np.ndarray, spots: pd.DataFrame, *, alphas: Sequence[float] = PENALTIES
) -> Prediction:
    """Fit a logistic regression on standardised features, with balanced classes.

    Scaler, weights and penalty come from training alone. To choose the penalty, training is split
    again as the fold was (`Splits.within`); the one with the best macro-F1 over all its spots is
    taken, the strongest of equals. Where training is too small to be split, the middle one is
    taken, with a line in the log.

    Parameters
    ----------
    known, x, spots
        As for every `Predictor`.
    alphas
        Penalties to choose from; a single one is used as it is.
    """
    alpha = alphas[0] if len(alphas) == 1 else _best_penalty(known, alphas)
    path = logistic_path(known.x, known.y, [a for a in alphas if a >= alpha])
    model = path[alpha]
    return Prediction(model.classes_, model.predict_proba(x), alpha)


def _best_penalty(known: TrainingData, alphas: Sequence[float]) -> float:
    try:
        inner = list(known.within(known.spots).split(known.x))
    except DataError:
        if "x_um" not in known.spots:  # the scale is missing, which the reader can fix
            raise
        inner = []  # a piece of tissue too small to be cut
    truth, predicted = [], {alpha: [] for alpha in sorted(alphas, reverse=True)}
    for train, test in inner:
        if len(set(known.y[train])) > 1:
            truth.append(known.y[test])
            for alpha, model in logistic_path(known.x[train], known.y[train], alphas).items():
                predicted[alpha].append(model.predict(known.x[test]))
    if not truth:
        middle = sorted(alphas)[len(alphas) // 2]
        logger.warning(
            "training is too small to be split to choose a penalty: the middle one, %g, is used",
            middle,
        )
        return middle
    truth = np.concatenate(truth)
    scores = {
        alpha: measure(confusion(truth, np.concatenate(parts)))["macro_f1"]
        for alpha, parts in predicted.items()
    }
    return max(scores, key=scores.get)


def logistic_path(
    x: np.ndarray, y: np.ndarray, alphas: Sequence[float], tol: float = TOLERANCE
) -> dict[float, Pipeline]:
    """Return one multinomial model per penalty, the strongest first.

    Each fit starts from the weights of the one before, which saves most of the time (Friedman et
    al. 2010, doi:10.18637/jss.v033.i01).

    Parameters
    ----------
    x, y
        Features ``(n, d)``, standardised here, and labels ``(n,)``.
    alphas
        Penalties; scikit-learn's `C` is ``1 / (n * alpha)``.
    tol
        Largest slope at which a fit ends. 0.006 halves the time of a sweep over large data, with
        about the same scores (``results/evaluate.json``), though weights are still moving a little.
    """
    scaler = StandardScaler().fit(x)
    scaled = scaler.transform(x)
    model = LogisticRegression(class_weight="balanced", warm_start=True, tol=tol, max_iter=1000)
    path = {}
    for alpha in sorted(alphas, reverse=True):
        model.set_params(C=1 / (alpha * len(x))).fit(scaled, y)
        path[alpha] = make_pipeline(scaler, deepcopy(model))
    return path


def majority(known: TrainingData, x: np.ndarray, spots: pd.DataFrame) -> Prediction:
    """Predict the most frequent class of training, with the shares of all as probabilities."""
    classes, count = np.unique(known.y, return_counts=True)
    return Prediction(classes, np.tile(count / count.sum(), (len(spots), 1)))


def spatial_neighbours(
    known: TrainingData, x: np.ndarray, spots: pd.DataFrame, *, k: int = 5
) -> Prediction:
    """Let the `k` nearest labelled training spots of the same slide vote, whatever the features.

    On a slide without training spots the answer is that of `majority`.
    """
    rest = majority(known, x, spots)
    votes, slide_of = rest.probability.copy(), known.spots["slide"].to_numpy()
    voters = known.spots[["x_px", "y_px"]].to_numpy(float)
    asking = spots[["x_px", "y_px"]].to_numpy(float)
    code = np.searchsorted(rest.classes, known.y)
    for slide, asked in spots.groupby("slide").indices.items():
        rows = np.flatnonzero(slide_of == slide)
        if len(rows):
            nearest = range(1, min(k, len(rows)) + 1)
            found = cKDTree(voters[rows]).query(asking[asked], k=nearest)[1]
            votes[asked] = np.eye(len(rest.classes))[code[rows][found]].mean(axis=1)
    return Prediction(rest.classes, votes)


def _estimator(
    estimator: BaseEstimator, known: TrainingData, x: np.ndarray, spots: pd.DataFrame
) -> Prediction:
    """Use a classifier of scikit-learn as a predictor; without probabilities it is always sure."""
    model = clone(estimator).fit(known.x, known.y)
    if hasattr(model, "predict_proba"):
        return Prediction(model.classes_, model.predict_proba(x))
    return Prediction(model.classes_, (model.predict(x)[:, None] == model.classes_).astype(float))


def coordinates(spots: Spots, degree: int = 1) -> np.ndarray:
    """Return where each spot lies on its slide, as features without image and genes.

    Parameters
    ----------
    spots
        What `helpers.slides.spot_table` takes.
    degree
        Of the polynomial in x and y; a linear probe on degree 3 draws smooth maps.

    Returns
    -------
    float ``(n, 2)`` for degree 1: x and y from -1 to 1 across the spots of the slide.
    """
    table = spot_table(spots)
    xy = table[["x_px", "y_px"]].astype(float)
    low, high = (xy.groupby(table["slide"]).transform(end) for end in ("min", "max"))
    scaled = 2 * (xy - low) / (high - low).where(high > low, 1) - 1
    return PolynomialFeatures(degree, include_bias=False).fit_transform(scaled.to_numpy())


# --------------------------------------------------------------------------- predictions


def predict(
    features: Features, splits: Splits, predictor: Predictor | BaseEstimator | None = None
) -> pd.DataFrame:
    """Predict the label of every spot from a model that was fitted without it.

    A fold without labelled spots on both sides is skipped, with a line in the log. Where the
    training part of a fold holds one class, this class is predicted. A class that training lacks is
    never predicted, and its spots count as wrong.

    Parameters
    ----------
    features
        ``(n, d)`` in the row order of ``splits.spots``; or a function that returns them for a fold,
        for a tower that is fitted within each: it may use the labels and tiles of ``fold.train``.
        (The penalty is then chosen on features that have seen all of ``fold.train``.)
    splits
        From `helpers.splits`.
    predictor
        `logistic` when None; another function of this module; or any classifier of scikit-learn,
        of which each fold fits a clone.

    Returns
    -------
    DataFrame
        One row per prediction: `slide`, `spot`, `donor`, `group`, `study` where known, `block` (a
        piece of tissue, see `helpers.splits.blocks`), `fold`, `truth`, `predicted`, `confidence`
        (the probability of what is predicted) and `setting` (what the fold's predictor chose).

    Raises
    ------
    DataError
        When fewer than two classes are labelled; features are NaN or of other spots; or no fold has
        labels on both sides.
    """
    predictor = predictor or logistic
    if hasattr(predictor, "fit"):
        predictor = partial(_estimator, predictor)
    spots = splits.spots
    known = spots["label"].notna().to_numpy()
    there = sorted(spots["label"][known].astype(str).unique())
    if len(there) < 2:
        what = f"a probe needs at least two classes, and the labels are {there}"
        raise DataError(what, fix="add annotated slides")
    fixed = None if callable(features) else check_features(features, spots)
    facts, tables, skipped = _facts(spots), [], []
    for fold in splits.folds:
        train, test = (rows[known[rows]] for rows in (fold.train, fold.test))
        if not (len(train) and len(test)):
            skipped.append(fold.name)
            continue
        x = check_features(features(fold), spots) if fixed is None else fixed
        y = spots["label"].to_numpy()[train].astype(str)
        if len(set(y)) > 1:
            data = TrainingData(x[train], y, spots.iloc[train], splits.within)
            guess = predictor(data, x[test], spots.iloc[test].drop(columns="label"))
        else:
            logger.warning("fold %s: training holds one class, %r, predicted for all", fold.name,
                           str(y[0]))  # fmt: skip
            guess = Prediction(y[:1], np.ones((len(test), 1)))
        tables.append(
            facts.iloc[test].assign(
                fold=fold.name,
                truth=spots["label"].iloc[test].astype(str),
                predicted=guess.classes[guess.probability.argmax(axis=1)],
                confidence=guess.probability.max(axis=1),
                setting=guess.setting,
            )
        )
    if skipped:
        logger.warning("%d folds lack labels in training or test: %s", len(skipped), skipped)
    if not tables:
        what = f"every fold of {splits.name} lacks labels in training or test"
        raise DataError(what, fix="label a second donor, or use a less strict split")
    return pd.concat(tables, ignore_index=True)


def check_features(
    features: np.ndarray | pd.DataFrame, spots: pd.DataFrame | None = None
) -> np.ndarray:
    """Return features as a finite float array ``(n, d)``.

    Parameters
    ----------
    features
        Numbers; float32 stays float32, all others become float64.
    spots
        The spots they belong to, one per row; rows with names must have the names of the spots.

    Raises
    ------
    DataError
        Naming the first row that is NaN or infinite, or what does not match.
    """
    named = isinstance(features, pd.DataFrame) and spots is not None
    if named and not features.index.equals(spots.index):
        what = "the row names of the features differ from the spot names"
        raise DataError(what, fix="put them in order with features.loc[spots.index]")
    x = np.asarray(features)
    if x.ndim != 2 or x.dtype.kind not in "fiub" or len(x) != len(x if spots is None else spots):
        for_spots = "" if spots is None else f" for {len(spots)} spots"
        fix = "give numbers of shape (n, d), one row per spot, in the order of the spots"
        raise DataError(f"the features are {x.dtype} {x.shape}{for_spots}", fix=fix)
    bad = ~np.isfinite(x).all(axis=1)
    if bad.any():
        first, slide = bad.argmax(), None
        name = f"row {first}"
        if spots is not None:
            name, slide = f"spot {spots.index[first]}", str(spots["slide"].iloc[first])
        what = f"the features of {bad.sum()} of {len(x)} spots are NaN or infinite, first {name}"
        raise DataError(what, slide=slide, fix="leave these spots out, or check what made them")
    return x if x.dtype == np.float32 else x.astype(np.float64)


def _facts(spots: pd.DataFrame) -> pd.DataFrame:
    table = pd.DataFrame({"slide": spots["slide"], "spot": spots.index}, index=spots.index)
    for column in (c for c in ("donor", "group", "study") if c in spots):
        table[column] = units(spots, column)
    return table.assign(block=blocks(spots))


# --------------------------------------------------------------------------- scores


def confusion(
    truth: np.ndarray, predicted: np.ndarray, clusters: np.ndarray | None = None
) -> np.ndarray:
    """Count truth by prediction.

    Parameters
    ----------
    truth, predicted
        Labels ``(n,)``; classes are those of both, sorted.
    clusters
        Count apart for each value of these ``(n,)``.

    Returns
    -------
    float ``(classes, classes)``, or ``(clusters, classes, classes)``.
    """
    classes, code = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    names, group = np.unique(
        np.zeros(len(truth)) if clusters is None else clusters, return_inverse=True
    )
    counts = np.zeros((len(names), len(classes), len(classes)))
    np.add.at(counts, (group, code[: len(truth)], code[len(truth) :]), 1)
    return counts[0] if clusters is None else counts


def measure(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return `MEASURES` of confusion matrices ``(..., classes, classes)``.

    They equal scikit-learn's ``f1_score(truth, predicted, labels=numpy.unique(truth),
    average="macro")`` and ``balanced_accuracy_score(truth, predicted)``, for many matrices at once.
    """
    hits, true, said = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    there = true > 0
    f1 = np.divide(2 * hits, true + said, out=np.zeros(hits.shape), where=there)
    found = np.divide(hits, true, out=np.zeros(hits.shape), where=there)
    return {
        name: each.sum(-1) / there.sum(-1) for name, each in zip(MEASURES, (f1, found), strict=True)
    }


def score(
    predictions: pd.DataFrame,
    over: str = "block",
    *,
    each: str | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predictions, with a bootstrap interval over pieces of tissue or donors.

    Parameters
    ----------
    predictions
        From `predict`.
    over
        What is drawn: ``"block"``, for other tissue of these donors; ``"donor"``, for other donors
        (``"group"``, ``"slide"``, ``"study"`` too).
    each
        A column, such as ``"fold"`` or ``"donor"``, to score one by one; None: all together.
    n_boot, level, seed
        Resamples, coverage of the interval, and the seed they are drawn with.

    Returns
    -------
    DataFrame
        One row per measurement: `each` if given, `measure`, `value`, `low`, `high` (NaN with a
        single cluster), `n` (spots), `classes` (in the truth), `over`, `clusters`.
    """
    _check_predictions(predictions, over, *([each] if each else []))
    if each is not None:
        some = predictions.groupby(each, sort=False)
        tables = {name: score(p, over, n_boot=n_boot, level=level, seed=seed) for name, p in some}
        return pd.concat(tables, names=[each]).reset_index(level=0).reset_index(drop=True)
    counts = _counts(predictions, over)
    drawn = measure(_resampled(counts, n_boot, seed))
    return _rows(measure(counts.sum(0)), drawn, predictions, over, len(counts), level)


def difference(
    first: pd.DataFrame,
    second: pd.DataFrame,
    over: str = "block",
    *,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Score `first` minus `second` on the spots both predicted, with the interval of that.

    Both are drawn together, cluster by cluster, so what they have in common cancels.

    Parameters
    ----------
    first, second
        From `predict`, such as on random spots and on left-out donors.
    over, n_boot, level, seed
        As for `score`.

    Returns
    -------
    DataFrame
        As `score`, and `first` and `second`, the two scores themselves.

    Raises
    ------
    DataError
        When the two share no spot, or differ in the truth of one.
    """
    for table in (first, second):
        _check_predictions(table, over)
        if table.duplicated(["slide", "spot"]).any():
            raise DataError("duplicate spot id", fix="give the predictions of a single split")
    columns = ["slide", "spot", "truth", "predicted"]
    both = first.merge(second[columns], on=columns[:2], suffixes=("", "_second"))
    if both.empty:
        raise DataError("the two tables share no spot", fix="predict the same spots with both")
    if (both["truth"] != both["truth_second"]).any():
        what = "the two tables give different truths for the same spot"
        raise DataError(what, fix="predict the same labels with both")
    counts = [_counts(both, over, column) for column in ("predicted", "predicted_second")]
    one, two = (measure(c.sum(0)) for c in counts)
    drawn_one, drawn_two = (measure(_resampled(c, n_boot, seed)) for c in counts)
    gap = {name: one[name] - two[name] for name in MEASURES}
    drawn_gap = {name: drawn_one[name] - drawn_two[name] for name in MEASURES}
    rows = _rows(gap, drawn_gap, both, over, len(counts[0]), level)
    return rows.assign(first=[float(one[m]) for m in MEASURES],
                       second=[float(two[m]) for m in MEASURES])  # fmt: skip


def _check_predictions(predictions: pd.DataFrame, *columns: str) -> None:
    if lacking := [c for c in ("truth", "predicted", *columns) if c not in predictions]:
        what = f"the table of predictions lacks the columns {lacking}"
        raise DataError(what, fix="make it with probing.predict")
    if predictions.empty:
        raise DataError("the table of predictions is empty", fix="make it with probing.predict")


def _counts(table: pd.DataFrame, over: str, predicted: str = "predicted") -> np.ndarray:
    return confusion(*(table[c].astype(str).to_numpy() for c in ("truth", predicted, over)))


def _resampled(counts: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Draw whole clusters with replacement and add up their counts, once per resample."""
    n = len(counts)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_boot)
    return np.tensordot(draws.astype(float), counts, 1)


def _rows(
    value: dict, drawn: dict, table: pd.DataFrame, over: str, clusters: int, level: float
) -> pd.DataFrame:
    ends, rows = [(1 - level) / 2, (1 + level) / 2], []
    for name in MEASURES:
        low, high = np.quantile(drawn[name], ends) if clusters > 1 else (np.nan, np.nan)
        rows.append((name, float(value[name]), low, high))
    frame = pd.DataFrame(rows, columns=["measure", "value", "low", "high"])
    classes = table["truth"].nunique()
    return frame.assign(n=len(table), classes=classes, over=over, clusters=clusters)
