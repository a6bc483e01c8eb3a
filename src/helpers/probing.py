"""Linear probes on features, and their scores with intervals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from sklearn.base import ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from helpers.files import DataError
from helpers.slides import spot_table
from helpers.splits import Fold, Splits, blocks, units

if TYPE_CHECKING:
    from helpers.slides import Spots


logger = logging.getLogger(__name__)

MEASURES = ("macro_f1", "balanced_accuracy")
"""Mean over the classes that occur in the truth: of F1, and of the share that is found."""


def confusion(
    truth: np.ndarray, predicted: np.ndarray, clusters: np.ndarray | None = None
) -> np.ndarray:
    """Count truth by prediction.

    Parameters
    ----------
    truth, predicted
        Labels ``(n,)``; classes are those of both, sorted.
    clusters
        Counts are kept apart by these ``(n,)``.

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
    average="macro")`` and ``balanced_accuracy_score(truth, predicted)``.
    """
    hit, true, said = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    there = true > 0
    f1 = np.divide(2 * hit, true + said, out=np.zeros(hit.shape), where=there)
    found = np.divide(hit, true, out=np.zeros(hit.shape), where=there)
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
        From `helpers.probing.predict`.
    over
        What is drawn: ``"block"``, for other places on these donors; ``"donor"``, for other donors
        (``"group"``, ``"slide"``, ``"study"`` too).
    each
        A column, such as ``"fold"`` or ``"donor"``, to score apart; None: all together.
    n_boot, level, seed
        Resamples, coverage of the interval, and the seed they are drawn with.

    Returns
    -------
    DataFrame
        One row per measurement: `each` if given, `measure`, `value`, `low`, `high` (NaN with a
        single cluster), `n` (spots), `classes` (in the truth), `over`, `clusters`.
    """
    _check(predictions, over, each)
    if each is not None:
        some = predictions.groupby(each, sort=False)
        tables = {name: score(p, over, n_boot=n_boot, level=level, seed=seed) for name, p in some}
        return pd.concat(tables, names=[each]).reset_index(level=0).reset_index(drop=True)
    counts = _counts(predictions, over)
    draws = _draws(len(counts), n_boot, seed)
    value, drawn = measure(counts.sum(0)), measure(np.tensordot(draws, counts, 1))
    return _rows(value, drawn, predictions, over, len(counts), level)


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
        From `helpers.probing.predict`, such as of random spots and of left-out donors.
    over, n_boot, level, seed
        As for `score`.

    Returns
    -------
    DataFrame
        As `score`, and `first` and `second`, the two scores themselves.

    Raises
    ------
    DataError
        When the two share no spot, or name another truth for one.
    """
    for table in (first, second):
        _check(table, over, None)
        if table.duplicated(["slide", "spot"]).any():
            raise DataError("a spot is predicted twice", fix="give the predictions of one split")
    both = first.merge(second[["slide", "spot", "truth", "predicted"]], on=["slide", "spot"],
                       suffixes=("", "_second"))  # fmt: skip
    if both.empty:
        raise DataError("the two have no spot in common", fix="predict the same spots with both")
    if (both["truth"] != both["truth_second"]).any():
        raise DataError("the two name another truth for the same spot", fix="use the same labels")
    counts = [_counts(both, over, column) for column in ("predicted", "predicted_second")]
    draws = _draws(len(counts[0]), n_boot, seed)
    value = [measure(c.sum(0)) for c in counts]
    drawn = [measure(np.tensordot(draws, c, 1)) for c in counts]
    gap, drawn_gap = ({m: a[m] - b[m] for m in MEASURES} for a, b in (value, drawn))
    rows = _rows(gap, drawn_gap, both, over, len(counts[0]), level)
    for name, one in zip(("first", "second"), value, strict=True):
        rows[name] = [float(one[m]) for m in MEASURES]
    return rows


def calibration(predictions: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """Compare how sure predictions are with how often they are right, in bins of equal width.

    Returns
    -------
    DataFrame
        One row per bin that is not empty: `low`, `high`, `n`, `confidence` (mean), `accuracy`, and
        `gap`, accuracy minus confidence: below 0 where it is too sure.
    """
    sure = predictions["confidence"].to_numpy(float)
    if not (np.isfinite(sure) & (sure >= 0) & (sure <= 1 + 1e-6)).all():
        raise DataError("a confidence is no probability", fix="use a predictor that gives them")
    edges = np.linspace(0, 1, bins + 1)
    at = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    right = (predictions["truth"] == predictions["predicted"]).to_numpy(float)
    table = pd.DataFrame({"bin": at, "confidence": sure, "accuracy": right}).groupby("bin")
    means, n = table.mean(), table.size()
    return pd.DataFrame(
        {
            "low": edges[means.index],
            "high": edges[means.index + 1],
            "n": n.to_numpy(),
            **{c: means[c].to_numpy() for c in ("confidence", "accuracy")},
            "gap": (means["accuracy"] - means["confidence"]).to_numpy(),
        }
    )


def calibration_error(predictions: pd.DataFrame, bins: int = 10) -> float:
    """Return the expected calibration error: the mean size of the gap over spots.

    After Guo et al. 2017 (arXiv 1706.04599), with the bins of `calibration`. 0 is perfect.
    """
    table = calibration(predictions, bins)
    return float((table["gap"].abs() * table["n"]).sum() / table["n"].sum())


def _check(predictions: pd.DataFrame, *columns: str | None) -> None:
    wanted = ["truth", "predicted", *(c for c in columns if c)]
    if lacking := [c for c in wanted if c not in predictions]:
        raise DataError(f"the predictions have no column {lacking}", fix="make them with predict")
    if predictions.empty:
        raise DataError("there are no predictions")


def _counts(table: pd.DataFrame, over: str, predicted: str = "predicted") -> np.ndarray:
    return confusion(*(table[c].astype(str).to_numpy() for c in ("truth", predicted, over)))


def _draws(clusters: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each cluster is in each resample, ``(n_boot, clusters)``."""
    share = np.full(clusters, 1 / clusters)
    return np.random.default_rng(seed).multinomial(clusters, share, n_boot).astype(float)


