"""Who may learn from whom: ways to split spots into training and test, from careless to strict.

A spot resembles its neighbours, the same place on the next section, and the rest of its donor. The
stricter a split, the less of that can help, so a score means: what is left on tissue that is
farther away. Every split here is a cross-validator of scikit-learn, and each fold has a name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from sklearn.model_selection import KFold

from helpers.files import DataError
from helpers.slides import WHO, spot_table

if TYPE_CHECKING:
    from helpers.slides import Scales, Spots


logger = logging.getLogger(__name__)

INNER = 3  # folds, where a setting is chosen inside a training part


@dataclass(frozen=True)
class Fold:
    """One division of the spots.

    Attributes
    ----------
    name
        Who is tested, such as the donor held out.
    train, test
        Row numbers. What is in neither, such as the buffer around a block, may not be used.
    """

    name: str
    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Splits:
    """A way to split spots; takes the place of `cv` in scikit-learn.

    Attributes
    ----------
    name
        The kind of split.
    spots
        What was split: the table that `spot_table` returns.
    folds
        All divisions.
    within
        Splits a part of the spots in the same way, to choose a setting inside a training part.
    """

    name: str
    spots: pd.DataFrame
    folds: tuple[Fold, ...]
    within: Callable[[pd.DataFrame], Splits]

    def split(self, X=None, y=None, groups=None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the row numbers of training and test; `y` and `groups` are not looked at.

        Raises
        ------
        DataError
            When `X` has not one row per spot.
        """
        if X is not None and np.shape(X)[0] != len(self.spots):
            what = f"{np.shape(X)[0]} rows of features for the {len(self.spots)} spots that split"
            raise DataError(what, fix="give features in the row order of the spots")
        for fold in self.folds:
            yield fold.train, fold.test

    def get_n_splits(self, X=None, y=None, groups=None) -> int:
        """Return the number of folds."""
        return len(self.folds)


# --------------------------------------------------------------------------- the rungs


def random_spots(spots: Spots, n: int = 5, seed: int = 0) -> Splits:
    """Split spots at random, as is often done: neighbours of a test spot are in training.

    Parameters
    ----------
    spots
        What `spot_table` takes.
    n
        Folds; each spot is tested once.
    seed
        Of the order.
    """
    table = spot_table(spots)
    if not 2 <= n <= len(table):
        raise DataError(f"{len(table)} spots do not make {n} folds", fix="2 or more, one spot each")
    folds = KFold(n, shuffle=True, random_state=seed).split(table)
    named = [Fold(f"spots {i + 1} of {n}", *rows) for i, rows in enumerate(folds)]
    return Splits("random spots", table, tuple(named), partial(random_spots, n=INNER, seed=seed))


