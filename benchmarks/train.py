"""Measure training against the published loop, into ``results/train.json``.

Run by hand, on a quiet machine: about eight minutes on two cores (``--quick``: three, with less
in each row). On a machine with a GPU, ``--gpu`` measures the rows of the GPU and leaves the others
of the file as they are; ``--dry`` runs the code of these rows on a CPU and writes nothing.
"""

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from datetime import date
from pathlib import Path

import bench_gpu
import bench_train
import torch
from bench_train import PUBLISHED, Way
from data import commit, machine

RESULTS = Path(__file__).resolve().parent.parent / "results" / "train.json"
PACKAGES = ("torch", "open_clip_torch", "transformers", "torchvision", "pillow", "numpy")
HALF = "published, patch dropout"
BLOCKS = {"train_blocks": 0}

MINI = [
    Way("published", "published"),
    Way("published, 2 workers", "published", workers=2),
    Way("published, nothing to load", "published", loader="memory"),
    Way("book, like for like", "book"),
    Way("book, idle threads sleep", "book", environment={"OMP_WAIT_POLICY": "PASSIVE"}),
    Way("book, steps alone", "step"),
    Way("book, last 2 of 6 blocks", "book", settings=PUBLISHED | {"train_blocks": 2}),
    Way("book, tower frozen, features once", "book", settings=PUBLISHED | BLOCKS),
    Way(HALF, "published", patch_dropout=0.5, against=HALF),
    Way("book, patch dropout", "book", patch_dropout=0.5, against=HALF),
    Way("book as it is", "book", patch_dropout=0.5, settings={}, against=HALF),
]
VIT = [
    Way("published", "published"),
    Way("book, like for like", "book"),
    Way("book, patch dropout", "book", patch_dropout=0.5),
    Way("book, last 3 of 12 blocks", "book", settings=PUBLISHED | {"train_blocks": 3}),
    Way("book, tower frozen, features once", "book", settings=PUBLISHED | BLOCKS),
]
LOADING = [
    Way("published", "load"),
    Way("published, torchvision backend", "load", loader="torchvision"),
    Way("published, 2 workers", "load", workers=2),
    Way("book", "load book"),
]
RACE = [
    Way("published", "published"),
    Way(
        "published, the book's rate, no decay",
        "published",
        settings=PUBLISHED | {"lr": 5e-4, "weight_decay": 0.0},
    ),
    Way("book as it is", "book", patch_dropout=0.5, settings={}),
]


def cpu(quick: bool) -> list[dict]:
    """Measure the rows of the CPU."""
    repeats, most = (2, 25.0) if quick else (5, 60.0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        all_tiles, mini, vit = (Path(name) / part for part in ("all", "mini", "vit"))
        bench_train.prepare(
            {
                all_tiles: (96, None),
                mini: (96, 128 if quick else 256),
                vit: (224, 32 if quick else 64),
            }
        )
        cases = {
            "mini, 96 px, batch 32": ("mini", mini),
            "ViT-B/32, 224 px, batch 32": ("clip", vit),
        }
        for (case, (tower, folder)), ways in zip(cases.items(), (MINI, VIT), strict=True):
            for what, some in (("loading", LOADING), ("training", ways)):
                begin = time.perf_counter()
                times = repeats if what == "loading" or tower == "mini" else max(1, repeats - 2)
                rows += bench_train.speed(some, folder, tower, case, times, what)
                print(f"{what}, {case}: {time.perf_counter() - begin:.0f} s", flush=True)
        case = "mini, 96 px, batch 32, demo without donor A, recall@10 on A"
        rows += bench_train.race(RACE, all_tiles, "mini", case, most)
    return rows


def facts() -> dict:
    """Say when, on what and with what."""
    return {
        "measured": date.today().isoformat(),
        "commit": commit(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "environment": {k: v for k, v in os.environ.items() if k.startswith("OMP_")},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> None:
    """Run the benchmarks and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--gpu", action="store_true", help="measure the rows of the GPU")
    parser.add_argument("--dry", action="store_true", help="their code on a CPU, writing nothing")
    parser.add_argument("--micro-batch", type=int, help="for a GPU that does not hold 1,024 tiles")
    options = parser.parse_args()
    start = time.perf_counter()
    old = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.dry:
        report, rows = {}, bench_gpu.run(dry=True)
    elif options.gpu:
        if not torch.cuda.is_available():
            parser.error("torch finds no GPU here")
        rows = bench_gpu.run(micro_batch=options.micro_batch)
        kept = [row for row in old.get("rows", []) if row["what"] != "GPU"]
        report = {"what": "", **old, "gpu": facts(), "rows": kept + rows}
    else:
        rows = cpu(options.quick)
        gpu = [row for row in old.get("rows", []) if row["what"] == "GPU"]
        report = facts() | {"quick": options.quick, "gpu": old.get("gpu", "not measured here")}
        report["rows"] = rows + (gpu or bench_gpu.not_measured())
    if report:
        what = "training against the published loop, by benchmarks/train.py"
        report = {"what": what} | {k: v for k, v in report.items() if k != "what"}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print(" ".join(f"{k}={v}" for k, v in shown.items() if not isinstance(v, list)))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
