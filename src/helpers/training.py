"""Two towers brought together: the model, the loss, and one `fit` for laptop, GPU and torchrun.

`fit` is a function of initial weights, data and settings alone: every random number is drawn from
the seed, the epoch and the step. So a result is looked up instead of computed twice, and a training
that was killed goes on where it stood, to the same weights.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from tqdm import tqdm

from helpers import contrast, genes, tiles, towers
from helpers.contrast import (
    BOOK,
    NUMBERS,
    Pairs,
    Settings,
    TwoTowers,
    augmented,
    autocast,
    check_apart,
    choose_device,
    choose_precision,
    embed_views,
    info_nce,
    pair,
)
from helpers.files import DataError, atomic, cache_dir, digest, progress
from helpers.metrics import KS, recall
from helpers.splits import Fold
from helpers.towers import hashed

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

_VERSION = 1  # of what `fit` computes; a new one makes every cached model stale


@dataclass(frozen=True)
class Fitted:
    """A trained model and how it got there.

    Attributes
    ----------
    model
        In eval mode, with the weights of `best_epoch`.
    history
        One row per measurement: `epoch`, `split` (``"train"``, ``"validation"``), `measure`
        (``"loss"``, ``"recall"``, ``"temperature"``, ``"learning rate"``, ``"seconds"``,
        ``"tiles per second"``), `direction` and `k` and `chance` of a recall, `value`. Epoch 0 is
        before training.
    best_epoch
        The epoch that was kept.
    folder
        Where it lies in the cache; None when it does not.
    """

    model: TwoTowers
    history: pd.DataFrame
    best_epoch: int
    folder: Path | None


def fit(
    model: TwoTowers,
    train: Pairs,
    validation: Pairs | None = None,
    settings: Settings = BOOK,
    *,
    device: str | torch.device | None = None,
    cache: bool = True,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
) -> Fitted:
    """Train two towers to find each other's rows.

    The result is a function of the model's weights, the pairs and the settings. It is kept in the
    cache and read back when the same is asked for again; a training that was cut off goes on from
    its last checkpoint. Under torchrun, every process takes its share of each batch.

    Parameters
    ----------
    model
        Where to start; left as it is.
    train, validation
        Pairs with no slide, no group of adjacent sections and no other panel in common. A tower
        with `set_scale` learns the scale of the second view, from `train` alone.
    settings
        How to train.
    device
        ``"cuda"`` if there is one, else ``"cpu"``, when None.
    cache
        Look the result up and keep it.
    on_epoch
        Called with the history after every epoch, for a live curve; once when read back.

    Returns
    -------
    Fitted

    Raises
    ------
    DataError
        When training and validation are not apart; the loss is no number any more; memory runs
        out; or what lies in the cache is damaged.
    """
    rank, _ = ranks()
    device = choose_device(device)
    settings = replace(settings, precision=choose_precision(settings.precision, device))
    _check(model, train, validation, settings)
    key = share(_key(model, train, validation, settings)) if cache else None
    folder = cache_dir() / "models" / key if cache else None
    if folder is not None and share((folder / "model.safetensors").exists()):
        return _read(folder, model, device, on_epoch)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # the caller's random numbers stay as they were
        try:
            run = Run(model, train, validation, settings, device)
            if folder is not None and share((folder / "checkpoint.pt").exists()):
                run.load(folder / "checkpoint.pt", key)
            run.go(folder, key, on_epoch if rank == 0 else None)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            micro, batch = settings.micro_batch, settings.batch_size
            raise DataError(
                f"the memory of {device} does not hold a training step (micro_batch={micro}, "
                f"batch_size={batch})",
                fix=f"set micro_batch={max(1, min(micro or batch, batch) // 4)}, which takes "
                "the same steps with less memory; should that not help, lower batch_size, which "
                "gives another result",
            ) from error
    epoch = run.keep()
    fitted = Fitted(run.model, run.history(), epoch, folder)
    if folder is not None and rank == 0:
        _write(folder, key, fitted, settings, (train, validation))
    return fitted


def _out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)  # as torch says on a CPU


def _check(model: TwoTowers, train: Pairs, validation: Pairs | None, settings: Settings) -> None:
    """Refuse what cannot be trained, or only with a leak."""
    if len(train) < 2:
        raise DataError(f"{len(train)} pair to train on has no negatives", fix="give more pairs")
    if model.dim != settings.dim:
        what = f"the model has dim {model.dim}, the settings have {settings.dim}"
        raise DataError(what, fix="build TwoTowers with the settings it is trained with")
    named = getattr(model.other, "genes", None)
    if named is not None and train.panel is not None and tuple(named) != train.panel.genes:
        what = f"the gene tower and panel {train.panel.name!r} name other genes"
        raise DataError(what, fix="build GeneTower with panel.genes")
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.image.modules())
    if normed and (settings.micro_batch or ranks()[1] > 1):
        what = "this image tower has batch norm, which would see parts of a batch instead of all"
        fix = "set micro_batch=None in a single process, or take a tower with layer norm"
        raise DataError(what, fix=fix)
    if validation is not None:
        check_apart(train, validation)
        if len(validation) <= KS[-1]:
            what = f"among {len(validation)} pairs of validation, recall@{KS[-1]} says nothing"
            raise DataError(what, fix="validate on more pairs, or on none")
    elif settings.patience is not None:
        raise DataError("patience without validation", fix="give validation, or patience=None")


def _key(model: TwoTowers, train: Pairs, validation: Pairs | None, settings: Settings) -> str:
    """Return what stands for settings, initial weights and data."""
    state = {**dict(model.named_buffers()), **model.state_dict()}
    return digest(
        version=_VERSION,
        settings=asdict(settings),
        architecture=f"{model!r} {getattr(model.image, 'card', None)}",
        trainable=[name for name, p in model.named_parameters() if p.requires_grad],
        weights=hashed(x for item in state.items() for x in item),
        data=[
            hashed([p.tiles, p.other, *p.spots.index, *p.spots["slide"], *_names(p)])
            for p in (train, validation)
            if p is not None
        ],
    )


def _names(pairs: Pairs) -> tuple[str, ...]:
    return () if pairs.panel is None else pairs.panel.genes


def _write(
    folder: Path, key: str, fitted: Fitted, settings: Settings, data: tuple[Pairs, Pairs | None]
) -> None:
    """Keep a result: the weights come last, and with them it counts as finished."""
    facts = {"key": key, "best_epoch": fitted.best_epoch, "settings": asdict(settings)}
    slides = {str(s) for pairs in data if pairs is not None for s in pairs.spots["slide"]}
    facts["slides"] = sorted(slides)  # tools/workshop.py asks which study a model is of
    with atomic(folder / "history.csv") as temporary:
        fitted.history.to_csv(temporary, index=False)
    with atomic(folder / "settings.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1))
    weights = {name: value.contiguous() for name, value in fitted.model.state_dict().items()}
    with atomic(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, {"key": key})
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def _read(
    folder: Path,
    model: TwoTowers,
    device: torch.device,
    on_epoch: Callable[[pd.DataFrame], None] | None,
) -> Fitted:
    """Read a finished training back."""
    path = folder / "model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            key, weights = file.metadata()["key"], {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        facts = json.loads((folder / "settings.json").read_text())
        history = pd.read_csv(folder / "history.csv", float_precision="round_trip")
        history["direction"] = history["direction"].fillna("")
        best = int(facts["best_epoch"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        fix = f"delete the folder {folder} to train again"
        raise DataError(f"the model kept here is damaged ({error})", file=path, fix=fix) from error
    if {key, facts["key"]} != {folder.name}:
        fix = f"delete the folder {folder} to train again"
        raise DataError("the model kept here is of another training", file=path, fix=fix)
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    logger.info("the trained model is read from %s", folder)
    if on_epoch is not None and ranks()[0] == 0:
        on_epoch(history)
    return Fitted(model.to(device).eval(), history, best, folder)


@dataclass(frozen=True)
class HeldOut:
    """A model trained without one donor, and what it was trained and is tested on.

    Attributes
    ----------
    donor
        Who was held out.
    panel
        Genes, chosen on the training slides; None where the second view holds none.
    train, validation, test
        Pairs of the other donors, of those kept to validate on (or None), and of the donor.
    before, fitted
        The model before training, and after.
    """

    donor: str
    panel: genes.Panel | None
    train: Pairs
    validation: Pairs | None
    test: Pairs
    before: TwoTowers
    fitted: Fitted


def leave_donor_out(
    adatas: Mapping[str, AnnData],
    donor: str,
    *,
    validation: str | None = None,
    tower: str | nn.Module = "mini",
    choose: Callable[..., genes.Panel] | genes.Panel = genes.shared_hvg,
    n_genes: int = 256,
    standardise: bool = True,
    settings: Settings = BOOK,
    side_um: float = 100.0,
    size: int = 96,
    edge: str = "pad",
    device: str | torch.device | None = None,
    cache: bool = True,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
) -> HeldOut:
    """Train on all donors but one.

    Nothing of the donor reaches training but the *names* of the genes that its slides measured:
    panel, scaler and weights come from the others.

    Parameters
    ----------
    adatas
        Slides from `helpers.genes.normalise`.
    donor
        Whom to hold out.
    validation
        Another donor, whom to validate on; None: nobody, the last epoch is kept.
    tower
        A name for `helpers.towers.load`, or a tower.
    choose, n_genes
        How to choose the panel, from slides and a number of genes; or a panel, which is refused
        if it was chosen with a slide held out.
    standardise
        As for `pair`.
    settings, device, cache, on_epoch
        As for `fit`.
    side_um, size, edge
        As for `helpers.tiles.cut_study`.

    Raises
    ------
    DataError
        When no slide is of the donor, or something of the donor would leak.
    """
    donors = {slide: str(adata.obs["donor"].iloc[0]) for slide, adata in adatas.items()}
    for name in (donor, validation):
        if name is not None and name not in donors.values():
            fix = f"one of {sorted(set(donors.values()))}"
            raise DataError(f"no slide is of donor {name!r}", fix=fix)
    if donor == validation:
        what = f"donor {donor!r} cannot be held out and choose the best epoch"
        raise DataError(what, fix="validate on another donor, or on none")
    training = {s: a for s, a in adatas.items() if donors[s] not in (donor, validation)}
    if not training:
        raise DataError(f"all slides are of donor {donor!r}", fix="give slides of other donors")
    if isinstance(choose, genes.Panel):
        panel = choose
    else:
        shared = genes.shared_genes(adatas)
        panel = choose({s: a[:, shared] for s, a in training.items()}, n_genes)
    cut = tiles.cut_study(adatas, side_um=side_um, size=size, edge=edge, cache=cache)
    pairs = pair(adatas, cut, panel, standardise=standardise)

    def of(some: Callable[[str], bool]) -> Pairs:
        return pairs.of([slide for slide, name in donors.items() if some(name)])

    train, test = of(lambda name: name not in (donor, validation)), of(lambda name: name == donor)
    check_apart(train, test, f"the held-out donor {donor}")
    watched = None if validation is None else of(lambda name: name == validation)
    if watched is not None:
        check_apart(watched, test, f"the held-out donor {donor}")
    image = towers.load(tower, seed=settings.seed) if isinstance(tower, str) else tower
    other = towers.GeneTower(panel.genes, settings.encoder, width=settings.dim, seed=settings.seed)
    before = TwoTowers(image, other, settings)
    fitted = fit(before, train, watched, settings, device=device, cache=cache, on_epoch=on_epoch)
    return HeldOut(donor, panel, train, watched, test, before, fitted)


# --------------------------------------------------------------------------- without these spots


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
    holds a donor out gives the model of `leave_donor_out`, from the cache where it is there.

    Parameters
    ----------
    adatas
        Slides from `helpers.genes.normalise`.
    spots
        What was split, ``splits.spots``: its rows are counted by `fold`.
    fold
        Which rows to train on.
    tower, choose, n_genes, settings, side_um, size, device, cache
        As for `helpers.training.leave_donor_out`.

    Raises
    ------
    DataError
        When a spot of the fold is on none of the slides, or training would see a tested spot.
    """
    parts, panel = training_panel(adatas, spots, fold, choose=choose, n_genes=n_genes)
    cut = tiles.cut_study(adatas, side_um=side_um, size=size, cache=cache)
    pairs = pair(parts, cut, panel, standardise=True)
    image = towers.load(tower, seed=settings.seed) if isinstance(tower, str) else tower
    other = towers.GeneTower(panel.genes, settings.encoder, width=settings.dim, seed=settings.seed)
    model = TwoTowers(image, other, settings)
    return fit(model, pairs, None, settings, device=device, cache=cache)


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


