"""Ways to split spots into training and test, from careless to strict.

A spot resembles its neighbours, the same place on the next section, and the rest of its donor. The
stricter a split, the less of this resemblance can help, so a score shows how well a model does on
tissue that is farther away. Every split is a cross-validator of scikit-learn with named folds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from sklearn.model_selection import KFold

from helpers.files import DataError
from helpers.slides import spot_table

if TYPE_CHECKING:
    from helpers.slides import Scales, Spots


logger = logging.getLogger(__name__)

INNER = 3  # folds inside a training part, where a setting is chosen


@dataclass(frozen=True)
class Fold:
    """One division of the spots.

    Attributes
    ----------
    name
        What is tested, such as the donor held out.
    train, test
        Row numbers. Rows in neither, such as the buffer around a block, may not be used.
    """

    name: str
    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Splits:
    """A way to split spots; pass it to scikit-learn as `cv`.

    Attributes
    ----------
    name
        The kind of split.
    spots
        The table that was split, from `helpers.slides.spot_table`.
    folds
        All divisions.
    """

    name: str
    spots: pd.DataFrame
    folds: tuple[Fold, ...]

    def split(self, X=None, y=None, groups=None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the row numbers of training and test; `y` and `groups` are ignored.

        Raises
        ------
        DataError
            When `X` does not have one row per spot.
        """
        if X is not None and np.shape(X)[0] != len(self.spots):
            what = f"{np.shape(X)[0]} rows of features for a split of {len(self.spots)} spots"
            raise DataError(what, fix="give features in the row order of the spots")
        for fold in self.folds:
            yield fold.train, fold.test

    def get_n_splits(self, X=None, y=None, groups=None) -> int:
        """Return the number of folds."""
        return len(self.folds)


