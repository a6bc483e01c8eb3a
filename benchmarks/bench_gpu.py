"""Training ViT-B/32 at 224 px, batch 1,024, on a GPU: how far from its limit, how long a paper.

The same loops as in `bench_train`, one after the other in one process. With ``dry=True`` the same
code runs on a CPU at a tiny size, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import bench_train
import numpy as np
import torch
from bench_train import Way

from helpers import contrast, towers, training

PEAKS = {
    "B200": (2250, 75), "H200": (989, 67), "H100 PCIe": (756, 51), "H100": (989, 67),
    "A100": (312, 19.5), "L40S": (362, 91.6), "L4": (121, 30.3), "A10G": (70, 31.5),
    "A10": (125, 31.2), "RTX 4090": (165, 82.6), "RTX 3090": (71, 35.6), "V100": (math.nan, 15.7),
    "T4": (math.nan, 8.1),
}  # fmt: skip
"""Makers' TFLOP/s in bf16 (dense, tensor cores) and in fp32 (without TF32), by name of device."""
SPOTS, EPOCHS = 47_681, 15  # of the paper's largest study and its training
PAPER = {k: v for k, v in asdict(contrast.PAPER).items() if k not in ("epochs", "batch_size")}
WAYS = {
    "published loop": Way("", "published", settings=PAPER),
    "published loop, a worker per core": Way(
        "", "published", workers=os.cpu_count(), settings=PAPER
    ),
    "paper preset, fp32": Way("", "book", settings=PAPER),
    "paper preset, bf16": Way("", "book", settings=PAPER | {"precision": "bf16"}),
    "paper preset, bf16, compiled": Way("", "compiled", settings=PAPER | {"precision": "bf16"}),
    "book's augmentation, AdamW, bf16": Way("", "book", settings={"precision": "bf16"}),
}
CASE = "ViT-B/32, 224 px, batch 1,024"


def not_measured() -> list[dict]:
    """Return the rows of a machine without a GPU."""
    return [{"what": "GPU", "case": CASE, "way": way, "measured": "not here"} for way in WAYS]


def run(*, dry: bool = False, micro_batch: int | None = None) -> list[dict]:
    """Measure every way; return one row each."""
    device = torch.device("cpu" if dry else "cuda")
    tower, size, batch, steps = ("mini", 96, 16, 4) if dry else ("clip", 224, 1024, 16)
    least = 8 if dry else 200
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tiles"
        bench_train.prepare({folder: (size, 64 if dry else None)})
        pairs = bench_train.pairs_of(folder / "train")
        pairs = pairs.of(np.arange(batch * steps) % len(pairs))
        flop = flop_per_tile(tower, size)
        for name, way in WAYS.items():
            way = replace(way, settings=way.settings | {"batch_size": batch})
            row = {"what": "GPU", "case": "dry run" if dry else CASE, "way": name}
            row["device"] = device_name(device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if way.loop == "published":
                epochs = bench_train.published(way, folder, tower, str(device))
                facts = [next(epochs) for _ in range(4)][1:]
                each = [f["tiles"] / f["seconds"] for f in facts]
                row |= {"steps": sum(f["tiles"] for f in facts) // batch}
                del epochs  # and its model with it
            else:
                each, more = _book(way, tower, pairs, device, math.ceil(least / steps), micro_batch)
                row |= {"steps": len(each) * steps} | more
            row |= limits(row, statistics.median(each), flop, way.settings["precision"], device)
            rows.append(row)
    return rows


def _book(
    way: Way, tower: str, pairs, device: torch.device, epochs: int, micro: int | None
) -> tuple[list[float], dict]:
    """Train as `fit` does; return tiles per second of each epoch, and what it is bound by."""
    start, settings = bench_train.model_of(way, tower, pairs.other.shape[1])
    settings = replace(settings, epochs=1 + epochs, micro_batch=micro, keep="last")
    run = training.Run(start, pairs, None, settings, device)
    if way.loop == "compiled":
        run.model.image.trunk.compile(backend="inductor" if device.type == "cuda" else "eager")
    run.go(None, None, None)
    history = run.history().query("measure == 'tiles per second' and epoch > 1")
    batches = training._batches(run.slides, settings, 1, 1)
    loaded = run._load((0, batches[0]))
    resident = tuple(x.to(device) for x in loaded)
    run.model.train()

    def load() -> None:
        for batch in training._ahead(run._load, list(enumerate(batches))):
            for part in batch:
                part.to(device, non_blocking=True)

    def steps() -> None:
        for i in range(len(batches)):
            run._step(resident, (0, i))

    tiles = settings.batch_size * len(batches)
    alone = {"step_alone": tiles / _seconds(steps, device)}
    alone["loading_alone"] = tiles / _seconds(load, device)
    return history["value"].tolist(), alone


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Median time of three."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def limits(
    row: dict, rate: float, flop: float, precision: str, device: torch.device
) -> dict[str, object]:
    """Set a rate against what the device can do, and tell how long the paper's training takes."""
    bf16 = precision == "bf16"
    peak = next((p[not bf16] for k, p in PEAKS.items() if k in row["device"]), None)
    tflops = rate * flop / 1e12
    found = {"tiles_per_s": rate, "gflop_per_tile": flop / 1e9, "tflop_per_s": tflops}
    found["peak_tflop_per_s"], found["share_of_peak"] = peak, peak and tflops / peak
    found["matmul_tflop_per_s"] = matmul(device, torch.bfloat16 if bf16 else torch.float32)
    if "step_alone" in row:
        found["share_of_step_alone"] = rate / row["step_alone"]
        found["bound_by"] = "loading" if row["loading_alone"] < row["step_alone"] else "the device"
    found["paper_hours"] = SPOTS * EPOCHS / rate / 3600
    found["paper_hours_how"] = (
        f"{SPOTS} spots x {EPOCHS} epochs at the median of {row['steps']} steps"
    )
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Measure TFLOP/s of one large product: what the device gives at best."""
    n = 8192 if device.type == "cuda" else 256
    a = torch.randn(n, n, device=device, dtype=dtype)
    _seconds(lambda: a @ a, device)
    return 10 * 2 * n**3 / _seconds(lambda: [a @ a for _ in range(10)], device) / 1e12


def flop_per_tile(tower: str, size: int) -> float:
    """Count the multiplications and additions of one tile's way through the tower and back."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    image = towers.load(tower, pretrained=False).train()
    image.trunk.patch_dropout = torch.nn.Identity()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        image(torch.rand(2, 3, size, size)).sum().backward()
    return counter.get_total_flops() / 2


def device_name(device: torch.device) -> str:
    """Return what the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