def _rows(
    value: dict, drawn: dict, table: pd.DataFrame, over: str, clusters: int, level: float
) -> pd.DataFrame:
    ends = [(1 - level) / 2, (1 + level) / 2]
    rows = []
    for name in MEASURES:
        low, high = np.quantile(drawn[name], ends) if clusters > 1 else (np.nan, np.nan)
        rows.append((name, float(value[name]), low, high))
    facts = {"n": len(table), "classes": table["truth"].nunique(), "over": over}
    frame = pd.DataFrame(rows, columns=["measure", "value", "low", "high"])
    return frame.assign(**facts, clusters=clusters)


# --------------------------------------------------------------------------- what is fitted


ALPHAS = (1.0, 0.1, 0.01, 0.001, 0.0001)
"""Penalties of Chen et al. 2024: ``alpha / 2 * |w|^2`` is added to the mean loss of a spot."""
PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
"""What `logistic` chooses from: standardised features of another donor want more restraint."""

TOLERANCE = 1e-3
"""Largest slope of the mean loss at which a fit ends: scores stay, and a third of the time goes."""


@dataclass(frozen=True)
class TrainingData:
    """What a predictor may learn from: labelled spots of the training part.

    Attributes
    ----------
    x
        Features ``(n, d)``.
    y
        Labels ``(n,)``.
    spots
        Who and where they are.
    within
        Splits them further in the manner of the fold; see `Splits.within`.
    """

    x: np.ndarray
    y: np.ndarray
    spots: pd.DataFrame
    within: Callable[[pd.DataFrame], Splits]


@dataclass(frozen=True)
class Prediction:
    """What a predictor says.

    Attributes
    ----------
    classes
        The labels it knows, sorted ``(k,)``.
    probability
        Of each class, ``(n, k)``. The largest one decides; the first of equals.
    setting
        What it chose, such as a penalty; NaN where there is no choice.
    """

    classes: np.ndarray
    probability: np.ndarray
    setting: float = np.nan


