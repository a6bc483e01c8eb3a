"""Who and where the spots are: one table for everything that splits, scores and draws them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from helpers.files import DataError

if TYPE_CHECKING:
    from anndata import AnnData

    Spots = pd.DataFrame | AnnData | Mapping[str, AnnData]
    Scales = Mapping[str, float | AnnData] | None

WHO = ("slide", "donor", "group")
"""Columns that say whose a spot is; sections of one `group` were cut next to each other."""


def describe(spots: Spots, um_per_px: Scales = None) -> pd.DataFrame:
    """Return who and where the spots are, in the order given.

    Parameters
    ----------
    spots
        `Pairs.spots`, an AnnData from `helpers.slides`, several of them by slide, or what this
        function returned.
    um_per_px
        Per slide, microns per px or an AnnData that knows it. AnnData in `spots` know their own.

    Returns
    -------
    DataFrame
        Named by spot: `slide`, `donor`, `group`, `study` where it is known, `label` (missing where
        there is none), `x_px`, `y_px` and, where the scale is known, `x_um`, `y_um`.

    Raises
    ------
    DataError
        When a column or a scale is missing; a spot has no slide, donor or group; a slide has two
        donors; or a spot is there twice.
    """
    if hasattr(spots, "obs"):
        spots = {"": spots}
    if isinstance(spots, Mapping):
        um_per_px = {s: a for adata in spots.values() for s, a in _own_scales(adata)} | dict(
            um_per_px or {}
        )
        spots = pd.concat([_observations(adata) for adata in spots.values()])
    if lacking := [c for c in (*WHO, "label", "x_px", "y_px") if c not in spots]:
        fix = "take helpers.pairs.Pairs.spots, or slides from helpers.slides"
        raise DataError(f"the table of spots lacks {lacking}", fix=fix)
    wanted = [*WHO, "study", "label", "x_px", "y_px", "x_um", "y_um"]
    table = spots[[column for column in wanted if column in spots]].copy()
    table["label"] = table["label"].astype(object).where(table["label"].notna(), None)
    for column in (c for c in (*WHO, "study") if c in table):
        if table[column].isna().any():
            spot = table.index[table[column].isna()][0]
            raise DataError(f"spot {spot} has no {column}", fix=f"say the {column} of every spot")
        table[column] = table[column].astype(str)
    _check(table)
    if um_per_px is not None:
        per_spot = table["slide"].map({s: _scale(value, s) for s, value in um_per_px.items()})
        if per_spot.isna().any():
            slide = table["slide"][per_spot.isna().to_numpy()].iloc[0]
            raise DataError("no um per px is known", slide=slide, fix="add it to um_per_px")
        table["x_um"], table["y_um"] = table["x_px"] * per_spot, table["y_px"] * per_spot
    return table


def _own_scales(adata: AnnData) -> Iterator[tuple[str, float]]:
    for slide, known in adata.uns.get("spatial", {}).items():
        yield slide, known["um_per_px"]


def _scale(value: float | AnnData, slide: str) -> float:
    value = float(dict(_own_scales(value))[slide] if hasattr(value, "uns") else value)
    if not (np.isfinite(value) and value > 0):
        raise DataError(f"{value} um per px is no scale", slide=slide, fix="a number above 0")
    return value


def _observations(adata: AnnData) -> pd.DataFrame:
    table = adata.obs.copy()
    table[["x_px", "y_px"]] = adata.obsm["spatial"]
    label = table["label"].astype(object) if "label" in table else None  # a slide may have none
    return table.assign(label=label)


def _check(table: pd.DataFrame) -> None:
    """Refuse a table that names nobody, one slide twice over, or no place."""
    if table.empty:
        raise DataError("there are no spots")
    for column in ("donor", "group"):
        owners = table.groupby("slide")[column].nunique()
        if (owners > 1).any():
            raise DataError(f"its spots have more than one {column}", slide=str(owners.idxmax()))
    twice = table.set_index("slide", append=True).index.duplicated()
    if twice.any():
        what = f"spot {table.index[twice][0]} is there twice"
        raise DataError(what, slide=table["slide"][twice].iloc[0], fix="name each spot once")
    lost = ~np.isfinite(table[["x_px", "y_px"]].to_numpy(float)).all(axis=1)
    if lost.any():
        slide = table["slide"].iloc[lost.argmax()]
        raise DataError(f"spot {table.index[lost.argmax()]} has no place", slide=slide)


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
    table = describe(spots)
    name = pd.Series(index=table.index, dtype=object)
    for slide, rows in table.groupby("slide").indices.items():
        at = parts(table[["x_px", "y_px"]].to_numpy()[rows], n)
        name.iloc[rows] = [f"{slide}, block {i + 1}" for i in at]
    return name