def features_by_fold(
    adatas: Mapping[str, AnnData], spots: pd.DataFrame, *, side_um: float = 100.0, **options
) -> Callable[[Fold], np.ndarray]:
    """Return a function that gives the features of all spots for a fold, for `probing.predict`.

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
        array, device = tiles.of_spots(cut, spots), options.get("device")
        return towers.embed(fitted.model.image, array, device=device, cache=cache)

    return of


CAPTION_SETTINGS = replace(BOOK, epochs=6, augment=0.1, keep="last")
"""What the captions are trained with: under a minute on two cores.

Tiles are turned and mirrored, but their stains are hardly changed: the captions speak of them.
"""


def leave_donor_out_captions(
    adatas: Mapping[str, AnnData],
    donor: str,
    *,
    settings: Settings = CAPTION_SETTINGS,
    side_um: float = 100.0,
    device: str | torch.device | None = None,
    cache: bool = True,
) -> HeldOut:
    """Train the towers of a mini CLIP on tiles and captions of all donors but one.

    Parameters
    ----------
    adatas
        Slides from `helpers.genes.normalise`; their expression is not used.
    donor
        Whom to hold out.
    settings, side_um, device, cache
        As for `helpers.training.leave_donor_out`.

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
    pairs = pair(adatas, cut, None)
    train = contrast.with_captions(pairs.of([slide for slide, of in donors.items() if of != donor]))
    test = contrast.with_captions(pairs.of([slide for slide, of in donors.items() if of == donor]))
    check_apart(train, test, f"the held-out donor {donor}")
    clip, _ = towers.load_clip("mini", seed=settings.seed)
    clip.token_embedding.requires_grad_(False)  # two dozen words: random codes tell them apart
    image = towers.ImageTower(towers.card("mini"), clip.visual)
    before = TwoTowers(image, towers.TextTower(clip), settings)
    fitted = fit(before, train, None, settings, device=device, cache=cache)
    return HeldOut(donor, None, train, None, test, before, fitted)