def spatial_blocks(
    spots: Spots,
    n: int = 4,
    *,
    buffer_um: float = 400.0,
    um_per_px: Scales = None,
    together: bool = False,
    seed: int = 0,
) -> Splits:
    """Hold out a piece of a slide, with a buffer around it.

    Spots of the same slide within the buffer are in neither part. Nor are the other sections of the
    slide's group: they show nearly the same tissue, but how they lie to each other is known only
    roughly, if at all, so no buffer could be drawn on them. Other groups are in training whole.

    Parameters
    ----------
    spots, um_per_px
        What `spot_table` takes; the scale must be known.
    n
        Pieces per slide, compact and with equally many spots; each spot is tested once.
    buffer_um
        Distance in um, centre to centre. Square tiles share no px beyond 1.42 times their side.
    together
        Hold out a piece of every group at a time: `n` times as many folds as a group has sections,
        instead of `n` per slide, for what is slow to fit. It trains on less, and every group gives
        up its other sections. Pieces are numbered at random, so that a fold does not take the same
        corner of every slide.
    seed
        Of these numbers.
    """
    table = spot_table(spots, um_per_px)
    if "x_um" not in table:
        what = "a buffer in um needs the scale of the slides"
        raise DataError(what, fix="give um_per_px, to left_out too where it leaves one section")
    if n < 2 or buffer_um < 0:
        raise DataError(f"n is {n}, buffer_um {buffer_um}", fix="2 or more pieces, 0 um or more")
    xy, rng, tests = table[["x_um", "y_um"]].to_numpy(float), np.random.default_rng(seed), {}
    for _, sections in table.groupby(units(table, "group")):
        for s, slide in enumerate(sorted(sections["slide"].unique())):
            rows = np.flatnonzero(table["slide"] == slide)
            number = parts(xy[rows], n)
            if together:
                number = rng.permutation(n)[number]
            for i in np.unique(number):
                name = f"section {s + 1} of each group" if together else slide
                tests.setdefault(f"{name}, block {i + 1} of {n}", []).append(rows[number == i])
    folds = []
    for name, held in tests.items():
        test = _mask(np.concatenate(held), len(table))
        near = _mask(_near(table["slide"].to_numpy(), xy, test, buffer_um), len(table))
        folds.append(
            _fold(name, ~near & ~(_adjacent(table, test) & ~_of_slides(table, test)), test)
        )
    within = partial(spatial_blocks, n=2, buffer_um=buffer_um, together=True, seed=seed)
    return Splits("spatial blocks", table, tuple(folds), within)


def left_out(
    spots: Spots, by: str = "donor", *, um_per_px: Scales = None, at_most: int | None = None
) -> Splits:
    """Hold out all spots of a donor, a group of adjacent sections, a study or a slide.

    No section adjacent to a tested one is in training, whatever is held out: with ``by="slide"``
    the other sections of its group are in neither part.

    Parameters
    ----------
    spots, um_per_px
        What `spot_table` takes. The scale is needed where a training part is of one section, and so
        must be cut into blocks to choose a setting.
    by
        ``"group"``, ``"donor"``, ``"study"`` or ``"slide"``. Where a donor has one group, the first
        two are the same split.
    at_most
        Deal them into so many folds; None: one fold each.
    """
    table = spot_table(spots, um_per_px)
    unit = units(table, by)
    names = list(unit.value_counts(sort=False).sort_index(kind="stable").index)
    if len(names) < 2:
        what = f"all spots are of one {by}, {names[0]!r}: nobody is left to train on"
        raise DataError(what, fix="add slides of others, or take spatial blocks")
    folds = []
    for i in range(min(at_most or len(names), len(names))):
        held = names[i :: at_most or len(names)]
        test = unit.isin(held).to_numpy()
        folds.append(_fold(", ".join(held), ~_adjacent(table, test), test))
    name = "left-out section" if by == "group" else f"left-out {by}"
    return Splits(name, table, tuple(folds), partial(_inside, by=by))


def _inside(spots: pd.DataFrame, by: str) -> Splits:
    """Split a training part by the same unit, or by the next smaller one that it has two of."""
    order = ["study", "donor", "group"]
    for unit in order[order.index(by) if by in order else 2 :]:
        if unit in spots and units(spots, unit).nunique() > 1:
            return left_out(spots, unit, at_most=INNER)
    return spatial_blocks(spots, INNER, together=True)


def ladder(
    spots: Spots,
    um_per_px: Scales = None,
    *,
    n: int = 5,
    n_blocks: int = 4,
    buffer_um: float = 400.0,
    together: bool = False,
    seed: int = 0,
) -> dict[str, Splits]:
    """Return all splits that these spots allow, by name, from careless to strict.

    A rung is left out, with a line in the log, where no second section, donor or study has labels:
    nobody could be trained or tested there. (A study or donor without labels stays in the table.)

    Parameters
    ----------
    spots, um_per_px
        What `spot_table` takes; the scale must be known.
    n
        Folds of random spots.
    n_blocks, buffer_um, together
        Of `spatial_blocks`.
    seed
        Of `random_spots` and `spatial_blocks`.
    """
    table = spot_table(spots, um_per_px)
    rungs = [
        random_spots(table, n, seed),
        spatial_blocks(table, n_blocks, buffer_um=buffer_um, together=together, seed=seed),
    ]
    labelled = table[table["label"].notna()]
    for by in (unit for unit in ("group", "donor", "study") if unit in table):
        if units(labelled, by).nunique() > 1:
            rungs.append(left_out(table, by))
        else:
            logger.warning("no second %s has labels, so none can be left out", by)
    return {rung.name: rung for rung in rungs}


