"""A tower fitted anew within every fold, so that no fold is judged by what it was trained on.

The paper fine-tunes on all spots and probes some of them afterwards: the tower has seen the pairs
of the spots it is tested on. Here panel, scalers and weights come from the training spots of a
fold, and the features of all spots from the tower of that fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import nn

from helpers import contrast, genes, tiles, towers
from helpers.contrast import BOOK, Fitted, Settings
from helpers.files import DataError
from helpers.splits import Fold

if TYPE_CHECKING:
    from anndata import AnnData


def fit_fold(
    adatas: Mapping[str, AnnData],
    spots: pd.DataFrame,
    fold: Fold,
    *,
    tower: str | nn.Module = "mini",
    choose: Callable[..., genes.Panel] = genes.shared_hvg,
    n_genes: int = 256,
    settings: Settings = BOOK,
    side_um: float = 100.0,
    size: int = 96,
    device: str | torch.device | None = None,
    cache: bool = True,
) -> Fitted:
    """Fine-tune a tower on the training spots of a fold, and on nothing else.

    Of the other spots, only the names of the genes that their slides measured are used. A fold that
    holds a donor out gives the model of `helpers.contrast.leave_out`, found in the cache if it is
    there.

    Parameters
    ----------
    adatas
        Slides from `helpers.genes.normalise`.
    spots
        What was split, ``splits.spots``: its rows are counted by `fold`.
    fold
        Which rows to train on.
    tower, choose, n_genes, settings, side_um, size, device, cache
        As for `helpers.contrast.leave_out`.

    Raises
    ------
    DataError
        When a spot of the fold is on none of the slides, or training would see a tested spot.
    """
    parts, panel = training_panel(adatas, spots, fold, choose=choose, n_genes=n_genes)
    cut = tiles.cut_study(adatas, side_um=side_um, size=size, cache=cache)
    pairs = contrast.pair(parts, cut, panel, standardise=True)
    image = towers.load(tower, seed=settings.seed) if isinstance(tower, str) else tower
    other = towers.GeneTower(panel.genes, settings.encoder, width=settings.dim, seed=settings.seed)
    model = contrast.TwoTowers(image, other, settings)
    return contrast.fit(model, pairs, None, settings, device=device, cache=cache)


def training_panel(
    adatas: Mapping[str, AnnData],
    spots: pd.DataFrame,
    fold: Fold,
    *,
    choose: Callable[..., genes.Panel] = genes.shared_hvg,
    n_genes: int = 256,
) -> tuple[dict[str, AnnData], genes.Panel]:
    """Return the training spots of a fold, slide by slide, and a panel chosen on them alone.

    Parameters and errors as for `fit_fold`.
    """
    if both := set(fold.train) & set(fold.test):
        what = f"fold {fold.name!r} trains on {len(both)} spots that it tests"
        raise DataError(what, fix="take a split of helpers.splits")
    trained = {slide: rows.index for slide, rows in spots.iloc[fold.train].groupby("slide")}
    for slide, names in trained.items():
        if slide not in adatas or not names.isin(adatas[slide].obs_names).all():
            fix = "give the slides whose spots were split, with no spot left out"
            raise DataError("a spot of the fold is not among its spots", slide=slide, fix=fix)
    parts = {s: a[a.obs_names.isin(trained[s])] for s, a in adatas.items() if s in trained}
    shared = genes.shared_genes(adatas)
    return parts, choose({slide: part[:, shared] for slide, part in parts.items()}, n_genes)


def features(
    adatas: Mapping[str, AnnData], spots: pd.DataFrame, *, side_um: float = 100.0, **options
) -> Callable[[Fold], np.ndarray]:
    """Return a function that gives the features of all spots for a fold, for `evaluate.predict`.

    The tower is `fit_fold`'s; a probe is then trained on the features of the training spots.

    Parameters
    ----------
    adatas, spots, side_um, options
        As for `fit_fold`.

    Returns
    -------
    A function from a fold to float32 features ``(n, width)``, rows in the order of `spots`.
    """
    size, cache = options.get("size", 96), options.get("cache", True)

    def of(fold: Fold) -> np.ndarray:
        fitted = fit_fold(adatas, spots, fold, side_um=side_um, **options)
        cut = tiles.cut_study(adatas, side_um=side_um, size=size, cache=cache)
        array, device = of_spots(cut, spots), options.get("device")
        return towers.embed(fitted.model.image, array, device=device, cache=cache)

    return of


def of_spots(cut: tiles.Tiles, spots: pd.DataFrame) -> np.ndarray:
    """Return the tiles of spots, uint8 ``(n, size, size, 3)``, in the order of their table.

    Raises
    ------
    DataError
        Naming the first spot without a tile.
    """
    where = pd.Series(
        cut.index["row"].to_numpy(),
        pd.MultiIndex.from_arrays([cut.index["slide"], cut.index.index]),
    )
    row = where.reindex(pd.MultiIndex.from_arrays([spots["slide"], spots.index]))
    if row.isna().any():
        slide, spot = row.index[row.isna()][0]
        raise DataError(f"spot {spot} has no tile", slide=slide, fix='cut tiles with edge="pad"')
    return cut.array[row.to_numpy(int)]