def logistic(
    known: TrainingData, x: np.ndarray, spots: pd.DataFrame, *, alphas: Sequence[float] = PENALTIES
) -> Prediction:
    """Fit a logistic regression on standardised features, with balanced classes.

    Scaler and weights come from training. The penalty does too: training is split again as the fold
    was (`Splits.within`), and the penalty with the best macro-F1 over all its spots is taken; the
    strongest of equals. Where training is too small to be split, the middle one is, with a line in
    the log.

    Parameters
    ----------
    known, x, spots
        As every predictor takes them.
    alphas
        Penalties to choose from; one of them alone is not chosen but taken.
    """
    alpha = alphas[0] if len(alphas) == 1 else _choose(known, alphas)
    *_, (_, model) = logistic_path(known.x, known.y, [a for a in alphas if a >= alpha])
    return Prediction(model.classes_, model.predict_proba(x), alpha)


def _choose(known: TrainingData, alphas: Sequence[float]) -> float:
    truth, guessed = [], {alpha: [] for alpha in sorted(alphas, reverse=True)}
    for train, test in _inner(known):
        if len(set(known.y[train])) > 1:
            truth.append(known.y[test])
            for alpha, model in logistic_path(known.x[train], known.y[train], alphas):
                guessed[alpha].append(model.predict(known.x[test]))
    if not truth:
        middle = sorted(alphas)[len(alphas) // 2]
        logger.warning("training cannot be split to choose a penalty: it is %g, the middle", middle)
        return middle
    truth = np.concatenate(truth)
    return max(guessed, key=lambda alpha: _macro_f1(truth, np.concatenate(guessed[alpha])))


def _inner(known: TrainingData) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        return list(known.within(known.spots).split(known.x))
    except DataError:
        if "x_um" not in known.spots:  # the reader can mend that
            raise
        return []  # a piece of tissue too small to be cut


def _macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(measure(confusion(truth, predicted))["macro_f1"])


def logistic_path(
    x: np.ndarray, y: np.ndarray, alphas: Sequence[float], seed: int = 0, tol: float = TOLERANCE
) -> Iterator[tuple[float, ClassifierMixin]]:
    """Yield one multinomial model per penalty, the strongest first.

    Each starts from the weights of the one before (Friedman et al. 2010,
    doi:10.18637/jss.v033.i01), so use a model before you ask for the next. Nothing is drawn at
    random; `seed` is there to match `sgd_path`.

    Parameters
    ----------
    x, y
        Features ``(n, d)``, standardised here, and labels ``(n,)``.
    alphas
        Penalties; scikit-learn's `C` is ``1 / (n * alpha)``.
    tol
        Largest slope at which a fit ends. 0.006 is enough for a sweep over large data: half the
        time, about the same scores (``results/evaluate.json``); weights are still moving a little.
    """
    scaler = StandardScaler().fit(x)
    scaled = scaler.transform(x)
    model = LogisticRegression(class_weight="balanced", warm_start=True, tol=tol, max_iter=1000)
    for alpha in sorted(alphas, reverse=True):
        model.set_params(C=1 / (alpha * len(x))).fit(scaled, y)
        yield alpha, make_pipeline(scaler, model)


def sgd_path(
    x: np.ndarray, y: np.ndarray, alphas: Sequence[float], seed: int = 0
) -> Iterator[tuple[float, ClassifierMixin]]:
    """Yield one model per penalty as Chen et al. 2024 fit it: SGD, one class against the rest."""
    for alpha in sorted(alphas, reverse=True):
        model = SGDClassifier(
            loss="log_loss",
            penalty="l2",
            alpha=alpha,
            class_weight="balanced",
            max_iter=10_000,
            random_state=seed,
        )
        yield alpha, model.fit(x, y)


# --------------------------------------------------------------------------- predictions


Predictor = Callable[[TrainingData, np.ndarray, pd.DataFrame], Prediction]
Features = np.ndarray | pd.DataFrame | Callable[[Fold], np.ndarray]
Path = Callable[..., Iterator[tuple[float, ClassifierMixin]]]


def predict(
    features: Features, splits: Splits, predictor: Predictor | ClassifierMixin | None = None
) -> pd.DataFrame:
    """Predict the label of every spot from a model that was fitted without it.

    A fold without labelled spots on both sides, such as a donor with no labels, is passed over with
    a line in the log. Where the training part of a fold holds one class, that is predicted. A class
    that training lacks is never predicted, and its spots count as wrong. Features that are constant
    in training say nothing: the probe falls back on which class comes first.

    Parameters
    ----------
    features
        ``(n, d)`` in the row order of ``splits.spots``; or a function that returns them for a fold,
        for a tower that is fitted within each: it may use the labels and tiles of ``fold.train``.
        (The penalty is then chosen on features that have seen all of ``fold.train``.)
    splits
        From `helpers.splits`.
    predictor
        `logistic` when None; another function of this module; or a classifier of scikit-learn.

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
    _check_classes(spots["label"][known])
    fixed = None if callable(features) else check_rows(features, spots)
    place, tables, unlabelled = _place(spots), [], []
    for fold in splits.folds:
        train, test = (rows[known[rows]] for rows in (fold.train, fold.test))
        if not (len(train) and len(test)):
            unlabelled.append(fold.name)
            continue
        x = check_rows(features(fold), spots) if fixed is None else fixed
        y = spots["label"].to_numpy()[train].astype(str)
        some = TrainingData(x[train], y, spots.iloc[train], splits.within)
        guess = _ask(predictor, some, x[test], spots.iloc[test].drop(columns="label"), fold.name)
        tables.append(
            place.iloc[test].assign(
                fold=fold.name,
                truth=spots["label"].iloc[test].astype(str),
                predicted=guess.classes[guess.probability.argmax(axis=1)],
                confidence=guess.probability.max(axis=1),
                setting=guess.setting,
            )
        )
    if unlabelled:
        logger.warning("%d folds have no labels on both sides: %s", len(unlabelled), unlabelled)
    if not tables:
        fix = "label a second donor, or take a less strict split"
        raise DataError(f"no fold of {splits.name} has labels on both sides", fix=fix)
    return pd.concat(tables, ignore_index=True)


def check_rows(features: np.ndarray | pd.DataFrame, spots: pd.DataFrame) -> np.ndarray:
    """Return features as an array when they have one finite row per spot, named alike if named.

    Raises
    ------
    DataError
        Naming the first spot with NaN, or what does not fit.
    """
    if isinstance(features, pd.DataFrame) and not features.index.equals(spots.index):
        raise DataError(
            "the rows of the features are named otherwise than the spots",
            fix="bring them into the order of the spots with features.loc[spots.index]",
        )
    x = np.asarray(features)
    if x.ndim != 2 or len(x) != len(spots) or x.dtype.kind not in "fiub":
        what = f"features are {x.dtype} {x.shape} for {len(spots)} spots"
        raise DataError(what, fix="give numbers (n, d), one row per spot, in their order")
    if not np.isfinite(x).all():
        bad = ~np.isfinite(x).all(axis=1)
        raise DataError(
            f"the features of {bad.sum()} spots are NaN or infinite, the first is spot "
            f"{spots.index[bad.argmax()]}",
            slide=str(spots["slide"].iloc[bad.argmax()]),
            fix="leave these spots out, or look at the tower that made them",
        )
    return x if x.dtype == np.float32 else x.astype(np.float64)


def _check_classes(labels: pd.Series) -> None:
    if labels.nunique() < 2:
        there = sorted(labels.astype(str).unique())
        raise DataError(
            f"the labels name {len(there)} class{'es' * (len(there) != 1)} {there}: there is "
            "nothing to tell apart",
            fix="add annotated slides",
        )


def _place(spots: pd.DataFrame) -> pd.DataFrame:
    table = pd.DataFrame({"slide": spots["slide"], "spot": spots.index}, index=spots.index)
    for column in (c for c in ("donor", "group", "study") if c in spots):
        table[column] = units(spots, column)
    return table.assign(block=blocks(spots))


def _ask(
    predictor: Predictor, known: TrainingData, x: np.ndarray, spots: pd.DataFrame, fold: str
) -> Prediction:
    if len(set(known.y)) > 1:
        return predictor(known, x, spots)
    logger.warning(
        "fold %s: all of training is %r, and so is every prediction", fold, str(known.y[0])
    )
    return Prediction(known.y[:1], np.ones((len(x), 1)))


def paper_protocol(
    features: np.ndarray | pd.DataFrame,
    spots: Spots,
    *,
    path: Path = sgd_path,
    seeds: Iterable[int] = range(5),
    alphas: Sequence[float] = ALPHAS,
) -> pd.DataFrame:
    """Probe as Chen et al. 2024 do: 80 / 10 / 10 % of the labelled spots, drawn at random.

    The penalty with the best macro-F1 in validation is the one that is tested. It says how well the
    label of a spot can be told when its neighbours are known. Their code draws from an unordered
    set of names, so that every process splits otherwise; here a seed stands for one split.

    Parameters
    ----------
    features
        ``(n, d)`` in the row order of the spots.
    spots
        What `helpers.slides.spot_table` takes.
    path
        `sgd_path`, theirs, on raw features; or `logistic_path`, faster, on standardised ones.
    seeds
        One split each.
    alphas
        Penalties to choose from.

    Returns
    -------
    DataFrame
        One row per measurement: `seed`, `part` (``"validation"`` or ``"test"``), `alpha`, `measure`
        and `value`.

    Raises
    ------
    DataError
        As `predict`; or when a part would be empty, or training holds a single class.
    """
    spots = spot_table(spots)
    x = check_rows(features, spots)
    known = np.flatnonzero(spots["label"].notna())
    _check_classes(spots["label"].iloc[known])
    if len(known) < 10:
        raise DataError(f"{len(known)} labelled spots cannot be split 80 / 10 / 10", fix="add some")
    y, rows = spots["label"].to_numpy()[known].astype(str), []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(known))
        cuts = [int(0.8 * len(known)), int(0.9 * len(known))]
        train, *others = np.split(order, cuts)
        if len(set(y[train])) < 2:
            raise DataError(f"with seed {seed}, training holds a single class", fix="add labels")
        found = []
        for alpha, model in path(x[known[train]], y[train], alphas, seed):
            said = [measure(confusion(y[o], model.predict(x[known[o]]))) for o in others]
            found.append((alpha, dict(zip(("validation", "test"), said, strict=True))))
        alpha, best = max(found, key=lambda one: one[1]["validation"]["macro_f1"])
        rows += [(seed, part, alpha, m, float(best[part][m])) for part in best for m in MEASURES]
    return pd.DataFrame(rows, columns=["seed", "part", "alpha", "measure", "value"])


def majority(known: TrainingData, x: np.ndarray, spots: pd.DataFrame) -> Prediction:
    """Predict the most frequent class of training, with the shares of all as probabilities."""
    classes, count = np.unique(known.y, return_counts=True)
    return Prediction(classes, np.tile(count / count.sum(), (len(spots), 1)))


def spatial_neighbours(
    known: TrainingData, x: np.ndarray, spots: pd.DataFrame, *, k: int = 5
) -> Prediction:
    """Let the `k` nearest labelled training spots of the same slide vote, whatever the features.

    On a slide with no training spot there is nothing to go by: the answer is that of `majority`.
    """
    rest = majority(known, x, spots)
    votes, theirs = rest.probability.copy(), known.spots["slide"].to_numpy()
    code = np.searchsorted(rest.classes, known.y)
    for slide, asked in spots.groupby("slide").indices.items():
        rows = np.flatnonzero(theirs == slide)
        if len(rows):
            near = min(k, len(rows))
            tree = cKDTree(known.spots[["x_px", "y_px"]].to_numpy(float)[rows])
            places = spots[["x_px", "y_px"]].to_numpy(float)[asked]
            found = tree.query(places, k=range(1, near + 1))[1]
            votes[asked] = np.eye(len(rest.classes))[code[rows][found]].mean(axis=1)
    return Prediction(rest.classes, votes)


def coordinates(spots: Spots, degree: int = 1) -> np.ndarray:
    """Return where each spot lies on its slide, as features: no image, no genes.

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


def _estimator(
    estimator: ClassifierMixin, known: TrainingData, x: np.ndarray, spots: pd.DataFrame
) -> Prediction:
    """Use a classifier of scikit-learn as a predictor."""
    model = clone(estimator).fit(known.x, known.y)
    if hasattr(model, "predict_proba"):
        return Prediction(model.classes_, model.predict_proba(x))
    return Prediction(model.classes_, (model.predict(x)[:, None] == model.classes_).astype(float))
