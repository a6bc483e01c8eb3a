"""Pairs of tiles and a second view, the two-tower model, its loss and its settings."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor, nn

from helpers import genes, towers
from helpers.files import DataError
from helpers.tiles import Tiles

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------- pairs


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
        The genes in the columns of `other`; None when they are not genes.

    Raises
    ------
    DataError
        When the three differ in length, or a value of `other` is NaN or infinite.
    """

    tiles: np.ndarray
    other: np.ndarray
    spots: pd.DataFrame
    panel: genes.Panel | None = None

    def __post_init__(self) -> None:
        if not len(self.tiles) == len(self.other) == len(self.spots):
            raise DataError(
                f"{len(self.tiles)} tiles, {len(self.other)} rows of the second view and "
                f"{len(self.spots)} spots cannot be paired",
                fix="use helpers.contrast.pair, which joins them by spot id",
            )
        if self.tiles.dtype != np.uint8 or self.other.dtype not in (np.float32, np.int64):
            what = f"tiles are {self.tiles.dtype} and the second view is {self.other.dtype}"
            raise DataError(what, fix="give uint8 tiles, and float32 expression or int64 tokens")
        if missing := sorted({"slide", "donor", "group"} - set(self.spots)):
            raise DataError(f"the table of spots lacks {missing}", fix="add these columns")
        if self.panel is not None and self.other.shape[1] != len(self.panel.genes):
            what = f"{self.other.shape[1]} columns for {len(self.panel.genes)} genes"
            raise DataError(what, fix="give the genes of the panel, in its order")
        bad = np.argwhere(~np.isfinite(self.other))
        if len(bad):
            row, column = bad[0]
            name = f"gene {self.panel.genes[column]}" if self.panel else f"column {column}"
            raise DataError(
                f"{len(np.unique(bad[:, 0]))} spots have NaN or infinite values; the first is spot "
                f"{self.spots.index[row]}, {name}",
                slide=str(self.spots["slide"].iloc[row]),
                fix="remove these spots, or find out where the values come from",
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
        Pairs. A run of neighbouring rows, such as one slide, is a view, not a copy.
        """
        wanted = np.asarray(which)
        if wanted.dtype.kind in "OUS":
            slides, names = self.spots["slide"].astype(str), wanted.astype(str)
            if unknown := sorted(set(names) - set(slides)):
                fix = f"choose among {sorted(set(slides))}"
                raise DataError(f"no pair comes from {list(map(str, unknown))}", fix=fix)
            wanted = slides.isin(names).to_numpy()
        rows = np.flatnonzero(wanted) if wanted.dtype == bool else wanted.astype(int)
        if not len(rows):
            raise DataError("no pair is selected", fix="check the selection")
        rows = _as_slice(rows)
        return Pairs(self.tiles[rows], self.other[rows], self.spots.iloc[rows], self.panel)


def _as_slice(rows: np.ndarray) -> np.ndarray | slice:
    """Turn neighbouring row numbers into a slice, so that an array is viewed, not copied."""
    return slice(rows[0], rows[-1] + 1) if (np.diff(rows) == 1).all() else rows


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
        Their tiles. Spots without a tile, tiles without a spot and tiles of other slides are left
        out.
    panel
        The genes. None: no second view yet, `other` has no columns.
    standardise
        Bring every gene to mean 0 and variance 1 within each slide, over the spots given. This
        removes the level by which slides differ (chemistry, depth); it uses no label.

    Returns
    -------
    Pairs, slides in the order given, spots of a slide in the order of the tiles.

    Raises
    ------
    DataError
        Naming the slide that is not normalised, lacks a gene of the panel, holds NaN, has no tile,
        or whose spots do not share one slide, donor and group.
    """
    if not adatas:
        raise DataError("there are no spots to pair", fix="give at least one slide")
    rows, views, tables = [], [], []
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
        table = pd.DataFrame({"slide": slide}, index=index.index)
        table["donor"], table["group"] = (_only(adata, key, slide) for key in ("donor", "group"))
        labels = adata.obs["label"] if "label" in adata.obs else pd.Series(index=adata.obs_names)
        table["label"] = labels.astype(object).reindex(index.index)
        view = np.empty((len(index), 0), np.float32)
        if panel is not None:
            view = genes.select(adata, panel).loc[index.index].to_numpy(np.float32)
        if standardise:
            spread = view.std(axis=0)  # a gene that is constant becomes 0
            view = (view - view.mean(axis=0)) / np.where(spread > 1e-6, spread, 1)
        rows.append(index["row"].to_numpy())
        views.append(view)
        tables.append(table.join(index[["x_px", "y_px"]]))
    tile_rows = _as_slice(np.concatenate(rows))  # a slice of the cache stays memory-mapped
    return Pairs(tiles.array[tile_rows], np.concatenate(views), pd.concat(tables), panel)


def _only(adata: AnnData, key: str, slide: str | None) -> str:
    """Return the one value of a column that all spots of a slide share."""
    values = adata.obs[key].unique() if key in adata.obs else []
    if len(values) != 1 or pd.isna(values[0]):
        raise DataError(
            f'obs["{key}"] must name one {key} for all spots, not {list(values)[:5]}',
            slide=slide,
            fix="load slides with helpers.slides, one AnnData each",
        )
    return str(values[0])


def check_apart(train: Pairs, held_out: Pairs, role: str = "validation") -> None:
    """Raise an error when training shares a slide, a group or a panel's choice with held-out pairs.

    Parameters
    ----------
    train, held_out
        Training pairs, and the pairs that must stay apart from them.
    role
        The purpose of `held_out`, for the message.

    Raises
    ------
    DataError
        Naming the slides, the group of adjacent sections, or the panel.
    """
    for key in ("slide", "group"):
        ours, theirs = (part.spots[key].astype(str) for part in (train, held_out))
        if both := sorted(set(ours) & set(theirs)):
            trained = sorted(set(train.spots.loc[ours.isin(both), "slide"]))
            kept = sorted(set(held_out.spots.loc[theirs.isin(both), "slide"]))
            raise DataError(
                f"training and {role} share the {key} {', '.join(both)}: slides {trained} are in "
                f"training, {kept} in {role}",
                fix="split by donor, or keep adjacent sections together",
            )
    names = [part.panel.genes if part.panel else None for part in (train, held_out)]
    if names[0] != names[1]:
        raise DataError(f"training and {role} have different genes", fix="use one panel for both")
    if train.panel is not None:
        genes.check_held_out(train.panel, held_out.spots["slide"].astype(str).unique())


# --------------------------------------------------------------------------- augmentation


NUMBERS = 19
"""Random numbers that `augment` uses for one tile."""


def augment(
    pixels: Tensor, random: torch.Generator | Tensor, strength: float = 1.0, crop: float = 0.0
) -> Tensor:
    """Show tiles as a different scanner, stain and orientation might have shown them.

    Each tile on its own is turned and mirrored (the 8 ways to lay a square, exactly, without
    resampling), its stains are changed and, where `crop` says so, a part of it is enlarged.

    Stains are changed in optical density, where they add up (Beer-Lambert): separated into
    hematoxylin, eosin and a rest with the vectors of Ruifrok and Johnston 2001 (scikit-image's),
    each amount scaled by up to 20 %, each stain's colour moved by up to 5 %, the illumination by
    up to 0.05, as in Tellez et al. 2018 (doi:10.1109/TMI.2018.2820199). Empty glass stays white
    but for the illumination.

    Parameters
    ----------
    pixels
        float ``(n, 3, h, h)`` in [0, 1], on any device.
    random
        A generator on the CPU, so that every device draws alike; or numbers drawn before,
        ``(n, NUMBERS)`` in [0, 1), by which a part of a batch is changed as in the whole batch.
    strength
        Factor for the changes of stain; 0, with `crop` 0, returns the tiles as they are.
    crop
        Largest share of the side that is cut off before the rest is enlarged (bilinear), 0 to 1.

    Returns
    -------
    Tensor of the same shape, in [0, 1].
    """
    if strength == 0 and crop == 0:
        return pixels
    if isinstance(random, torch.Generator):
        random = torch.rand(len(pixels), NUMBERS, generator=random)
    random = random.to(pixels.device, pixels.dtype)
    if strength:
        pixels = _restain(pixels, strength * (2 * random[:, 3:16] - 1))
    if crop:
        pixels = _enlarge(pixels, 1 - crop * random[:, 16], random[:, 17:])
    transpose, mirror, flip = (random[:, :3] < 0.5).T[..., None, None, None]
    pixels = torch.where(transpose, pixels.transpose(2, 3), pixels)
    pixels = torch.where(mirror, pixels.flip(3), pixels)
    return torch.where(flip, pixels.flip(2), pixels)


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
    zero = torch.zeros_like(side)
    matrix = torch.stack([side, zero, shift[:, 0], zero, side, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


# --------------------------------------------------------------------------- captions


NUCLEI_WORDS = ("few", "some", "many")
STAIN_WORDS = ("pale", "pink", "deep pink")


def captions(array: np.ndarray, spots: pd.DataFrame) -> pd.Series:
    """Write a caption for every tile.

    The mean amounts of hematoxylin and eosin (vectors of Ruifrok and Johnston 2001, on every
    second px) are ranked within each slide and cut into thirds, so that words mean the same on
    slides that were stained differently. The words for nuclei are a guess from the hematoxylin.

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
        When the numbers of tiles and spots differ.
    """
    if len(array) != len(spots):
        raise DataError(f"{len(array)} tiles and {len(spots)} spots", fix="give one tile per spot")
    density = -np.log10(np.maximum(array[:, ::2, ::2].astype(np.float32), 1) / 255).mean((1, 2))
    stains = density @ hed_from_rgb[:, :2].astype(np.float32)
    amounts = pd.DataFrame(stains, columns=["hematoxylin", "eosin"])
    by_slide = amounts.groupby(spots["slide"].astype(str).to_numpy())
    quantile = (by_slide.rank() - 0.5) / by_slide.transform("size").to_numpy()[:, None]
    thirds = (3 * quantile).to_numpy().astype(int)
    labels = spots["label"].astype(object).where(spots["label"].notna(), "tissue")
    sentences = [
        f"{label} with {NUCLEI_WORDS[nuclei]} nuclei on {STAIN_WORDS[stain]} ground"
        for label, (nuclei, stain) in zip(labels, thirds, strict=True)
    ]
    return pd.Series(sentences, index=spots.index, name="caption")


def with_captions(pairs: Pairs, context: int = 32) -> Pairs:
    """Give pairs their captions as second view: open_clip's tokens, int64 ``(n, context)``."""
    said = captions(pairs.tiles, pairs.spots)
    tokens = SimpleTokenizer(context_length=context)(said.tolist()).numpy()
    return replace(pairs, other=tokens, spots=pairs.spots.assign(caption=said), panel=None)


# --------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training, apart from the data and the initial weights.

    Attributes
    ----------
    epochs, batch_size
        Passes over the pairs, and pairs per step; each pair has the others as negatives.
    micro_batch
        Tiles in memory at once (gradient caching); None: the whole batch. The loss and its gradient
        stay the same; only dropout in the image tower is drawn part by part.
    same_slide
        Make every batch of one slide, so that recognising the slide does not help.
    optimiser, lr, betas, eps, weight_decay
        ``"adamw"``, which spares biases, norms and the temperature from decay; or ``"adam"``, with
        the same decay for all as part of the gradient.
    tower_lr
        Factor for the learning rate of the image tower; below 1, its weights change more slowly.
    warmup, schedule
        Share of all steps in which the rate climbs from 0; then ``"constant"``, or ``"cosine"``
        down to 0.
    dim
        Size of the shared space.
    encoder
        Kind of `helpers.towers.GeneTower`, for `helpers.training.leave_out`.
    temperature, learn_temperature, max_scale
        Temperature at the start; whether it is learned; the largest 1 / temperature, or None.
    augment, crop
        Strength and crop of `augment`; 0: tiles as they are.
    train_blocks
        Blocks of the image tower that are trained, counted from its end; None: all of it.
    precision
        ``"fp32"``, ``"bf16"`` (autocast), or ``"auto"``: bf16 on GPUs that compute in it.
    keep, patience
        ``"best"``: keep the epoch of the best mean recall@10 in validation, and stop when it has
        not risen for `patience` epochs (None: do not stop). ``"last"``: keep the last epoch.
    seed
        Of heads, order, augmentation and dropout.
    """

    epochs: int = 20
    batch_size: int = 32
    micro_batch: int | None = None
    same_slide: bool = False
    optimiser: str = "adamw"
    lr: float = 1e-3
    tower_lr: float = 0.5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.1
    warmup: float = 0.1
    schedule: str = "cosine"
    dim: int = 64
    encoder: str = "mlp"
    temperature: float = 0.07
    learn_temperature: bool = True
    max_scale: float | None = 100.0
    augment: float = 1.5
    crop: float = 0.0
    train_blocks: int | None = None
    precision: str = "auto"
    keep: str = "best"
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "optimiser": ("adam", "adamw"),
            "schedule": ("constant", "cosine"),
            "precision": ("auto", "bf16", "fp32"),
            "keep": ("best", "last"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise DataError(f"{name} {value!r} is unknown", fix=f"choose one of {allowed}")
        if self.batch_size < 2:
            what = f"a batch of {self.batch_size} has no negatives"
            raise DataError(what, fix="set batch_size to 2 or more, better to hundreds")
        low = {"epochs": 1, "micro_batch": 1, "dim": 1, "patience": 1, "lr": 0, "temperature": 1e-6}
        for name, least in low.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"{name} is {value}", fix=f"set it to {least:g} or more")
        if self.patience is not None and self.keep == "last":
            what = "patience needs keep='best': it stops when validation no longer improves"
            raise DataError(what, fix="set keep='best' or patience=None")


BOOK = Settings()
"""Settings of this book."""

FINE_TUNING = replace(BOOK, epochs=10, train_blocks=2)
"""For a tower that was trained before: its last two blocks alone, and fewer epochs.

Lower rates scored less on validation donors (``results/finetune.json``, question *how to tune*).
"""

CAPTION_SETTINGS = replace(BOOK, epochs=6, augment=0.1, keep="last")
"""Settings for captions: under a minute on two cores.

Tiles are turned and mirrored, but their stains hardly change: the captions describe them.
"""

PAPER = Settings(
    epochs=15,
    batch_size=1024,
    optimiser="adam",
    lr=5e-5,
    weight_decay=0.2,
    warmup=0.0,
    schedule="constant",
    dim=32,
    encoder="linear",
    max_scale=None,
    augment=0.0,
    tower_lr=1.0,
    precision="fp32",
    keep="last",
)
"""Settings of Chen et al. 2024, who set no seed."""


def settings_for(tower: str, seed: int = 0) -> Settings:
    """Return the settings of chapter 7 for a tower; without a validation donor, all its epochs.

    Parameters
    ----------
    tower
        A name that `helpers.towers.card` takes. A tower of random weights is trained whole
        (`BOOK`), any other as `FINE_TUNING` says.
    seed
        Of heads, order, augmentation and dropout.
    """
    chosen = BOOK if tower in towers.UNTRAINED else FINE_TUNING
    return replace(chosen, keep="last", seed=seed)


# --------------------------------------------------------------------------- model and loss


class TwoTowers(nn.Module):
    """An image tower and a second one, each followed by a linear map into a shared space.

    Parameters
    ----------
    image
        Takes pixels ``(n, 3, h, h)`` in [0, 1], gives ``(n, image.width)``.
    other
        Takes rows of `Pairs.other`, gives ``(n, other.width)``. Where its width is `dim` already,
        no map follows, as for the paper's gene encoder. An ``nn.Identity`` with a `width` takes
        features as they are.
    settings
        `dim`, `temperature`, `learn_temperature` and `seed` are used.

    Attributes
    ----------
    log_scale
        Logarithm of 1 / temperature, learned. `fit` keeps it under the settings' `max_scale`.
    """

    def __init__(self, image: nn.Module, other: nn.Module, settings: Settings = BOOK) -> None:
        super().__init__()
        self.image, self.other, self.dim = image, other, settings.dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.image_head = nn.Linear(image.width, settings.dim)
            fits = other.width == settings.dim
            self.other_head = nn.Identity() if fits else nn.Linear(other.width, settings.dim)
        start = torch.tensor(-math.log(settings.temperature))
        self.log_scale = nn.Parameter(start, requires_grad=settings.learn_temperature)

    @property
    def scale(self) -> Tensor:
        """1 / temperature."""
        return self.log_scale.exp()

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Turn pixels ``(n, 3, h, h)`` in [0, 1] into unit vectors, float32 ``(n, dim)``."""
        return self.project(self.image(pixels))

    def project(self, features: Tensor) -> Tensor:
        """Turn features of the image tower into unit vectors, float32 ``(n, dim)``."""
        return F.normalize(self.image_head(features).float(), dim=-1)

    def embed_other(self, rows: Tensor) -> Tensor:
        """Turn rows of the second view into unit vectors, float32 ``(n, dim)``."""
        return F.normalize(self.other_head(self.other(rows)).float(), dim=-1)


def info_nce(image: Tensor, other: Tensor, scale: Tensor | float) -> Tensor:
    """Loss of telling, in a batch, which tile belongs to which row, both ways.

    The symmetric cross-entropy of Radford et al. 2021 (CLIP), after InfoNCE of van den Oord et al.
    2018. A guess at random costs ``log(n)``.

    Parameters
    ----------
    image, other
        Unit vectors ``(n, dim)``, row i of one belongs to row i of the other.
    scale
        1 / temperature.
    """
    logits = scale * image @ other.T
    right = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


# --------------------------------------------------------------------------- embedding pairs


def embed_pairs(
    model: TwoTowers,
    pairs: Pairs,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """Return the unit vectors of both views, float32 ``(n, dim)`` each, row by row.

    `helpers.towers.embed` gives the features of a tower instead, before the map into the shared
    space. The model is moved to the device and used in eval mode; its own mode is restored.
    """
    device = choose_device(device)
    precision = choose_precision(precision, device)
    model, training = model.to(device).eval(), model.training
    try:
        image, other = embed_rows(model, pairs.tiles, pairs.other, precision)
    finally:
        model.train(training)
    return image.cpu().numpy(), other.cpu().numpy()


@torch.no_grad()
def embed_rows(
    model: TwoTowers, images: np.ndarray, other: np.ndarray, precision: str
) -> tuple[Tensor, Tensor]:
    """Return the unit vectors of both views, float32 ``(n, dim)``; the model's mode counts.

    `images` are uint8 tiles, or features that the image tower gave for them.
    """
    device, parts = model.log_scale.device, []
    for first in range(0, len(images), 128):  # more at once are slower on a CPU
        some, rows = (
            torch.from_numpy(np.array(view[first : first + 128])).to(device)
            for view in (images, other)
        )
        with autocast(device, precision):
            if some.dtype == torch.uint8:
                image = model.embed_images(towers.as_pixels(some, device))
            else:
                image = model.project(some)
            parts.append((image, model.embed_other(rows)))
    return tuple(torch.cat(view) for view in zip(*parts, strict=True))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Compute in bf16 inside this context if the precision is ``"bf16"``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for; when None, this process's GPU if there is one."""
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_precision(precision: str, device: torch.device) -> str:
    """Replace ``"auto"`` by a precision: bf16 is faster only where the hardware computes in it."""
    if precision != "auto":
        return precision
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if able else "fp32"
