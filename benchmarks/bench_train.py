"""Training: this book's loop against the published one, in turns, on the same tiles and tower.

The published loop is written from its description: one PNG per tile; a dataset that opens each
with Pillow and passes it through Transformers' processor of CLIP, in the process that trains; the
whole tower in fp32; Adam. The book's loop is `helpers.training.fit` itself. Both train the same
model: the same image tower from the same random weights, the same gene encoder, heads and loss.

Every way has a process of its own, so that its peak memory is its own. All of them wait until it is
their turn for one epoch, so that a busy machine slows all of them alike. The first epoch of each
warms up and does not count.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from bench_tiles import peak_mb

if TYPE_CHECKING:
    from helpers.contrast import Pairs, Settings, TwoTowers

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported

FORKS = "forkserver" in multiprocessing.get_all_start_methods()

PUBLISHED = {
    "optimiser": "adam",
    "lr": 5e-5,
    "weight_decay": 0.2,
    "warmup": 0.0,
    "schedule": "constant",
    "max_scale": None,
    "tower_lr": 1.0,
    "augment": 0.0,
    "precision": "fp32",
}
"""The published optimiser in the words of `helpers.contrast.Settings`, for either loop."""


@dataclass(frozen=True)
class Way:
    """One way to train, and on what.

    Attributes
    ----------
    name
        What the row is called.
    loop
        ``"published"``, ``"book"``; ``"step"``, the book's steps on batches that are loaded before;
        ``"load"`` and ``"load book"``, batches that are loaded and not trained on.
    loader
        Of the published loop: ``"pil"`` or ``"torchvision"``, the two backends of Transformers'
        processor; or ``"memory"``, tiles that have been through it before.
    workers
        Processes that load for the published loop; 0: itself.
    patch_dropout
        Share of the patches that the tower leaves out in training.
    settings
        What differs from `helpers.contrast.BOOK`.
    environment
        Variables of the process.
    against
        Name of the way that its ratio refers to; the row has the ratio to ``"published"`` too.
    """

    name: str
    loop: str
    loader: str = "pil"
    workers: int = 0
    patch_dropout: float = 0.0
    settings: dict = field(default_factory=lambda: dict(PUBLISHED))
    environment: dict = field(default_factory=dict)
    against: str = "published"


# --- data --------------------------------------------------------------------------------------


def prepare(folders: dict[Path, tuple[int, int | None]], held_out: str = "A") -> None:
    """Write tiles and genes of `demo` for all ways: as arrays, and as one PNG per tile.

    Parameters
    ----------
    folders
        Where to; the side of the tiles in px, and how many to train on. None: all of the training
        donors, and those of the held-out one to validate on.
    held_out
        The donor to validate on.
    """
    from PIL import Image

    from helpers import contrast, genes, tiles

    adatas = genes.prepare("demo")
    others = {k: a for k, a in adatas.items() if a.obs["donor"].iloc[0] != held_out}
    shared = genes.shared_genes(adatas)
    panel = genes.overlap_hvg_batch({k: a[:, shared] for k, a in others.items()}, 512)
    for folder, (size, most) in folders.items():
        some = adatas if most is None else dict(list(others.items())[:1])
        cut = tiles.cut_study(some, side_um=100.0, size=size)
        pairs = contrast.pair(some, cut, panel, standardise=True)
        apart = (pairs.spots["donor"] == held_out).to_numpy()
        parts = {"train": pairs.of(~apart)}
        if most is None:
            parts["validation"] = pairs.of(apart)
        for name, part in parts.items():
            part = part.of(np.arange(min(len(part), most or len(part))))
            (folder / name).mkdir(parents=True)
            np.save(folder / name / "tiles.npy", part.tiles)
            np.save(folder / name / "other.npy", part.other)
            part.spots.to_csv(folder / name / "spots.csv")
        for i, tile in enumerate(np.load(folder / "train/tiles.npy")):
            Image.fromarray(tile).save(folder / "train" / f"{i}.png")


def pairs_of(folder: Path) -> Pairs:
    """Read what `prepare` wrote."""
    import pandas as pd

    from helpers.contrast import Pairs

    arrays = (np.load(folder / f"{name}.npy") for name in ("tiles", "other"))
    return Pairs(*arrays, pd.read_csv(folder / "spots.csv", index_col=0))


def _validation(folder: Path) -> Pairs | None:
    return pairs_of(folder / "validation") if (folder / "validation").exists() else None


# --- the ways ----------------------------------------------------------------------------------


def model_of(way: Way, tower: str, n_genes: int) -> tuple[TwoTowers, Settings]:
    """Build the model that both loops train."""
    from open_clip.transformer import PatchDropout
    from torch import nn

    from helpers import towers
    from helpers.contrast import BOOK, TwoTowers

    settings = replace(BOOK, **way.settings)
    image = towers.load(tower, pretrained=False)
    share = way.patch_dropout
    image.trunk.patch_dropout = PatchDropout(share) if share else nn.Identity()
    names = [f"gene {j}" for j in range(n_genes)]
    other = towers.GeneTower(names, settings.encoder, width=settings.dim)
    return TwoTowers(image, other, settings), settings


class PngTiles:
    """A dataset of one PNG per tile, each opened and processed when it is asked for."""

    def __init__(self, folder: Path, other: np.ndarray, processor: Callable) -> None:
        self.folder, self.other, self.processor = folder, other, processor

    def __len__(self) -> int:
        return len(self.other)

    def __getitem__(self, i: int):
        """Return the pixels as the tower takes them, and the genes."""
        from PIL import Image

        image = Image.open(self.folder / f"{i}.png")
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels, self.other[i]


def _loader(way: Way, folder: Path, card, batch: int):
    """Return the published loop's source of batches."""
    import transformers
    from torch.utils.data import DataLoader

    backend = "CLIPImageProcessor" + ("" if way.loader == "torchvision" else "Pil")
    if not hasattr(transformers, backend):  # before version 5 there is one, with Pillow
        backend = "CLIPImageProcessor"
    side = card.size_px
    processor = getattr(transformers, backend)(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(card.mean),
        image_std=list(card.std),
    )
    data = PngTiles(folder / "train", np.load(folder / "train/other.npy"), processor)
    if way.loader == "memory":
        data = [data[i] for i in range(len(data))]
    return DataLoader(data, batch, shuffle=True, num_workers=way.workers, drop_last=True)


