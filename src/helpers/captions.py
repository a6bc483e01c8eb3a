"""Short captions for tiles, and a small CLIP trained on them.

The second view of a tile is a sentence here: what the annotator called the place, and how much of
either stain the tile shows. Chapter 5 trains on it and chapter 6 asks it questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from skimage.color import hed_from_rgb

from helpers import contrast, tiles, towers
from helpers.contrast import Fold, Pairs, Settings
from helpers.files import DataError

if TYPE_CHECKING:
    from anndata import AnnData

NUCLEI = ("few", "some", "many")
BACKGROUND = ("pale", "pink", "deep pink")

SETTINGS = replace(contrast.BOOK, epochs=6, augment=0.1, keep="last")
"""What the captions are trained with: under a minute on two cores.

Tiles are turned and mirrored, but their stains are hardly changed: the captions speak of them.
"""


def stains(array: np.ndarray) -> np.ndarray:
    """Mean amounts of hematoxylin and eosin of uint8 tiles ``(n, h, w, 3)``, float32 ``(n, 2)``.

    By the vectors of Ruifrok and Johnston 2001 (scikit-image's), on a sample of the px.
    """
    density = -np.log10(np.maximum(array[:, ::2, ::2].astype(np.float32), 1) / 255).mean((1, 2))
    return density @ hed_from_rgb[:, :2].astype(np.float32)


def describe(array: np.ndarray, spots: pd.DataFrame) -> pd.Series:
    """Write a caption for every tile.

    Amounts of stain are put into thirds of their own slide, so that words mean the same on slides
    that were stained differently. Words for nuclei are a guess from the hematoxylin.

    Parameters
    ----------
    array
        uint8 tiles ``(n, h, w, 3)``.
    spots
        Their spots, with `slide` and `label` (NaN: "tissue").

    Returns
    -------
    Series of sentences such as "Layer 2 with many nuclei on pale ground", one per row of `spots`.

    Raises
    ------
    DataError
        When tiles and spots are not equally many.
    """
    if len(array) != len(spots):
        raise DataError(f"{len(array)} tiles and {len(spots)} spots", fix="give the tile of each")
    amounts = pd.DataFrame(stains(array), columns=["nuclei", "ground"])
    by_slide = amounts.groupby(spots["slide"].astype(str).to_numpy())
    below = (by_slide.rank() - 0.5) / by_slide.transform("size").to_numpy()[:, None]  # 0 to 1
    third = (3 * below).to_numpy().astype(int)
    place = spots["label"].astype(object).where(spots["label"].notna(), "tissue")
    said = [
        f"{where} with {NUCLEI[n]} nuclei on {BACKGROUND[g]} ground"
        for where, (n, g) in zip(place, third, strict=True)
    ]
    return pd.Series(said, index=spots.index, name="caption")


def caption(pairs: Pairs, context: int = 32) -> Pairs:
    """Give pairs their captions as second view: open_clip's tokens, int64 ``(n, context)``."""
    from open_clip import SimpleTokenizer

    said = describe(pairs.tiles, pairs.spots)
    tokens = SimpleTokenizer(context_length=context)(said.tolist()).numpy()
    spots = pairs.spots.assign(caption=said)
    return replace(pairs, other=tokens, spots=spots, panel=None)


def leave_out(
    adatas: Mapping[str, AnnData],
    donor: str,
    *,
    settings: Settings = SETTINGS,
    side_um: float = 100.0,
    device: str | torch.device | None = None,
    cache: bool = True,
) -> Fold:
    """Train the towers of a mini CLIP on tiles and captions of all donors but one.

    Parameters
    ----------
    adatas
        Slides from `helpers.genes.normalise`; their expression is not used.
    donor
        Whom to hold out.
    settings, side_um, device, cache
        As for `helpers.contrast.leave_out`.

    Raises
    ------
    DataError
        When no slide is of the donor, or no other is left.
    """
    donors = {slide: str(adata.obs["donor"].iloc[0]) for slide, adata in adatas.items()}
    if set(donors.values()) <= {donor} or donor not in donors.values():
        known = sorted(set(donors.values()))
        raise DataError(f"cannot hold out donor {donor!r} of {known}", fix="name one of several")
    cut = tiles.cut_study(adatas, side_um=side_um, cache=cache)
    pairs = contrast.pair(adatas, cut, None)
    train = caption(pairs.of([slide for slide, of in donors.items() if of != donor]))
    test = caption(pairs.of([slide for slide, of in donors.items() if of == donor]))
    contrast.check_apart(train, test, f"the held-out donor {donor}")
    clip, _ = towers.load_clip("mini", seed=settings.seed)
    clip.token_embedding.requires_grad_(False)  # two dozen words: random codes tell them apart
    image = towers.ImageTower(towers.card("mini"), clip.visual)
    before = contrast.TwoTowers(image, towers.TextTower(clip), settings)
    fitted = contrast.fit(before, train, None, settings, device=device, cache=cache)
    return Fold(donor, None, train, None, test, before, fitted)
