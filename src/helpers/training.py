"""One training, step by step, in one process or several.

Every random number is drawn from the seed, the epoch and the step, so that a run which was cut off
goes on from its last epoch to the very weights it would have had.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from helpers import towers
from helpers.files import DataError, atomic, progress
from helpers.model import (
    KS,
    Settings,
    TwoTowers,
    autocast,
    embed,
    info_nce,
    recall,
)
from helpers.pairs import NUMBERS, Pairs, augmented

logger = logging.getLogger(__name__)

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
            image, other = embed(self.model, *views, self.settings.precision)
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