def published(way: Way, folder: Path, tower: str, device: str = "cpu") -> Iterator[dict]:
    """Train as published, an epoch at a time."""
    import torch

    from helpers.contrast import embed_pairs, info_nce
    from helpers.metrics import recall

    validation = _validation(folder)
    model, settings = model_of(way, tower, np.load(folder / "train/other.npy").shape[1])
    loader = _loader(way, folder, model.image.card, settings.batch_size)
    model.other.set_scale(np.load(folder / "train/other.npy"))
    model.to(device)
    optimiser = torch.optim.Adam(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    while True:
        tiles, start = 0, time.perf_counter()
        model.train()
        for pixels, other in loader:
            first = model.project(model.image.trunk(pixels.to(device)))
            loss = info_nce(first, model.embed_other(other.to(device)), model.scale)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            tiles += len(other)
        loss.item()  # a GPU may still be at work
        facts = {"seconds": time.perf_counter() - start, "tiles": tiles}
        if validation is not None:
            found = recall(*embed_pairs(model, validation, device, "fp32"), ks=(10,))
            facts["times_chance"] = float(found["times_chance"].mean())
        yield facts


def book(way: Way, folder: Path, tower: str, turn: Callable[[dict], None]) -> None:
    """Train as this book does; `turn` is called after each epoch."""
    from helpers import training

    train, validation = pairs_of(folder / "train"), _validation(folder)
    model, settings = model_of(way, tower, train.other.shape[1])

    def after(history) -> None:
        now = history[history["epoch"] == history["epoch"].max()]
        at_ten = now[(now["measure"] == "recall") & (now["k"] == 10)]
        value = dict(zip(now["measure"], now["value"], strict=True))
        facts = {"seconds": value["seconds"]}
        facts["tiles"] = round(value["tiles per second"] * value["seconds"])
        if len(at_ten):
            facts["times_chance"] = float((at_ten["value"] / at_ten["chance"]).mean())
        turn(facts)

    epochs = settings.epochs if validation else 1000
    settings = replace(settings, epochs=epochs)
    training.fit(model, train, validation, settings, device="cpu", cache=False, on_epoch=after)


def step(way: Way, folder: Path, tower: str) -> Iterator[dict]:
    """Take the book's steps on batches that are in memory already."""
    import torch

    from helpers.training import Run

    train = pairs_of(folder / "train")
    model, settings = model_of(way, tower, train.other.shape[1])
    run = Run(model, train, None, settings, torch.device("cpu"))
    rows = torch.arange(len(train)).split(settings.batch_size)
    batches = [run._load((i, some)) for i, some in enumerate(rows)]
    run.model.train()
    while True:
        start = time.perf_counter()
        for i, batch in enumerate(batches):
            run._step(batch, (0, i))
        yield {"seconds": time.perf_counter() - start, "tiles": len(train)}


def load(way: Way, folder: Path, tower: str) -> Iterator[dict]:
    """Load batches up to what the network takes, normalised; train on none."""
    from helpers import towers

    image = towers.load(tower, pretrained=False)
    loader = _loader(way, folder, image.card, 32)
    while True:
        start = time.perf_counter()
        tiles = sum(len(other) for _, other in loader)
        yield {"seconds": time.perf_counter() - start, "tiles": tiles}


def load_book(way: Way, folder: Path, tower: str) -> Iterator[dict]:
    """Load the same from the array of tiles, with the threads that `fit` has."""
    import torch

    from helpers import towers
    from helpers.training import _ahead

    image, tiles = towers.load(tower, pretrained=False), np.load(folder / "train/tiles.npy")
    draw = torch.Generator().manual_seed(0)
    while True:
        start = time.perf_counter()
        batches = torch.randperm(len(tiles), generator=draw).split(32)
        for some in _ahead(lambda rows: np.take(tiles, rows.numpy(), axis=0), batches):
            (towers.as_pixels(some) - image.mean) / image.std
        yield {"seconds": time.perf_counter() - start, "tiles": len(tiles)}


# --- turns -------------------------------------------------------------------------------------


def _child(way: Way, folder: Path, tower: str, pipe: Connection) -> None:
    """Train an epoch whenever it is this way's turn; send what was measured in it."""
    imported = peak_mb()

    def turn(facts: dict) -> None:
        pipe.send({**facts, "peak_mb": peak_mb(), "imports_mb": imported})
        if not pipe.recv():
            sys.exit()

    turn({})
    if way.loop == "book":
        book(way, folder, tower, turn)
    else:
        work = {"published": published, "step": step, "load": load, "load book": load_book}
        for facts in work[way.loop](way, folder, tower):
            turn(facts)


class Worker:
    """A process that trains one way, an epoch at a time."""

    def __init__(self, way: Way, folder: Path, tower: str) -> None:
        # Forked from a server that has imported everything once and computed nothing. OpenMP reads
        # its variables when it is loaded, so a way that sets one starts afresh.
        start = "forkserver" if FORKS and not way.environment else "spawn"
        context = multiprocessing.get_context(start)
        if start == "forkserver":
            context.set_forkserver_preload(["transformers", "helpers.contrast"])
        before = dict(os.environ)
        os.environ.update(way.environment)
        self.way, self.facts = way, []
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_child, args=(way, folder, tower, theirs))
        self.process.start()
        theirs.close()
        os.environ.clear()
        os.environ.update(before)
        self.pipe.recv()

    def epoch(self) -> dict:
        """Let it train one epoch."""
        start = time.perf_counter()
        self.pipe.send(True)
        self.facts.append(self.pipe.recv() | {"turn": time.perf_counter() - start})
        return self.facts[-1]

    def stop(self) -> None:
        """Let it go."""
        with contextlib.suppress(OSError):  # it may have failed, which the parent hears of itself
            self.pipe.send(False)
        self.process.join(20)
        self.process.kill()