# --------------------------------------------------------------------------- masks


def _fold(name: str, train: np.ndarray, test: np.ndarray) -> Fold:
    if not train.any():
        fix = "a smaller buffer, smaller blocks, or more slides"
        raise DataError(f"fold {name!r} leaves nobody to train on", fix=fix)
    return Fold(name, np.flatnonzero(train), np.flatnonzero(test))


def _mask(rows: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, bool)
    mask[rows] = True
    return mask


def _of_slides(table: pd.DataFrame, test: np.ndarray) -> np.ndarray:
    return table["slide"].isin(table["slide"][test]).to_numpy()


def _adjacent(table: pd.DataFrame, test: np.ndarray) -> np.ndarray:
    """Spots of the slides and groups that are tested."""
    group = units(table, "group")
    return group.isin(group[test]).to_numpy() | _of_slides(table, test)


def _near(slide: np.ndarray, xy: np.ndarray, test: np.ndarray, buffer_um: float) -> np.ndarray:
    """Rows within the buffer of a tested spot of the same slide, among them the tested ones."""
    found = []
    for name in np.unique(slide[test]):
        rows, asked = np.flatnonzero(slide == name), np.flatnonzero((slide == name) & test)
        distance, _ = cKDTree(xy[asked]).query(xy[rows])
        found.append(rows[distance <= buffer_um])
    return np.concatenate(found)


# --------------------------------------------------------------------------- pieces of tissue


def units(table: pd.DataFrame, by: str) -> pd.Series:
    """Return whose each spot is; a donor "A" of two studies is two donors."""
    if by not in table:
        known = [c for c in (*WHO, "study") if c in table]
        raise DataError(f"the table of spots has no column {by!r}", fix=f"one of {known}")
    several = by in ("donor", "group") and "study" in table and table["study"].nunique() > 1
    return table["study"] + " " + table[by] if several else table[by]


def parts(xy: np.ndarray, n: int) -> np.ndarray:
    """Give points the number of a compact part: halved across the longer side, and again.

    Parameters
    ----------
    xy
        Places in any unit, shape ``(points, 2)``.
    n
        How many parts.

    Returns
    -------
    int, shape ``(points,)``, from 0 to n - 1, equally many points of each.
    """
    number = np.zeros(len(xy), int)

    def cut(rows: np.ndarray, n: int, first: int) -> None:
        if n == 1 or not len(rows):
            number[rows] = first
            return
        longer = np.ptp(xy[rows], axis=0).argmax()
        rows = rows[np.argsort(xy[rows, longer], kind="stable")]
        at = round(len(rows) * (n // 2) / n)
        cut(rows[:at], n // 2, first)
        cut(rows[at:], n - n // 2, first + n // 2)

    cut(np.arange(len(xy)), n, 0)
    return number


def blocks(spots: Spots, n: int = 8) -> pd.Series:
    """Name the piece of tissue each spot lies in: `n` compact parts of equal size per slide."""
    table = spot_table(spots)
    name = pd.Series(index=table.index, dtype=object)
    for slide, rows in table.groupby("slide").indices.items():
        at = parts(table[["x_px", "y_px"]].to_numpy()[rows], n)
        name.iloc[rows] = [f"{slide}, block {i + 1}" for i in at]
    return name
