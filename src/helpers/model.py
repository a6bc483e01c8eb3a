"""What is trained, and how: settings, the two-tower model, its loss and its score."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import towers
from helpers.files import DataError
from helpers.pairs import Pairs

KS = (1, 5, 10)
"""Ranks at which recall is measured; the last one decides which epoch is the best."""
_AT_ONCE = 128  # rows, where nothing is trained; more are slower on a CPU


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training, but for the data and the initial weights.

    Attributes
    ----------
    epochs, batch_size
        Passes over the pairs, and pairs per step; each pair has the others as negatives.
    micro_batch
        Tiles in memory at once (gradient caching); None: the whole batch. The loss and its gradient
        stay the same; only dropout in the image tower is drawn part by part.
    same_slide
        Make every batch of one slide, so that knowing the slide does not help.
    optimiser, lr, betas, eps, weight_decay
        ``"adamw"``, which spares biases, norms and the temperature from decay; or ``"adam"``, with
        the same decay for all as part of the gradient.
    tower_lr
        Factor for the learning rate of the image tower, below 1 to go gently about its weights.
    warmup, schedule
        Share of all steps in which the rate climbs from 0; then ``"constant"``, or ``"cosine"``
        down to 0.
    dim
        Size of the shared space.
    encoder
        Kind of `helpers.towers.GeneTower`, where this module makes one.
    temperature, learn_temperature, max_scale
        Of the start; whether it is learned; and the largest 1 / temperature allowed, or None.
    augment, crop
        Strength of `helpers.pairs.augment`; 0: tiles as they are.
    train_blocks
        Blocks of the image tower that are trained, counted from its end; None: all of it.
    precision
        ``"fp32"``, ``"bf16"`` (autocast), or ``"auto"``: bf16 on GPUs that compute in it.
    keep, patience
        ``"best"``: keep the epoch of the best mean recall@10 in validation, and stop when it has
        not risen for `patience` epochs (None: do not stop). ``"last"``: the last, whatever
        validation says.
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
            if getattr(self, name) not in allowed:
                raise DataError(
                    f"{name} {getattr(self, name)!r} is unknown", fix=f"one of {allowed}"
                )
        if self.batch_size < 2:
            what = f"a batch of {self.batch_size} has no negatives: there is nothing to tell apart"
            raise DataError(what, fix="set batch_size to 2 or more, better hundreds")
        low = {"epochs": 1, "micro_batch": 1, "dim": 1, "patience": 1, "lr": 0, "temperature": 1e-6}
        for name, least in low.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"{name} is {value}", fix=f"set it to {least:g} or more")
        if self.patience is not None and self.keep == "last":
            what = "patience stops by validation, which keep='last' leaves out of account"
            raise DataError(what, fix="set keep='best' or patience=None")


BOOK = Settings()
"""What this book trains with."""

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
"""What Chen et al. 2024 trained with; they set no seed."""


class TwoTowers(nn.Module):
    """An image tower and a second one, each followed by a linear map into a shared space.

    Parameters
    ----------
    image
        Takes pixels ``(n, 3, h, h)`` in [0, 1], gives ``(n, image.width)``.
    other
        Takes rows of `Pairs.other`, gives ``(n, other.width)``. Where its width is `dim` already,
        it is its own map, as the paper's gene encoder is. An ``nn.Identity`` with a `width` takes
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
            own = other.width == settings.dim
            self.other_head = nn.Identity() if own else nn.Linear(other.width, settings.dim)
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
    2018. Knowing nothing costs ``log(n)``.

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


def recall(
    image: np.ndarray | Tensor, other: np.ndarray | Tensor, ks: Sequence[int] = KS
) -> pd.DataFrame:
    """How often the right partner is among the k nearest of all, both ways.

    Parameters
    ----------
    image, other
        Unit vectors ``(n, dim)``, row i of one belongs to row i of the other.
    ks
        How many of the nearest are looked at.

    Returns
    -------
    DataFrame
        One row per direction and k: `direction`, `k`, `recall`, `chance` (k / n) and
        `times_chance`. A tie counts against the model: one that sees no difference scores 0.

    Raises
    ------
    DataError
        When an embedding is not finite.
    """
    image, other = torch.as_tensor(image), torch.as_tensor(other)
    if not (torch.isfinite(image).all() and torch.isfinite(other).all()):
        raise DataError("embeddings hold NaN or infinite values", fix="look at the training loss")
    n, rows = len(image), []
    for direction, (ask, answer) in {
        "image to other": (image, other),
        "other to image": (other, image),
    }.items():
        rank = []
        for first in range(0, n, 1024):  # n x n numbers would not fit for a whole study
            near = ask[first : first + 1024] @ answer.T
            own = near.diagonal(first).unsqueeze(1)
            rank.append((near >= own).sum(1) - 1)
        rank = torch.cat(rank)
        for k in ks:
            share, chance = float((rank < k).float().mean()), min(k / n, 1.0)
            rows.append((direction, k, share, chance, share / chance))
    return pd.DataFrame(rows, columns=["direction", "k", "recall", "chance", "times_chance"])


def embed_pairs(
    model: TwoTowers,
    pairs: Pairs,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """Return the unit vectors of both views, float32 ``(n, dim)`` each, row by row.

    The model is moved to the device and used in eval mode; its own mode is left as it was.
    """
    device = choose_device(device)
    precision = choose_precision(precision, device)
    image, other = embed(model.to(device), pairs.tiles, pairs.other, precision)
    return image.cpu().numpy(), other.cpu().numpy()


def embed(
    model: TwoTowers, images: np.ndarray, other: np.ndarray, precision: str
) -> tuple[Tensor, Tensor]:
    """Embed tiles (or features of them) and rows of the second view, where the model is."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return (
            in_parts(lambda some: encode(model, some), images, model, precision),
            in_parts(model.embed_other, other, model, precision),
        )
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def in_parts(
    function: Callable[[Tensor], Tensor], rows: np.ndarray, model: TwoTowers, precision: str
) -> Tensor:
    """Apply a function to rows on the model's device, some at a time; float32 is returned."""
    device, parts = model.log_scale.device, []
    for first in range(0, len(rows), _AT_ONCE):
        some = torch.from_numpy(np.array(rows[first : first + _AT_ONCE])).to(device)
        with autocast(device, precision):
            parts.append(function(some).float())
    return torch.cat(parts)


def encode(model: TwoTowers, images: Tensor) -> Tensor:
    """Embed uint8 tiles or, where the tower has been through already, its features."""
    if images.dtype == torch.uint8:
        return model.embed_images(towers.as_pixels(images, images.device))
    return model.project(images)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Compute in bf16 within, where the precision says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for; when None, this process's GPU if there is one."""
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_precision(precision: str, device: torch.device) -> str:
    """Turn "auto" into a precision: bf16 is faster only where the hardware computes in it."""
    if precision != "auto":
        return precision
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if able else "fp32"