def in_turns(
    ways: Iterable[Way], folder: Path, tower: str, go_on: Callable[[Worker], bool]
) -> list[Worker]:
    """Let every way train an epoch in turn, while `go_on` says so; the order alternates."""
    workers = []
    try:
        for way in ways:
            workers.append(Worker(way, folder, tower))
        left = list(workers)
        while left:
            for worker in left:
                worker.epoch()
            left = [worker for worker in left if go_on(worker)][::-1]
    finally:
        for worker in workers:
            worker.stop()
    return workers


def speed(
    ways: list[Way], folder: Path, tower: str, case: str, repeats: int, what: str = "training"
) -> list[dict]:
    """Measure tiles per second; return one row per way."""
    workers = in_turns(ways, folder, tower, lambda worker: len(worker.facts) <= repeats)
    each = {w.way.name: [f["tiles"] / f["seconds"] for f in w.facts[1:]] for w in workers}
    rows = []
    for worker in workers:
        way, facts = worker.way, worker.facts[1:]
        row = {"what": what, "case": case, "way": way.name}
        row |= {"tiles_per_s": statistics.median(each[way.name]), "runs": len(facts)}
        for name, other in (("ratio", "published"), ("ratio_same_tower", way.against)):
            ratios = [m / o for m, o in zip(each[way.name], each[other], strict=True)]
            row |= {name: statistics.median(ratios), name.replace("ratio", "ratios"): ratios}
        row |= {"same_tower": way.against}
        row |= {"tiles": facts[0]["tiles"], "peak_mb": facts[-1]["peak_mb"]}
        row |= {"imports_mb": facts[-1]["imports_mb"]}
        if way.settings.get("train_blocks") == 0:  # features are computed once, before epoch 1
            row["seconds_before"] = worker.facts[0]["turn"] - worker.facts[0]["seconds"]
        rows.append(row)
    return rows