# --------------------------------------------------------------------------- one training


SAVE_SECONDS = 15.0
"""A checkpoint is written after the first epoch that ends this long after the one before."""


class Run:
    """A training under way: all that changes, so that it can be put down and taken up again."""

    def __init__(
        self,
        model: TwoTowers,
        train: Pairs,
        validation: Pairs | None,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self.settings, self.device = settings, device
        self.rank, self.world = ranks()
        self.train, self.validation = train, validation
        self.model = copy.deepcopy(model)
        if settings.train_blocks is not None:
            towers.freeze(self.model.image, settings.train_blocks)
        if hasattr(self.model.other, "set_scale"):
            self.model.other.set_scale(train.other)
        self.model.to(device)
        if device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)
        self.images = train.tiles
        self.watched = None if validation is None else validation.tiles
        if not any(p.requires_grad for p in self.model.image.parameters()):
            self._features_once()
        self.optimiser = _optimiser(self.model, settings)
        self.slides = train.spots["slide"].astype(str).to_numpy()
        self.steps = len(_batches(self.slides, settings, 1, self.world))
        if self.steps == 0:
            what = f"{len(train)} pairs make no batch of two or more"
            raise DataError(what, fix="give more pairs, or set same_slide=False")
        self.epoch, self.rows = 0, []
        self.best, self.best_epoch, self.best_value = None, 0, -1.0

    def _features_once(self) -> None:
        """Replace tiles by their features, where neither the tower nor the tile will change."""
        tower = self.model.image.eval()
        with autocast(self.device, self.settings.precision):
            if not (self.settings.augment or self.settings.crop):
                self.images = towers.embed(tower, self.images, device=self.device)
            if self.watched is not None:
                self.watched = towers.embed(tower, self.watched, device=self.device)

    def go(
        self,
        folder: Path | None,
        key: str | None,
        on_epoch: Callable[[pd.DataFrame], None] | None,
    ) -> None:
        """Train until the last epoch, or until validation says to stop."""
        settings, saved = self.settings, time.monotonic()
        if self.epoch == 0:
            self._measure()
        total, done = settings.epochs * self.steps, self.epoch * self.steps
        show = {"desc": "training", "unit": "step", "disable": self.rank > 0}
        with progress(total=total, initial=done, **show) as bar:
            while self.epoch < settings.epochs and not self._stale():
                self.epoch += 1
                self._one_epoch(bar)
                self._measure()
                bar.set_postfix_str(self._in_short())
                due = time.monotonic() - saved > SAVE_SECONDS
                if folder is not None and self.rank == 0 and due:
                    self.save(folder / "checkpoint.pt", key)
                    saved = time.monotonic()
                if on_epoch is not None:
                    on_epoch(self.history())

    def _stale(self) -> bool:
        patience = self.settings.patience
        return (
            patience is not None
            and self.validation is not None
            and self.epoch - self.best_epoch >= patience
        )

    def _one_epoch(self, bar: tqdm) -> None:
        settings, begin, losses = self.settings, time.perf_counter(), []
        self.model.train()
        for module in self.model.modules():  # what is frozen behaves as it does in use
            trained = [p.requires_grad for p in module.parameters()]
            if trained and not any(trained):
                module.eval()
        batches = _batches(self.slides, settings, self.epoch, self.world)
        for step, batch in enumerate(_ahead(self._load, list(enumerate(batches)))):
            rate = _rate((self.epoch - 1) * self.steps + step, self.steps, settings)
            for group in self.optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            losses.append(self._step(batch, (settings.seed, self.epoch, step, 1 + self.rank)))
            bar.update()
        losses = self._mean(torch.stack(losses))
        if not torch.isfinite(losses).all():
            first = int((~torch.isfinite(losses)).float().argmax()) + 1
            raise DataError(
                f"the loss is no number any more: epoch {self.epoch}, step {first} of {self.steps}",
                fix="lower lr, lengthen warmup, keep max_scale, and look for outliers in the data",
            )
        seconds = time.perf_counter() - begin
        for measure, value in {
            "loss": float(losses.mean()),
            "temperature": 1 / float(self.model.scale.detach()),
            "learning rate": rate,
            "seconds": seconds,
            "tiles per second": sum(map(len, batches)) / seconds,
        }.items():
            self._note("train", measure, value)

    def _load(self, item: tuple[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Fetch this process's share of a batch: tiles, second view, numbers to augment by."""
        step, rows = item
        draw = torch.Generator().manual_seed(_seed(self.settings.seed, self.epoch, step, 0))
        numbers = torch.rand(len(rows), NUMBERS, generator=draw)[self.rank :: self.world]
        rows = rows[self.rank :: self.world].numpy()
        views = (np.take(view, rows, axis=0) for view in (self.images, self.train.other))
        loaded = (*map(torch.from_numpy, views), numbers)
        return tuple(x.pin_memory() for x in loaded) if self.device.type == "cuda" else loaded

    def _step(self, batch: tuple[Tensor, Tensor, Tensor], noise: tuple[int, ...]) -> Tensor:
        """Take one step; return the loss.

        With micro-batches (Gao et al. 2021, arXiv:2101.06983): embed all parts without keeping
        what is needed to differentiate, find the gradient of the loss at the embeddings, then
        embed part by part again and pass that gradient on. The second tower takes little memory
        and sees the batch whole.
        """
        images, other, numbers = (x.to(self.device, non_blocking=True) for x in batch)
        chunk = self.settings.micro_batch or len(images)
        parts = [slice(i, i + chunk) for i in range(0, len(images), chunk)]

        def embed_part(part: slice) -> Tensor:
            torch.manual_seed(_seed(*noise, 1 + part.start))  # the same dropout both times
            some = images[part]
            tower = self.model.project
            if some.dtype == torch.uint8:
                how = numbers[part], self.settings.augment, self.settings.crop
                some, tower = towers.as_pixels(some, self.device), self.model.embed_images
                some = augmented(some, *how)
            with autocast(self.device, self.settings.precision):
                return tower(some)

        torch.manual_seed(_seed(*noise, 0))
        with autocast(self.device, self.settings.precision):
            second = self.model.embed_other(other)
        if len(parts) == 1:
            first = embed_part(parts[0])
        else:
            with torch.no_grad():
                first = torch.cat([embed_part(part) for part in parts])
            first.requires_grad_()
        loss = self._loss(first, second)
        self.optimiser.zero_grad()
        loss.backward()
        if len(parts) > 1:
            for part in parts:
                embed_part(part).backward(first.grad[part])
        for group in self.optimiser.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._mean(parameter.grad)
        self.optimiser.step()
        if self.settings.max_scale is not None:
            self.model.log_scale.data.clamp_(max=math.log(self.settings.max_scale))
        return loss.detach()

    def _loss(self, first: Tensor, second: Tensor) -> Tensor:
        if self.world == 1:
            return info_nce(first, second, self.model.scale)
        from open_clip.loss import ClipLoss

        loss = ClipLoss(True, True, rank=self.rank, world_size=self.world)
        return loss(first, second, self.model.scale)

    def _mean(self, values: Tensor) -> Tensor:
        """Average over processes, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
            values /= self.world
        return values

    def _measure(self) -> None:
        """Note loss and recall in validation; keep the weights when they are the best so far."""
        rows, start = None, len(self.rows)
        if self.validation is not None and self.rank == 0:
            views = self.watched, self.validation.other
            image, other = embed_views(self.model, *views, self.settings.precision)
            self._note("validation", "loss", self._validation_loss(image, other))
            for row in recall(image, other).to_dict("records"):
                where = {name: row[name] for name in ("direction", "k", "chance")}
                self._note("validation", "recall", row["recall"], **where)
            rows = self.rows[start:]
        rows = share(rows)
        if rows is None or self.epoch == 0:
            self.rows[start:] = rows or []
            return
        self.rows[start:] = rows
        value = np.mean([r["value"] for r in rows if r["measure"] == "recall" and r["k"] == KS[-1]])
        if self.settings.keep == "best" and value > self.best_value:
            self.best_value, self.best_epoch = float(value), self.epoch
            self.best = copy.deepcopy(self.model.state_dict())

    def _validation_loss(self, image: Tensor, other: Tensor) -> float:
        """Mean over batches as large as in training: the loss depends on how many there are."""
        whole = np.zeros(len(image))
        batches = _batches(whole, replace(self.settings, same_slide=False), 0, 1)
        with torch.no_grad():
            each = [info_nce(image[rows], other[rows], self.model.scale) for rows in batches]
        return float(torch.stack(each).mean())

    def _note(self, split: str, measure: str, value: float, **where: object) -> None:
        place = {"direction": "", "k": None, "chance": None, **where}
        row = {"epoch": self.epoch, "split": split, "measure": measure, **place, "value": value}
        self.rows.append(row)

    def history(self) -> pd.DataFrame:
        """Return what was measured so far; see `Fitted`."""
        return pd.DataFrame(self.rows).astype({"k": float, "chance": float})

    def _in_short(self) -> str:
        now = [r for r in self.rows if r["epoch"] == self.epoch]
        loss = next(r["value"] for r in now if r["measure"] == "loss")
        found = [r["value"] for r in now if r["measure"] == "recall" and r["k"] == KS[-1]]
        score = f", recall@{KS[-1]} {np.mean(found):.3f}" if found else ""
        return f"epoch {self.epoch}/{self.settings.epochs}, loss {loss:.3f}{score}"

    def keep(self) -> int:
        """Give the model the weights to keep, in eval mode, and return their epoch."""
        self.model.eval()
        if self.best is None:
            return self.epoch
        self.model.load_state_dict(self.best)
        return self.best_epoch

    def save(self, path: Path, key: str) -> None:
        """Write all that is needed to go on."""
        state = {
            "key": key,
            "settings": json.dumps(asdict(self.settings)),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            **{name: getattr(self, name) for name in _PROGRESS},
        }
        with atomic(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path, key: str) -> None:
        """Go on from a checkpoint, the same in every process."""
        state = share(read_checkpoint(path, key, self.settings) if self.rank == 0 else None)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name in _PROGRESS:
            setattr(self, name, state[name])
        logger.info("training goes on after epoch %d: %s", self.epoch, path)


_PROGRESS = ("epoch", "rows", "best", "best_epoch", "best_value")


def read_checkpoint(path: Path, key: str, settings: Settings) -> dict:
    """Read a checkpoint, never as a pickle; refuse one that is damaged or of another training."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        other, written = state["key"], json.loads(state["settings"])
    except Exception as error:  # at damaged bytes torch throws a dozen kinds
        raise DataError(
            f"the checkpoint cannot be read ({type(error).__name__}: {error})".split("\n")[0],
            file=path,
            fix="delete the file to train from the start",
        ) from error
    if other != key:
        mine = json.loads(json.dumps(asdict(settings)))
        differ = [
            f"{k} {written.get(k)!r}, now {v!r}" for k, v in mine.items() if written.get(k) != v
        ]
        raise DataError(
            "the checkpoint is of another training: "
            + ("; ".join(differ) or "other data or initial weights"),
            file=path,
            fix="delete the file, which does not belong here, to train from the start",
        )
    return state


def _seed(*numbers: int) -> int:
    """Mix numbers into one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _rate(step: int, per_epoch: int, settings: Settings) -> float:
    """Learning rate of a step, counted from 0."""
    steps = per_epoch * settings.epochs
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _batches(slides: np.ndarray, settings: Settings, epoch: int, world: int) -> list[Tensor]:
    """Rows of each batch of an epoch, in a random order that only seed and epoch decide.

    A last batch of less than half the size is left out, unless it is the only one: with fewer
    negatives it would be an easier task. Several processes must get equal shares: up to
    ``world - 1`` rows of a batch are left out for that.
    """
    draw = torch.Generator().manual_seed(_seed(settings.seed, epoch))
    names = np.unique(slides) if settings.same_slide else [None]
    batches = []
    for name in names:
        rows = np.arange(len(slides)) if name is None else np.flatnonzero(slides == name)
        rows = torch.from_numpy(rows)[torch.randperm(len(rows), generator=draw)]
        parts = list(rows.split(settings.batch_size))
        if len(parts) > 1 and 2 * len(parts[-1]) < settings.batch_size:
            parts.pop()
        parts = [part[: len(part) // world * world] for part in parts]
        batches += [part for part in parts if len(part) > 1]
    if settings.same_slide:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=draw)]
    return batches


def _ahead(load: Callable, items: Iterable) -> Iterator:
    """Load the next two items in threads while the last one is worked on."""
    with ThreadPoolExecutor(2) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _optimiser(model: TwoTowers, settings: Settings) -> torch.optim.Optimizer:
    """Adam or AdamW; weights decay, but under AdamW no bias, norm or temperature does."""
    tower = set(model.image.parameters())
    groups: dict[tuple, list] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 or settings.optimiser == "adam"
            factor = settings.tower_lr if parameter in tower else 1.0
            groups.setdefault((decays, factor), []).append(parameter)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimiser]
    return kind(
        [
            {"params": some, "weight_decay": settings.weight_decay * decays, "factor": factor}
            for (decays, factor), some in groups.items()
        ],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,  # one pass over the weights instead of a dozen
    )


# --------------------------------------------------------------------------- several processes


def ranks() -> tuple[int, int]:
    """Return the number of this process and how many there are; join them under torchrun."""
    if not distributed.is_available():
        return 0, 1
    if not distributed.is_initialized():
        if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
            return 0, 1
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


def share(value: object) -> object:
    """Give every process what the first one has."""
    if ranks()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]
