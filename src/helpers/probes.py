"""What can be read off features: probes that learn from the training part of a fold, and no more.

A predictor is a function of what is known (features, labels and places of the training part), of
the features of the test part and of where its spots lie. It is never shown a label of the test
part, so nothing that is fitted or chosen can have seen one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from sklearn.base import ClassifierMixin, clone
from sklearn.preprocessing import PolynomialFeatures

from helpers.files import DataError
from helpers.linear import ALPHAS, Guess, Known, logistic, sgd_path
from helpers.places import blocks, describe, units
from helpers.scores import MEASURES, confusion, measure
from helpers.splits import Fold, Splits

if TYPE_CHECKING:
    from helpers.places import Spots

logger = logging.getLogger(__name__)

Predictor = Callable[[Known, np.ndarray, pd.DataFrame], Guess]
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
        piece of tissue, see `helpers.places.blocks`), `fold`, `truth`, `predicted`, `confidence`
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
        some = Known(x[train], y, spots.iloc[train], splits.within)
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
    predictor: Predictor, known: Known, x: np.ndarray, spots: pd.DataFrame, fold: str
) -> Guess:
    if len(set(known.y)) > 1:
        return predictor(known, x, spots)
    logger.warning(
        "fold %s: all of training is %r, and so is every prediction", fold, str(known.y[0])
    )
    return Guess(known.y[:1], np.ones((len(x), 1)))


def paper(
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
        What `helpers.places.describe` takes.
    path
        `sgd_path`, theirs, on features as they are; or `lbfgs_path`, faster, on standardised ones.
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
    spots = describe(spots)
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


def majority(known: Known, x: np.ndarray, spots: pd.DataFrame) -> Guess:
    """Predict the most frequent class of training, with the shares of all as probabilities."""
    classes, count = np.unique(known.y, return_counts=True)
    return Guess(classes, np.tile(count / count.sum(), (len(spots), 1)))


def neighbours(known: Known, x: np.ndarray, spots: pd.DataFrame, *, k: int = 5) -> Guess:
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
    return Guess(rest.classes, votes)


def coordinates(spots: Spots, degree: int = 1) -> np.ndarray:
    """Return where each spot lies on its slide, as features: no image, no genes.

    Parameters
    ----------
    spots
        What `helpers.places.describe` takes.
    degree
        Of the polynomial in x and y; a linear probe on degree 3 draws smooth maps.

    Returns
    -------
    float ``(n, 2)`` for degree 1: x and y from -1 to 1 across the spots of the slide.
    """
    table = describe(spots)
    xy = table[["x_px", "y_px"]].astype(float)
    low, high = (xy.groupby(table["slide"]).transform(end) for end in ("min", "max"))
    scaled = 2 * (xy - low) / (high - low).where(high > low, 1) - 1
    return PolynomialFeatures(degree, include_bias=False).fit_transform(scaled.to_numpy())


def _estimator(
    estimator: ClassifierMixin, known: Known, x: np.ndarray, spots: pd.DataFrame
) -> Guess:
    """Use a classifier of scikit-learn as a predictor."""
    model = clone(estimator).fit(known.x, known.y)
    if hasattr(model, "predict_proba"):
        return Guess(model.classes_, model.predict_proba(x))
    return Guess(model.classes_, (model.predict(x)[:, None] == model.classes_).astype(float))