def race(
    ways: list[Way], folder: Path, tower: str, case: str, most: float, marks=(2, 3, 4, 5)
) -> list[dict]:
    """Train each way until its epochs are over or `most` seconds; tell when it reached what."""

    def go_on(worker: Worker) -> bool:
        epochs = worker.way.settings.get("epochs", 10**6)
        return len(worker.facts) < epochs and sum(f["seconds"] for f in worker.facts) < most

    rows = []
    for worker in in_turns(ways, folder, tower, go_on):
        seconds = np.cumsum([f["seconds"] for f in worker.facts])
        best = np.maximum.accumulate([f["times_chance"] for f in worker.facts])
        first = {m: float(seconds[best >= m][0]) if best[-1] >= m else None for m in marks}
        row = {"what": "time to a recall", "case": case, "way": worker.way.name}
        row |= {"seconds_to_times_chance": first, "best_times_chance": float(best[-1])}
        row |= {"seconds": float(seconds[-1]), "epochs": len(seconds)}
        row |= {"tiles": worker.facts[0]["tiles"], "peak_mb": worker.facts[-1]["peak_mb"]}
        row |= {"curve": [[float(s), f["times_chance"]] for s, f in zip(seconds, worker.facts, strict=True)]}  # fmt: skip # noqa: E501
        rows.append(row)
    return rows
