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
from scipy.special import expit, logit
from scipy.stats import t as student_t
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from helpers.files import DataError
from helpers.slides import spot_table
from helpers.splits import Fold, Splits, blocks, inside, units

if TYPE_CHECKING:
    from helpers.slides import Spots


logger = logging.getLogger(__name__)

MEASURES = ("macro_f1", "balanced_accuracy")
"""Means over the classes that occur in the truth: of F1, and of the share that is found."""

PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
"""What `logistic` chooses from: ``alpha / 2 * |w|^2`` is added to the mean loss of a spot."""

NEAR = 0.005
"""The strongest penalty is taken whose macro-F1 inside training is this close to the best."""

TOLERANCE = 6e-3
"""Largest slope of the mean loss at which a fit ends."""

FEWEST = 6
"""Clusters that an interval needs; with fewer, show the value of each."""


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
        The table of these spots: slide, donor, coordinates. `helpers.splits.inside` splits it.
    """

    x: np.ndarray
    y: np.ndarray
    spots: pd.DataFrame


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
    again by donor (`helpers.splits.inside`), whatever the outer split; of the penalties whose
    macro-F1 over all its spots is within `NEAR` of the best, the strongest is taken. Where training
    is too small to be split, the middle one is taken, with a line in the log.

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
        inner = list(inside(known.spots).split(known.x))
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
    best = max(scores.values())
    return max(alpha for alpha, value in scores.items() if value >= best - NEAR)


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
        Largest slope at which a fit ends. The default gives about the scores of a fit that goes
        on for twice as long (``results/evaluate.json``), though weights still move a little.
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
            data = TrainingData(x[train], y, spots.iloc[train])
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


def predict_at(
    features: Features, splits: Splits, alphas: Sequence[float] = PENALTIES
) -> dict[float, pd.DataFrame]:
    """Predict with every penalty, the same one in all folds, to show what a choice is worth.

    The fits of a fold are one path, as in `logistic`.

    Parameters
    ----------
    features, splits
        As for `predict`.
    alphas
        Penalties.

    Returns
    -------
    dict
        The table of `predict` by penalty.
    """
    paths = {}

    def fitted(alpha: float, known: TrainingData, x: np.ndarray, spots: pd.DataFrame) -> Prediction:
        rows = tuple(zip(known.spots["slide"], known.spots.index, strict=True))
        if rows not in paths:
            paths[rows] = logistic_path(known.x, known.y, alphas)
        model = paths[rows][alpha]
        return Prediction(model.classes_, model.predict_proba(x), alpha)

    return {alpha: predict(features, splits, partial(fitted, alpha)) for alpha in alphas}


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


def scale_by_slide(features: Features, spots: Spots) -> Features:
    """Bring every feature to mean 0 and variance 1 within each slide, without its labels.

    It removes what differs between slides as a whole: stain, scanner, and the share of each tissue.

    Parameters
    ----------
    features
        ``(n, d)``, one row per spot; or a function that returns them for a fold, as for `predict`.
    spots
        What `helpers.slides.spot_table` takes.

    Returns
    -------
    float ``(n, d)``, or a function of the fold; a feature that is constant on a slide is 0 there.
    """
    if callable(features):
        return lambda fold: scale_by_slide(features(fold), spots)
    table = spot_table(spots)
    scaled = check_features(features, table).copy()
    for rows in table.groupby("slide").indices.values():
        scaled[rows] = StandardScaler().fit_transform(scaled[rows])
    return scaled


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


def measure(counts: np.ndarray, counted: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return `MEASURES` of confusion matrices ``(..., classes, classes)``.

    They equal scikit-learn's ``f1_score(truth, predicted, labels=numpy.unique(truth),
    average="macro")`` and ``balanced_accuracy_score(truth, predicted)``, for many matrices at once.

    Parameters
    ----------
    counts
        From `confusion`.
    counted
        Which classes enter the mean, bool ``(classes,)``; None: those in the truth of each matrix.
    """
    hits, true, said = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    there = true > 0 if counted is None else np.broadcast_to(counted, true.shape)
    f1 = np.divide(2 * hits, true + said, out=np.zeros(hits.shape), where=there & (true + said > 0))
    found = np.divide(hits, true, out=np.zeros(hits.shape), where=there & (true > 0))
    return {
        name: each.sum(-1) / there.sum(-1) for name, each in zip(MEASURES, (f1, found), strict=True)
    }