def random_spots(spots: Spots, n: int = 5, seed: int = 0) -> Splits:
    """Split spots at random, as is often done: neighbours of a test spot are in training.

    Parameters
    ----------
    spots
        What `helpers.slides.spot_table` takes.
    n
        Folds; each spot is tested once.
    seed
        Seed of the order.
    """
    table = spot_table(spots)
    if not 2 <= n <= len(table):
        what = f"{len(table)} spots cannot be split into {n} folds"
        raise DataError(what, fix="ask for at least 2 folds, and at most one per spot")
    rows = KFold(n, shuffle=True, random_state=seed).split(table)
    folds = [Fold(f"spots {i} of {n}", *parts) for i, parts in enumerate(rows, start=1)]
    return Splits("random spots", table, tuple(folds))


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
    slide's group: they show nearly the same tissue, and without an alignment no buffer can be drawn
    on them. Other groups are in training as a whole.

    Parameters
    ----------
    spots, um_per_px
        What `helpers.slides.spot_table` takes; the scale must be known.
    n
        Pieces per slide, compact and with equally many spots; each spot is tested once.
    buffer_um
        Distance in um, centre to centre. Square tiles share no px beyond 1.42 times their side.
    together
        Hold out a piece of every group at a time: `n` folds for each section of a group instead of
        `n` per slide, for models that are slow to fit. Training is smaller, as every group loses
        its other sections. Pieces are numbered at random, so that a fold does not hold out the same
        corner of every slide.
    seed
        Seed of this numbering.
    """
    table = spot_table(spots, um_per_px)
    if "x_um" not in table:
        what = "a buffer in um needs the scale of the slides"
        raise DataError(what, fix="give um_per_px (to left_out, if one section is left to train)")
    if n < 2 or buffer_um < 0:
        what = f"n is {n}, buffer_um is {buffer_um}"
        raise DataError(what, fix="ask for at least 2 pieces and a buffer of 0 um or more")
    xy, slide = table[["x_um", "y_um"]].to_numpy(float), table["slide"].to_numpy()
    group, rng, held = units(table, "group"), np.random.default_rng(seed), {}
    for _, sections in table.groupby(group):
        for s, name in enumerate(sorted(sections["slide"].unique()), start=1):
            rows = np.flatnonzero(slide == name)
            piece = parts(xy[rows], n)
            if together:
                piece, name = rng.permutation(n)[piece], f"section {s} of each group"
            for i in np.unique(piece):
                held.setdefault(f"{name}, block {i + 1} of {n}", []).append(rows[piece == i])
    folds = []
    for name, rows in held.items():
        test = np.isin(np.arange(len(table)), np.concatenate(rows))
        adjacent = group.isin(group[test]).to_numpy() & ~np.isin(slide, slide[test])
        folds.append(_fold(name, ~adjacent & ~_near(xy, slide, test, buffer_um), test))
    return Splits("spatial blocks", table, tuple(folds))


def left_out(
    spots: Spots, by: str = "donor", *, um_per_px: Scales = None, at_most: int | None = None
) -> Splits:
    """Hold out all spots of a donor, a group of adjacent sections, a study or a slide.

    A section adjacent to a tested one is never in training: with ``by="slide"`` the other sections
    of its group are in neither part.

    Parameters
    ----------
    spots, um_per_px
        What `helpers.slides.spot_table` takes. The scale is needed where a training part has one
        section: `inside` cuts it into blocks.
    by
        ``"group"``, ``"donor"``, ``"study"`` or ``"slide"``.
    at_most
        Largest number of folds, each of several units then; None: one fold for each unit.
    """
    table = spot_table(spots, um_per_px)
    unit, group = units(table, by), units(table, "group")
    names, folds = sorted(unit.unique()), []
    if len(names) < 2:
        what = f"all spots are of one {by}, {names[0]!r}: no spot is left to train on"
        raise DataError(what, fix=f"add slides of a second {by}, or use spatial_blocks")
    n = min(at_most or len(names), len(names))
    for held in (names[i::n] for i in range(n)):
        test = unit.isin(held).to_numpy()
        folds.append(_fold(", ".join(held), ~group.isin(group[test]).to_numpy(), test))
    name = "left-out section" if by == "group" else f"left-out {by}"
    return Splits(name, table, tuple(folds))


def inside(spots: Spots) -> Splits:
    """Split a training part once more, to choose a setting such as a penalty.

    The rule is the same for every outer split: hold out a donor, or a group of adjacent sections
    where one donor is left, or blocks where one group is left; at most `INNER` folds. So a setting
    is always judged on tissue that is farther away than the next spot.

    Parameters
    ----------
    spots
        A training part of a table from `helpers.slides.spot_table`; the scale must be known where
        it holds one group.
    """
    for unit in ("donor", "group"):
        if units(spots, unit).nunique() > 1:
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

    Where only one section, donor or study has labels, its split is left out, with a line in the
    log. (Units without labels stay in the table.)

    Parameters
    ----------
    spots, um_per_px
        What `helpers.slides.spot_table` takes; the scale must be known.
    n
        Folds of `random_spots`.
    n_blocks, buffer_um, together
        Of `spatial_blocks`.
    seed
        Of both.
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


def _fold(name: str, train: np.ndarray, test: np.ndarray) -> Fold:
    """Turn two masks into a fold."""
    if not train.any():
        fix = "use a smaller buffer or smaller blocks, or add slides"
        raise DataError(f"fold {name!r} leaves no spot to train on", fix=fix)
    return Fold(name, np.flatnonzero(train), np.flatnonzero(test))


def _near(xy: np.ndarray, slide: np.ndarray, test: np.ndarray, buffer_um: float) -> np.ndarray:
    """Mark the spots within the buffer of a tested spot of the same slide, and these themselves."""
    near = np.zeros(len(xy), bool)
    for name in np.unique(slide[test]):
        here = slide == name
        near[here] = cKDTree(xy[here & test]).query(xy[here])[0] <= buffer_um
    return near


def units(table: pd.DataFrame, by: str) -> pd.Series:
    """Return the donor, group, slide or study of each spot; equal names in two studies differ."""
    if by not in table:
        known = [c for c in ("slide", "donor", "group", "study") if c in table]
        raise DataError(f"the table of spots has no column {by!r}", fix=f"use one of {known}")
    several = by in ("donor", "group") and "study" in table and table["study"].nunique() > 1
    return table["study"] + " " + table[by] if several else table[by]


def parts(xy: np.ndarray, n: int) -> np.ndarray:
    """Cut points into compact parts: halve them across the longer side, and again.

    Parameters
    ----------
    xy
        Coordinates in any unit, shape ``(points, 2)``.
    n
        Number of parts.

    Returns
    -------
    int, shape ``(points,)``, from 0 to n - 1, equally many points of each.
    """
    if n == 1 or not len(xy):
        return np.zeros(len(xy), int)
    order = np.argsort(xy[:, np.ptp(xy, axis=0).argmax()], kind="stable")
    first, second = np.split(order, [round(len(xy) * (n // 2) / n)])
    number = np.empty(len(xy), int)
    number[first] = parts(xy[first], n // 2)
    number[second] = n // 2 + parts(xy[second], n - n // 2)
    return number


def blocks(spots: Spots, n: int = 8) -> pd.Series:
    """Name the piece of tissue each spot lies in: `n` compact parts of equal size per slide.

    The sections of a group share their pieces, since they show nearly the same tissue.
    """
    table = spot_table(spots)
    number = pd.Series(0, index=np.arange(len(table)))
    for rows in table.groupby("slide").indices.values():
        number.iloc[rows] = parts(table[["x_px", "y_px"]].to_numpy()[rows], n)
    group = units(table, "group").astype(str)
    return group + ", block " + (number + 1).astype(str).to_numpy()
