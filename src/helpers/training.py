"""Training two towers: one `fit` for laptop, GPU and torchrun, and `leave_out` for honest tests.

`fit` is a function of initial weights, data and settings alone: every random number is drawn from
the seed, the epoch and the step. So a result can be read back instead of computed twice, and a
training that was killed resumes from its checkpoint and ends with the same weights.
"""

from __future__ import annotations

import contextlib
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
from helpers.contrast import BOOK, CAPTION_SETTINGS, Pairs, Settings, TwoTowers, autocast, info_nce
from helpers.files import DataError, atomic, cache_dir, digest, progress
from helpers.metrics import KS, recall
from helpers.splits import Fold

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

SAVE_SECONDS = 15.0
"""A checkpoint is written after the first epoch that ends this long after the one before."""

_VERSION = 1  # of what `fit` computes; a new one makes every cached model stale
_PROGRESS = ("epoch", "rows", "best", "best_epoch", "best_value")  # of a run, in its checkpoint


# --------------------------------------------------------------------------- one training


class Run:
    """A training in progress: everything that changes, so that it can stop and resume."""

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
        self._choose_images()
        self.optimiser = _optimiser(self.model, settings)
        self.slides = train.spots["slide"].astype(str).to_numpy()
        self.steps = len(_batches(self.slides, settings, 1, self.world))
        if self.steps == 0:
            what = f"{len(train)} pairs make no batch of two or more"
            raise DataError(what, fix="give more pairs, or set same_slide=False")
        self.epoch, self.rows = 0, []
        self.best, self.best_epoch, self.best_value = None, 0, -1.0

    def _choose_images(self) -> None:
        """Show the model tiles, or their features where neither tower nor tiles will change."""
        self.images = self.train.tiles
        self.validation_images = None if self.validation is None else self.validation.tiles
        tower, settings = self.model.image, self.settings
        if any(p.requires_grad for p in tower.parameters()):
            return
        tower.eval()
        with autocast(self.device, settings.precision):
            if not (settings.augment or settings.crop):
                self.images = towers.embed(tower, self.images, device=self.device)
            if self.validation is not None:
                self.validation_images = towers.embed(
                    tower, self.validation_images, device=self.device
                )

    def go(
        self,
        folder: Path | None,
        key: str | None,
        on_epoch: Callable[[pd.DataFrame], None] | None,
    ) -> None:
        """Train until the last epoch, or until validation no longer improves."""
        settings, saved = self.settings, time.monotonic()
        if self.epoch == 0:
            self._validate()
        total, done = settings.epochs * self.steps, self.epoch * self.steps
        show = {"desc": "training", "unit": "step", "disable": self.rank > 0}
        with progress(total=total, initial=done, **show) as bar:
            while self.epoch < settings.epochs and not self._stale():
                self.epoch += 1
                self._one_epoch(bar)
                self._validate()
                bar.set_postfix_str(self._summary())
                due = time.monotonic() - saved > SAVE_SECONDS
                if folder is not None and self.rank == 0 and due:
                    self.save(folder / "checkpoint.pt", key)
                    saved = time.monotonic()
                if on_epoch is not None:
                    on_epoch(self.history())

    def _stale(self) -> bool:
        """Whether validation has not improved for as many epochs as `patience` allows."""
        patience = self.settings.patience
        return patience is not None and self.epoch - self.best_epoch >= patience

    # --- one epoch

    def _one_epoch(self, bar: tqdm) -> None:
        begin, losses = time.perf_counter(), []
        self.model.train()
        for module in self.model.modules():  # frozen parts stay in eval mode
            trained = [p.requires_grad for p in module.parameters()]
            if trained and not any(trained):
                module.eval()
        batches = _batches(self.slides, self.settings, self.epoch, self.world)
        for step, batch in enumerate(_ahead(self._load, list(enumerate(batches)))):
            rate = _rate((self.epoch - 1) * self.steps + step, self.steps, self.settings)
            for group in self.optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            losses.append(self._step(batch, (self.settings.seed, self.epoch, step, 1 + self.rank)))
            bar.update()
        losses = self._average(torch.stack(losses))
        broken = ~torch.isfinite(losses)
        if broken.any():
            step = 1 + int(broken.float().argmax())
            raise DataError(
                f"NaN or infinite loss: epoch {self.epoch}, step {step} of {self.steps}",
                fix="lower lr, lengthen warmup, keep max_scale, and look for outliers in the data",
            )
        seconds = time.perf_counter() - begin
        self._note("train", "loss", float(losses.mean()))
        self._note("train", "temperature", 1 / float(self.model.scale.detach()))
        self._note("train", "learning rate", rate)
        self._note("train", "seconds", seconds)
        self._note("train", "tiles per second", sum(map(len, batches)) / seconds)

    def _load(self, item: tuple[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Load this process's share of a batch: tiles, second view, numbers for `augment`."""
        step, rows = item
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, self.epoch, step, 0))
        numbers = torch.rand(len(rows), contrast.NUMBERS, generator=generator)
        share = slice(self.rank, None, self.world)
        rows = rows[share].numpy()
        views = (np.take(view, rows, axis=0) for view in (self.images, self.train.other))
        loaded = (*map(torch.from_numpy, views), numbers[share])
        return tuple(x.pin_memory() for x in loaded) if self.device.type == "cuda" else loaded

    # --- one step

    def _step(self, batch: tuple[Tensor, Tensor, Tensor], noise: tuple[int, ...]) -> Tensor:
        """Take one step; return the loss.

        With micro-batches (Gao et al. 2021, arXiv:2101.06983): embed all parts without keeping
        the activations, find the gradient of the loss at the embeddings, then embed part by part
        again and pass that gradient on. The second tower needs little memory and sees the whole
        batch.
        """
        images, other, numbers = (x.to(self.device, non_blocking=True) for x in batch)
        size = self.settings.micro_batch or len(images)
        parts = [slice(i, i + size) for i in range(0, len(images), size)]

        def embed(part: slice) -> Tensor:
            torch.manual_seed(_seed(*noise, 1 + part.start))  # the same dropout both times
            return self._embed_images(images[part], numbers[part])

        torch.manual_seed(_seed(*noise, 0))
        with autocast(self.device, self.settings.precision):
            second = self.model.embed_other(other)
        if len(parts) == 1:
            first = embed(parts[0])
        else:
            with torch.no_grad():
                first = torch.cat([embed(part) for part in parts])
            first.requires_grad_()
        loss = self._loss(first, second)
        self.optimiser.zero_grad()
        loss.backward()
        if len(parts) > 1:
            for part in parts:
                embed(part).backward(first.grad[part])
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                self._average(parameter.grad)
        self.optimiser.step()
        if self.settings.max_scale is not None:
            self.model.log_scale.data.clamp_(max=math.log(self.settings.max_scale))
        return loss.detach()

    def _embed_images(self, images: Tensor, numbers: Tensor) -> Tensor:
        settings = self.settings
        if images.dtype == torch.uint8:  # else they are features already
            pixels = towers.as_pixels(images, self.device)
            pixels = contrast.augment(pixels, numbers, settings.augment, settings.crop)
        with autocast(self.device, settings.precision):
            if images.dtype == torch.uint8:
                return self.model.embed_images(pixels)
            return self.model.project(images)

    def _loss(self, first: Tensor, second: Tensor) -> Tensor:
        if self.world == 1:
            return info_nce(first, second, self.model.scale)
        from open_clip.loss import ClipLoss

        loss = ClipLoss(True, True, rank=self.rank, world_size=self.world)
        return loss(first, second, self.model.scale)

    def _average(self, values: Tensor) -> Tensor:
        """Average over processes, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
            values /= self.world
        return values

    # --- what is measured

    def _validate(self) -> None:
        """Measure loss and recall in validation; keep the weights if they are the best so far."""
        if self.validation is None:
            return
        start = len(self.rows)
        if self.rank == 0:
            self._measure()
        self.rows[start:] = share(self.rows[start:])
        if self.epoch == 0 or self.settings.keep == "last":
            return
        value = self._recall_at_10()
        if value > self.best_value:
            self.best_value, self.best_epoch = value, self.epoch
            self.best = copy.deepcopy(self.model.state_dict())

    def _measure(self) -> None:
        """Note loss and recall in validation.

        The loss depends on the size of a batch, so it is averaged over batches as in training.
        """
        model, precision = self.model.eval(), self.settings.precision
        image = contrast.embed_rows(model, contrast.embed_tiles, self.validation_images, precision)
        other = contrast.embed_rows(model, TwoTowers.embed_other, self.validation.other, precision)
        mixed = replace(self.settings, same_slide=False)
        with torch.no_grad():
            losses = [
                info_nce(image[rows], other[rows], model.scale)
                for rows in _batches(np.zeros(len(image)), mixed, 0, 1)
            ]
        self._note("validation", "loss", float(torch.stack(losses).mean()))
        for row in recall(image, other).to_dict("records"):
            of = {name: row[name] for name in ("direction", "k", "chance")}
            self._note("validation", "recall", row["recall"], **of)

    def _recall_at_10(self) -> float:
        """Mean recall@10 of both directions in this epoch's validation."""
        now = (r for r in self.rows if r["epoch"] == self.epoch and r["measure"] == "recall")
        return float(np.mean([r["value"] for r in now if r["k"] == KS[-1]]))

    def _note(self, split: str, measure: str, value: float, **of: object) -> None:
        of = {"direction": "", "k": None, "chance": None, **of}
        row = {"epoch": self.epoch, "split": split, "measure": measure, **of, "value": value}
        self.rows.append(row)

    def history(self) -> pd.DataFrame:
        """Return what was measured so far; see `Fitted`."""
        return pd.DataFrame(self.rows).astype({"k": float, "chance": float})

    def _summary(self) -> str:
        now = [r for r in self.rows if r["epoch"] == self.epoch]
        loss = next(r["value"] for r in now if r["measure"] == "loss")
        score = "" if self.validation is None else f", recall@{KS[-1]} {self._recall_at_10():.3f}"
        return f"epoch {self.epoch}/{self.settings.epochs}, loss {loss:.3f}{score}"

    # --- the end, and checkpoints on the way

    def keep(self) -> int:
        """Give the model the weights to keep, in eval mode, and return their epoch."""
        self.model.eval()
        if self.best is None:
            return self.epoch
        self.model.load_state_dict(self.best)
        return self.best_epoch

    def save(self, path: Path, key: str) -> None:
        """Write everything that is needed to resume."""
        state = {name: getattr(self, name) for name in _PROGRESS}
        state |= {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        with atomic(path) as temporary:
            torch.save({"key": key, **state}, temporary)

    def load(self, path: Path, key: str) -> None:
        """Resume from a checkpoint, the same in every process."""
        state = share(_read_checkpoint(path, key) if self.rank == 0 else None)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name in _PROGRESS:
            setattr(self, name, state[name])
        logger.info("training resumes after epoch %d: %s", self.epoch, path)


def _read_checkpoint(path: Path, key: str) -> dict:
    """Read a checkpoint, never as a pickle; refuse one that is damaged or of other settings."""
    fix = "delete the file to train from the start"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["key"]
    except Exception as error:  # damaged bytes make torch raise a dozen kinds of errors
        what = f"the checkpoint cannot be read ({type(error).__name__}: {error})".split("\n")[0]
        raise DataError(what, file=path, fix=fix) from error
    if found != key:
        what = "the checkpoint was written with different settings, data or initial weights"
        raise DataError(what, file=path, fix=fix)
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
    """Rows of each batch of an epoch, in a random order that depends on seed and epoch alone.

    A last batch of less than half the size is left out, unless it is the only one: with fewer
    negatives it would be an easier task. Processes need equal shares, so up to ``world - 1`` rows
    of a batch are left out.
    """
    generator = torch.Generator().manual_seed(_seed(settings.seed, epoch))
    pools = [np.arange(len(slides))]
    if settings.same_slide:
        pools = [np.flatnonzero(slides == name) for name in np.unique(slides)]
    batches = []
    for rows in pools:
        rows = torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)]
        parts = list(rows.split(settings.batch_size))
        if len(parts) > 1 and 2 * len(parts[-1]) < settings.batch_size:
            parts.pop()
        parts = [part[: len(part) // world * world] for part in parts]
        batches += [part for part in parts if len(part) > 1]
    if settings.same_slide:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    return batches


def _ahead(load: Callable, items: Iterable) -> Iterator:
    """Load the next two items in threads while the current one is in use."""
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
    """Give every process the value of the first one."""
    if ranks()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


# --------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class Fitted:
    """A trained model and the course of its training.

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
        Its folder in the cache; None without a cache.
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
    cache and read back when the same is asked for again; an interrupted training resumes from its
    last checkpoint. Under torchrun, every process takes its share of each batch.

    Parameters
    ----------
    model
        The initial weights; the model itself is not changed.
    train, validation
        Pairs that share no slide and no group of adjacent sections, with one panel. A tower with
        `set_scale` learns the scale of the second view from `train` alone.
    settings
        How to train.
    device
        When None: ``"cuda"`` if there is one, else ``"cpu"``.
    cache
        Read the result from the cache, or write it there.
    on_epoch
        Called with the history after every epoch, for a live curve; once when read back.

    Raises
    ------
    DataError
        When training and validation overlap, the loss is NaN or infinite, memory runs out, or the
        model in the cache is damaged.
    """
    rank, _ = ranks()
    device = contrast.choose_device(device)
    precision = contrast.choose_precision(settings.precision, device)
    settings = replace(settings, precision=precision)
    _check(model, train, validation, settings)
    key = share(_key(model, train, validation, settings)) if cache else None
    folder = cache_dir() / "models" / key if cache else None
    if rank > 0:
        on_epoch = None
    if folder is not None and share((folder / "model.safetensors").exists()):
        return _read(folder, model, device, on_epoch)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _memory_errors(settings, device):
        run = Run(model, train, validation, settings, device)
        if folder is not None and share((folder / "checkpoint.pt").exists()):
            run.load(folder / "checkpoint.pt", key)
        run.go(folder, key, on_epoch)
    best_epoch = run.keep()
    fitted = Fitted(run.model, run.history(), best_epoch, folder)
    if folder is not None and rank == 0:
        _write(fitted, settings, [train] if validation is None else [train, validation])
    return fitted


@contextlib.contextmanager
def _memory_errors(settings: Settings, device: torch.device) -> Iterator[None]:
    """Turn an error about memory into one that names the setting to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):  # torch's words on a CPU
            raise
        micro, batch = settings.micro_batch, settings.batch_size
        raise DataError(
            f"out of memory: a training step does not fit on {device} (micro_batch={micro}, "
            f"batch_size={batch})",
            fix=f"set micro_batch={max(1, min(micro or batch, batch) // 4)}, which gives the same "
            "steps with less memory; if that is not enough, lower batch_size, which gives a "
            "different result",
        ) from error


def _check(model: TwoTowers, train: Pairs, validation: Pairs | None, settings: Settings) -> None:
    """Raise an error when a model cannot be trained on these pairs, or only with a leak."""
    if len(train) < 2:
        raise DataError(f"{len(train)} training pair has no negatives", fix="give more pairs")
    if model.dim != settings.dim:
        what = f"the model has dim {model.dim}, the settings have {settings.dim}"
        raise DataError(what, fix="build TwoTowers with the settings it is trained with")
    named = getattr(model.other, "genes", None)
    if named is not None and train.panel is not None and tuple(named) != train.panel.genes:
        what = f"the gene tower and panel {train.panel.name!r} have different genes"
        raise DataError(what, fix="build GeneTower with panel.genes")
    in_parts = settings.micro_batch or ranks()[1] > 1
    if in_parts and _needs_whole_batches(model.image):
        what = "this image tower has batch norm, which must see a batch whole, not in parts"
        fix = "set micro_batch=None in a single process, or take a tower of towers.load"
        raise DataError(what, fix=fix)
    if validation is None:
        if settings.patience is not None:
            fix = "give validation, or set patience=None"
            raise DataError("patience without validation", fix=fix)
        return
    contrast.check_apart(train, validation)
    if len(validation) <= KS[-1]:
        what = f"{len(validation)} validation pairs are too few for recall@{KS[-1]}"
        raise DataError(what, fix="validate on more pairs, or on none")


def _needs_whole_batches(tower: nn.Module) -> bool:
    """Return whether a tower computes batch statistics; `towers.ImageTower` freezes its own."""
    if isinstance(tower, towers.ImageTower):
        return False
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in tower.modules())


def _key(model: TwoTowers, train: Pairs, validation: Pairs | None, settings: Settings) -> str:
    """Return a digest of settings, initial weights and data."""
    weights = {**dict(model.named_buffers()), **model.state_dict()}
    data = []
    for pairs in (train, validation):
        if pairs is not None:
            names = pairs.panel.genes if pairs.panel else ()
            spots = [*pairs.spots.index, *pairs.spots["slide"]]
            data.append(towers.hashed([pairs.tiles, pairs.other, *spots, *names]))
    return digest(
        version=_VERSION,
        settings=asdict(settings),
        architecture=f"{model!r} {getattr(model.image, 'card', None)}",
        trainable=[name for name, p in model.named_parameters() if p.requires_grad],
        weights=towers.hashed(part for item in weights.items() for part in item),
        data=data,
    )


def _write(fitted: Fitted, settings: Settings, data: list[Pairs]) -> None:
    """Write a result to its folder; the weights come last and mark it as finished."""
    folder, key = fitted.folder, fitted.folder.name
    slides = {str(slide) for pairs in data for slide in pairs.spots["slide"]}
    facts = {"key": key, "best_epoch": fitted.best_epoch, "settings": asdict(settings)}
    facts["slides"] = sorted(slides)  # tools/workshop.py finds the models of a study by them
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
    """Read a finished training from its folder."""
    path, fix = folder / "model.safetensors", f"delete the folder {folder} to train again"
    try:
        with safe_open(path, "pt") as file:
            key, names = file.metadata()["key"], file.keys()
            weights = {name: file.get_tensor(name) for name in names}
        facts = json.loads((folder / "settings.json").read_text())
        history = pd.read_csv(folder / "history.csv", float_precision="round_trip")
        history["direction"] = history["direction"].fillna("")
        best_epoch = int(facts["best_epoch"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        what = f"the model in the cache is damaged ({error})"
        raise DataError(what, file=path, fix=fix) from error
    if {key, facts["key"]} != {folder.name}:
        raise DataError("the model in the cache is from a different training", file=path, fix=fix)
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    logger.info("the trained model is read from %s", folder)
    if on_epoch is not None:
        on_epoch(history)
    return Fitted(model.to(device).eval(), history, best_epoch, folder)


# --------------------------------------------------------------------------- without these spots


@dataclass(frozen=True)
class HeldOut:
    """A model trained without the test spots, with the pairs of its training and its test.

    Attributes
    ----------
    name
        The held-out donor, or the name of the fold.
    panel
        Genes, chosen on the training spots; None for captions.
    train, validation, test
        Pairs of the training spots, of the validation donor (or None), and of the test spots.
    before, fitted
        The model before training, and after.
    """

    name: str
    panel: genes.Panel | None
    train: Pairs
    validation: Pairs | None
    test: Pairs
    before: TwoTowers
    fitted: Fitted


def leave_out(
    adatas: Mapping[str, AnnData],
    test: str | Fold,
    *,
    spots: pd.DataFrame | None = None,
    validation: str | None = None,
    view: str = "genes",
    tower: str | nn.Module = "mini",
    panel: Callable[..., genes.Panel] | genes.Panel = genes.shared_hvg,
    n_genes: int = 256,
    settings: Settings | None = None,
    side_um: float = 100.0,
    size: int = 96,
    device: str | torch.device | None = None,
    cache: bool = True,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
) -> HeldOut:
    """Train without the test spots: choose a panel, pair tiles with a second view, and `fit`.

    Panel, scaler and weights come from the training spots. Of all other spots, only the *names* of
    the genes that their slides measured are used.

    Parameters
    ----------
    adatas
        Slides from `helpers.genes.normalise`.
    test
        The donor to hold out, who then shares no slide and no group of adjacent sections with
        training; or a fold of a split, whose training spots are used and no others.
    spots
        The table that a fold divides, `Splits.spots`.
    validation
        The validation donor, by which an epoch is chosen. None: the last epoch is kept.
    view
        The second view: ``"genes"``, standardised within each slide, or ``"captions"``.
    tower
        An image tower or its name for `helpers.towers.load`. For captions, a name for
        `helpers.towers.load_clip`.
    panel, n_genes
        A function that chooses the panel from slides and a number of genes; or a panel, which must
        not have been chosen with a held-out slide.
    settings
        When None: `BOOK` for genes, `CAPTION_SETTINGS` for captions.
    side_um, size
        As for `helpers.tiles.cut_study`.
    device, cache, on_epoch
        As for `fit`.

    Raises
    ------
    DataError
        When there is nothing to train or to test on, a spot is on none of the slides, or held-out
        spots would leak into training.
    """
    if view not in ("genes", "captions"):
        raise DataError(f"view {view!r} is unknown", fix="choose 'genes' or 'captions'")
    settings = settings or (BOOK if view == "genes" else CAPTION_SETTINGS)
    if isinstance(test, str):
        name, parts = test, _by_donor(adatas, test, validation)
    else:
        name, parts = test.name, _by_fold(adatas, test, spots, validation)
    if view == "captions":
        panel = None
    elif isinstance(panel, genes.Panel):
        held_out = {slide for role in parts.keys() - {"train"} for slide in parts[role]}
        genes.check_held_out(panel, held_out)
    else:
        shared = genes.shared_genes(adatas)
        panel = panel({slide: a[:, shared] for slide, a in parts["train"].items()}, n_genes)
    cut = tiles.cut_study(adatas, side_um=side_um, size=size, cache=cache)
    pairs = {role: contrast.pair(a, cut, panel, standardise=True) for role, a in parts.items()}
    if view == "captions":
        pairs = {role: contrast.with_captions(some) for role, some in pairs.items()}
    if isinstance(test, str):
        for role in pairs.keys() - {"test"}:
            contrast.check_apart(pairs[role], pairs["test"], f"the held-out donor {test}")
    train, watched = pairs["train"], pairs.get("validation")
    before = _untrained(tower, panel, settings)
    fitted = fit(before, train, watched, settings, device=device, cache=cache, on_epoch=on_epoch)
    return HeldOut(name, panel, train, watched, pairs["test"], before, fitted)


def _by_donor(
    adatas: Mapping[str, AnnData], test: str, validation: str | None
) -> dict[str, dict[str, AnnData]]:
    """Give each slide a role by its donor: training, validation or test."""
    donors = {slide: str(adata.obs["donor"].iloc[0]) for slide, adata in adatas.items()}
    for name in (test, validation):
        if name is not None and name not in donors.values():
            fix = f"choose one of {sorted(set(donors.values()))}"
            raise DataError(f"no slide is of donor {name!r}", fix=fix)
    if test == validation:
        what = f"donor {test!r} cannot be both the test donor and the validation donor"
        raise DataError(what, fix="validate on a different donor, or on none")
    role_of = {validation: "validation", test: "test"}
    parts: dict[str, dict[str, AnnData]] = {"train": {}}
    for slide, donor in donors.items():
        parts.setdefault(role_of.get(donor, "train"), {})[slide] = adatas[slide]
    if not parts["train"]:
        what = f"no donor is left to train on: the slides are of {sorted(set(donors.values()))}"
        raise DataError(what, fix="add slides of other donors")
    return parts


def _by_fold(
    adatas: Mapping[str, AnnData], fold: Fold, spots: pd.DataFrame | None, validation: str | None
) -> dict[str, dict[str, AnnData]]:
    """Cut the slides to the training spots and to the test spots of a fold."""
    if spots is None or validation is not None:
        what = f"fold {fold.name!r} needs the table of its spots, and has no validation donor"
        raise DataError(what, fix="give spots=, and no validation")
    if both := set(fold.train) & set(fold.test):
        what = f"fold {fold.name!r} trains on {len(both)} spots of its test"
        raise DataError(what, fix="take a split of helpers.splits")
    parts: dict[str, dict[str, AnnData]] = {}
    for role, rows in {"train": fold.train, "test": fold.test}.items():
        wanted = {slide: some.index for slide, some in spots.iloc[rows].groupby("slide")}
        for slide, names in wanted.items():
            if slide not in adatas or not names.isin(adatas[slide].obs_names).all():
                fix = "give all slides and spots that were split"
                raise DataError("a spot of the fold is missing", slide=slide, fix=fix)
        parts[role] = {
            slide: adata[adata.obs_names.isin(wanted[slide])]
            for slide, adata in adatas.items()
            if slide in wanted
        }
    return parts


def _untrained(tower: str | nn.Module, panel: genes.Panel | None, settings: Settings) -> TwoTowers:
    """Build the two towers: for captions, where there is no panel, both of a CLIP model."""
    if panel is None:
        clip, _ = towers.load_clip(tower, seed=settings.seed)
        clip.token_embedding.requires_grad_(False)  # two dozen words: random codes tell them apart
        image = towers.ImageTower(towers.card(tower), clip.visual)
        return TwoTowers(image, towers.TextTower(clip), settings)
    image = towers.load(tower, seed=settings.seed) if isinstance(tower, str) else tower
    other = towers.GeneTower(panel.genes, settings.encoder, width=settings.dim, seed=settings.seed)
    return TwoTowers(image, other, settings)