def score(
    predictions: pd.DataFrame,
    over: str = "block",
    *,
    each: str | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Score predictions, with an interval that knows that spots come in pieces of tissue.

    The interval is a jackknife: each cluster is left out of the score once, and the spread of these
    scores, on the logit scale and with Student's t of clusters - 1 degrees of freedom, gives its
    width (Efron and Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 11). It covers
    what it says with 8 to 64 clusters, where percentiles of a bootstrap do not
    (``tests/test_probing.py`` simulates it). There is no interval with fewer than `FEWEST`
    clusters, or where a class lies in a single one: `note` says so.

    Parameters
    ----------
    predictions
        From `predict`.
    over
        The clusters: ``"block"``, for other tissue of these donors; ``"donor"``, for other donors
        (``"group"``, ``"slide"``, ``"study"`` too).
    each
        A column, such as ``"fold"`` or ``"donor"``, to score one by one; None: all together.
    level
        Coverage of the interval.

    Returns
    -------
    DataFrame
        One row per measurement: `each` if given, `measure`, `value`, `low`, `high` (NaN where there
        is no interval), `n` (spots), `classes` (in the truth), `over`, `clusters`, `note`.
    """
    _check_predictions(predictions, over, *([each] if each else []))
    if each is not None:
        tables = {
            name: score(part, over, level=level)
            for name, part in predictions.groupby(each, sort=False)
        }
        return pd.concat(tables, names=[each]).reset_index(level=0).reset_index(drop=True)
    counts = _counts(predictions, over)
    return _rows(*_left_one_out(counts), counts, over, level, logit, expit)


Pair = tuple[pd.DataFrame, pd.DataFrame]


def difference(
    first: pd.DataFrame | Pair,
    second: pd.DataFrame | Pair,
    over: str = "block",
    *,
    level: float = 0.95,
) -> pd.DataFrame:
    """Score `first` minus `second` on the spots both predicted, with the interval of that.

    A cluster is left out of both at once, so what they have in common cancels. Two pairs give a
    difference of differences: of gains, or of gaps.

    Parameters
    ----------
    first, second
        From `predict`, such as on random spots and on left-out donors; or a pair of these each,
        of which the first minus the second is taken.
    over, level
        As for `score`.

    Returns
    -------
    DataFrame
        As `score`, and `first` and `second`, the two scores (or differences) themselves.

    Raises
    ------
    DataError
        When the tables share no spot, or differ in the truth of one.
    """
    pairs = isinstance(first, tuple)
    counts = _joint_counts([*first, *second] if pairs else [first, second], over)
    scores = [_left_one_out(each) for each in counts]
    one, two = (_minus(*scores[:2]), _minus(*scores[2:])) if pairs else scores
    rows = _rows(*_minus(one, two), counts[0], over, level)
    sides = {"first": one[0], "second": two[0]}
    return rows.assign(**{name: [float(side[m]) for m in MEASURES] for name, side in sides.items()})


def _check_predictions(predictions: pd.DataFrame, *columns: str) -> None:
    if lacking := [c for c in ("truth", "predicted", *columns) if c not in predictions]:
        what = f"the table of predictions lacks the columns {lacking}"
        raise DataError(what, fix="make it with probing.predict")
    if predictions.empty:
        raise DataError("the table of predictions is empty", fix="make it with probing.predict")


def _counts(table: pd.DataFrame, over: str, predicted: str = "predicted") -> np.ndarray:
    return confusion(*(table[c].astype(str).to_numpy() for c in ("truth", predicted, over)))


def _joint_counts(tables: Sequence[pd.DataFrame], over: str) -> list[np.ndarray]:
    """Count each table on the spots that all of them predicted, with the clusters of the first."""
    keys, joined = ["slide", "spot"], None
    for i, table in enumerate(tables):
        _check_predictions(table, over)
        if table.duplicated(keys).any():
            raise DataError("duplicate spot id", fix="give the predictions of a single split")
        new = table[[*keys, "truth", "predicted"]].rename(
            columns={"predicted": f"predicted {i}", "truth": f"truth {i}"}
        )
        joined = new.assign(**{over: table[over]}) if joined is None else joined.merge(new, on=keys)
    if joined.empty:
        raise DataError("the two tables share no spot", fix="predict the same spots with both")
    if any((joined["truth 0"] != joined[f"truth {i}"]).any() for i in range(1, len(tables))):
        what = "the two tables give different truths for the same spot"
        raise DataError(what, fix="predict the same labels with both")
    joined = joined.rename(columns={"truth 0": "truth"})
    return [_counts(joined, over, f"predicted {i}") for i in range(len(tables))]


def _left_one_out(counts: np.ndarray) -> tuple[dict, dict]:
    """Return `MEASURES` of all clusters together, and without each of them ``(clusters,)``."""
    whole = counts.sum(0)
    return measure(whole), measure(whole - counts, whole.sum(-1) > 0)


def _minus(one: tuple[dict, dict], two: tuple[dict, dict]) -> tuple[dict, dict]:
    """Subtract two results of `_left_one_out`, measure by measure."""
    return tuple({m: a[m] - b[m] for m in MEASURES} for a, b in zip(one, two, strict=True))


def _why_not(counts: np.ndarray, over: str) -> str:
    """Say why there can be no interval; an empty text when there can."""
    n = len(counts)
    if n < FEWEST:
        return f"{n} {over}{'s' if n > 1 else ''}: too few for an interval"
    held_by = (counts.sum(-1) > 0).sum(0)
    lonely = int((held_by == 1).sum())
    if lonely:
        one = "a class lies" if lonely == 1 else f"{lonely} classes each lie"
        return f"{one} in a single {over}: no interval"
    return ""


def _rows(
    value: dict, left: dict, counts: np.ndarray, over: str, level: float,
    scale: Callable = np.asarray, back: Callable = np.asarray,
) -> pd.DataFrame:  # fmt: skip
    """Make one row per measure, its interval on the given scale."""
    n, note, rows = len(counts), _why_not(counts, over), []
    for name in MEASURES:
        low, high = np.nan, np.nan
        with np.errstate(divide="ignore"):
            centre, without = scale(value[name]), scale(left[name])
        if not note and np.isfinite(centre) and np.isfinite(without).all():
            error = np.sqrt((n - 1) * np.var(without))
            reach = student_t.ppf((1 + level) / 2, n - 1) * error
            low, high = back(centre - reach), back(centre + reach)
        elif not note:
            note = "a score of 0 or 1 has no spread: no interval"
        rows.append((name, float(value[name]), float(low), float(high)))
    frame = pd.DataFrame(rows, columns=["measure", "value", "low", "high"])
    whole = counts.sum(0)
    classes = int((whole.sum(-1) > 0).sum())
    return frame.assign(n=int(whole.sum()), classes=classes, over=over, clusters=n, note=note)
