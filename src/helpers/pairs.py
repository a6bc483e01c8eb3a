"""Tiles and a second view of the same spots, row by row, and what is done to a batch of them.

Rows are joined by slide and spot id, never by position. Who the spots are travels with them, so
that training and validation can be told apart by slide, donor and group of adjacent sections.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor

from helpers import genes
from helpers.files import DataError

if TYPE_CHECKING:
    from anndata import AnnData

    from helpers.tiles import Tiles

logger = logging.getLogger(__name__)

FACTS = ["slide", "donor", "group", "label", "x_px", "y_px"]
"""Columns of `Pairs.spots`."""
NUMBERS = 19
"""Random numbers that `augmented` takes for one tile."""


@dataclass(frozen=True)
class Pairs:
    """Tiles and a second view of the same spots, row by row.

    Attributes
    ----------
    tiles
        uint8 ``(n, size, size, 3)``, in memory or memory-mapped.
    other
        The second view: float32 ``(n, genes)``, or int64 tokens ``(n, context)``.
    spots
        One row per pair, named by spot id: `slide`, `donor`, `group` (adjacent sections share one),
        `label`, and the centre `x_px`, `y_px` in px of the full image.
    panel
        The genes in the columns of `other`; None where it holds something else.

    Raises
    ------
    DataError
        When the three do not have the same rows, or a value of `other` is NaN or infinite.
    """

    tiles: np.ndarray
    other: np.ndarray
    spots: pd.DataFrame
    panel: genes.Panel | None = None

    def __post_init__(self) -> None:
        if not len(self.tiles) == len(self.other) == len(self.spots):
            raise DataError(
                f"{len(self.tiles)} tiles, {len(self.other)} rows of the second view and "
                f"{len(self.spots)} spots do not make pairs",
                fix="build them with helpers.pairs.pair, which joins by spot id",
            )
        if self.tiles.dtype != np.uint8 or self.other.dtype not in (np.float32, np.int64):
            what = f"tiles are {self.tiles.dtype} and the second view {self.other.dtype}"
            raise DataError(what, fix="give uint8 tiles, float32 expression or int64 tokens")
        if lacking := sorted({"slide", "donor", "group"} - set(self.spots)):
            raise DataError(f"the table of spots lacks {lacking}", fix="say who the spots are")
        if self.panel is not None and self.other.shape[1] != len(self.panel.genes):
            what = f"{self.other.shape[1]} columns for {len(self.panel.genes)} genes"
            raise DataError(what, fix="give the columns of the panel, in its order")
        bad = ~np.isfinite(self.other).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            column = int((~np.isfinite(self.other[row])).argmax())
            name = f"gene {self.panel.genes[column]}" if self.panel else f"column {column}"
            raise DataError(
                f"{bad.sum()} spots have NaN or infinite values, the first is spot "
                f"{self.spots.index[row]}, {name}",
                slide=str(self.spots["slide"].iloc[row]),
                fix="leave these spots out, or find out where the values come from",
            )

    def __len__(self) -> int:
        return len(self.spots)

    def of(self, which: Sequence | np.ndarray | pd.Series) -> Pairs:
        """Return some of the pairs.

        Parameters
        ----------
        which
            Names of slides, a boolean per row, or row numbers.

        Returns
        -------
        Pairs. One run of neighbouring rows, such as one slide, is not copied.
        """
        wanted = np.asarray(which)
        if wanted.dtype.kind in "OUS":
            slides = self.spots["slide"].astype(str)
            if unknown := sorted(set(map(str, wanted)) - set(slides)):
                raise DataError(
                    f"no pair comes from {unknown}", fix=f"one of {sorted(set(slides))}"
                )
            wanted = slides.isin(list(map(str, wanted))).to_numpy()
        rows = np.flatnonzero(wanted) if wanted.dtype == bool else wanted.astype(int)
        if not len(rows):
            raise DataError("none of the pairs is left", fix="check what was asked for")
        if (np.diff(rows) == 1).all():
            rows = slice(rows[0], rows[-1] + 1)
        return Pairs(self.tiles[rows], self.other[rows], self.spots.iloc[rows], self.panel)


def pair(
    adatas: Mapping[str, AnnData],
    tiles: Tiles,
    panel: genes.Panel | None,
    *,
    standardise: bool = False,
) -> Pairs:
    """Join tiles and the expression of a panel, by slide and spot id.

    Parameters
    ----------
    adatas
        Slides from `helpers.genes.normalise`.
    tiles
        Their tiles. A spot without a tile (cut with ``edge="drop"``), a tile without a spot
        and tiles of other slides are left out.
    panel
        The genes. None: no second view yet, `other` has no column.
    standardise
        Bring every gene to mean 0 and variance 1 within each slide. It takes away the level by
        which slides differ (chemistry, depth), and needs the whole slide, but none of its labels.

    Returns
    -------
    Pairs, slides in the order given, spots of a slide in the order of the tiles.

    Raises
    ------
    DataError
        Naming the slide: when it is not normalised, lacks a gene of the panel or holds NaN; has no
        spot with a tile; or does not say which slide, donor and group its spots belong to.
    """
    rows, views, facts = [], [], []
    for adata in adatas.values():
        slide = _only(adata, "slide", None)
        if "counts" not in adata.layers and "log1p" not in adata.uns:
            fix = "pass it through helpers.genes.normalise"
            raise DataError("its counts are not normalised", slide=slide, fix=fix)
        index = tiles.index[tiles.index["slide"] == slide]
        index = index[index.index.isin(adata.obs_names)]
        if index.empty:
            fix = "cut the tiles of this slide, and compare its spot ids with theirs"
            raise DataError("no spot has a tile", slide=slide, fix=fix)
        if len(index) < adata.n_obs:
            n = adata.n_obs - len(index)
            logger.info("slide %s: %d of %d spots have no tile", slide, n, adata.n_obs)
        table = pd.DataFrame(index=index.index)
        for key in ("slide", "donor", "group"):
            table[key] = _only(adata, key, slide)
        labels = adata.obs["label"] if "label" in adata.obs else pd.Series(index=adata.obs_names)
        table["label"] = labels.astype(object).reindex(index.index)
        table[["x_px", "y_px"]] = index[["x_px", "y_px"]]
        rows.append(index["row"].to_numpy())
        if panel is None:
            view = np.empty((len(index), 0), np.float32)
        else:
            view = genes.select(adata, panel).loc[index.index].to_numpy(np.float32)
        views.append(_standardised(view) if standardise else view)
        facts.append(table)
    at = np.concatenate(rows)
    if (np.diff(at) == 1).all():  # as the cache has them: stay memory-mapped
        at = slice(at[0], at[-1] + 1)
    return Pairs(tiles.array[at], np.concatenate(views), pd.concat(facts)[FACTS], panel)


def _standardised(view: np.ndarray) -> np.ndarray:
    """Columns at mean 0 and variance 1; a constant one at 0."""
    spread = view.std(axis=0)
    return (view - view.mean(axis=0)) / np.where(spread > 1e-6, spread, 1)


def _only(adata: AnnData, key: str, slide: str | None) -> str:
    """Return what all spots of a slide have in common."""
    values = adata.obs[key].unique() if key in adata.obs else []
    if len(values) != 1 or pd.isna(values[0]):
        raise DataError(
            f'obs["{key}"] must name one {key} for all spots, not {list(values)[:5]}',
            slide=slide,
            fix="load slides with helpers.slides, one AnnData each",
        )
    return str(values[0])


def check_apart(train: Pairs, held_out: Pairs, role: str = "validation") -> None:
    """Refuse a slide, a group of adjacent sections or a panel that training shares with others.

    Parameters
    ----------
    train, held_out
        What is trained on and what is kept apart from it.
    role
        What it is kept apart for, for the message.

    Raises
    ------
    DataError
        Naming the slides, the group or the panel.
    """
    for key in ("slide", "group"):
        both = set(train.spots[key].astype(str)) & set(held_out.spots[key].astype(str))
        if both:
            slides = [
                sorted(set(part.spots.loc[part.spots[key].astype(str).isin(both), "slide"]))
                for part in (train, held_out)
            ]
            raise DataError(
                f"training and {role} share the {key} {', '.join(sorted(both))}: slides {slides[0]}"
                f" are in training, {slides[1]} in {role}",
                fix="split by donor, or keep adjacent sections together",
            )
    if (train.panel is None) != (held_out.panel is None) or (
        train.panel is not None and train.panel.genes != held_out.panel.genes
    ):
        raise DataError(f"training and {role} have other genes", fix="use one panel for both")
    if train.panel is not None:
        genes.check_held_out(train.panel, held_out.spots["slide"].astype(str).unique())


# --------------------------------------------------------------------------- augmentation


def augment(
    pixels: Tensor, generator: torch.Generator, strength: float = 1.0, crop: float = 0.0
) -> Tensor:
    """Show tiles as another scanner, stain and side up might have shown them.

    Every tile for itself: turned and mirrored (the 8 ways to lay a square, exactly, without
    resampling), its stains changed, and on wish a part of it enlarged.

    Stains are changed in optical density, where they add up (Beer-Lambert): separated into
    hematoxylin, eosin and a rest with the vectors of Ruifrok and Johnston 2001 (scikit-image's),
    each amount scaled by up to 20 %, each stain's colour moved by up to 5 %, the illumination by
    up to 0.05, as in Tellez et al. 2018 (doi:10.1109/TMI.2018.2820199). Empty glass stays white
    but for the illumination.

    Parameters
    ----------
    pixels
        float ``(n, 3, h, h)`` in [0, 1], on any device.
    generator
        Source of random numbers, on the CPU, so that every device draws alike.
    strength
        Factor for the changes of stain; 0 leaves the tiles as they are.
    crop
        Largest share of the side that is cut off before the rest is enlarged (bilinear), 0 to 1.

    Returns
    -------
    Tensor of the same shape, in [0, 1].
    """
    return augmented(pixels, torch.rand(len(pixels), NUMBERS, generator=generator), strength, crop)


def augmented(pixels: Tensor, numbers: Tensor, strength: float = 1.0, crop: float = 0.0) -> Tensor:
    """`augment` by given numbers, ``(n, NUMBERS)`` in [0, 1): a part of a batch is as the whole."""
    if strength == 0 and crop == 0:
        return pixels
    numbers = numbers.to(pixels.device, pixels.dtype)
    sides, stains, place = numbers[:, :3] < 0.5, 2 * numbers[:, 3:16] - 1, numbers[:, 16:]
    if strength:
        pixels = _restain(pixels, strength * stains)
    if crop:
        pixels = _enlarge(pixels, 1 - crop * place[:, 0], place[:, 1:])
    for side, turned in zip(sides.T, (_transpose, _mirror, _upside_down), strict=True):
        pixels = torch.where(side.view(-1, 1, 1, 1), turned(pixels), pixels)
    return pixels


def _transpose(pixels: Tensor) -> Tensor:
    return pixels.transpose(2, 3)


def _mirror(pixels: Tensor) -> Tensor:
    return pixels.flip(3)


def _upside_down(pixels: Tensor) -> Tensor:
    return pixels.flip(2)


def _restain(pixels: Tensor, change: Tensor) -> Tensor:
    """Change the stains of each tile; `change` is ``(n, 13)`` around 0."""
    split = torch.as_tensor(hed_from_rgb, dtype=pixels.dtype, device=pixels.device)
    mix = torch.as_tensor(rgb_from_hed, dtype=pixels.dtype, device=pixels.device)
    amount = torch.diag_embed(1 + 0.2 * change[:, :3])
    colour = mix * (1 + 0.05 * change[:, 3:12].view(-1, 3, 3))
    light = pixels.clamp_min(1 / 255).log_().flatten(2)  # (n, 3, h * h), minus the density
    mixed = (split @ amount @ colour).transpose(1, 2).contiguous()  # as a view it is 25x slower
    light = torch.baddbmm(-0.05 * change[:, 12].view(-1, 1, 1), mixed, light)
    return light.exp_().clamp_(0, 1).view_as(pixels)


def _enlarge(pixels: Tensor, side: Tensor, place: Tensor) -> Tensor:
    """Enlarge a square of each tile; `side` its share of the tile, `place` 0 to 1 in x and y."""
    shift = (1 - side[:, None]) * (2 * place - 1)
    still = torch.zeros_like(side)
    turn = torch.stack([side, still, shift[:, 0], still, side, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(turn, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
