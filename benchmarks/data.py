"""Measure the data layer against the way the paper's snippets do it, into ``results/data.json``.

Run by hand (`make benchmarks`); a quarter of an hour. Every pair of ways runs in turns on the same
files, so the ratios hold where seconds do not: another machine, or this one on a busy day.
Real slides are used when ``STIMAGE_ROOT`` names a copy; a row says which data it was measured on.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import bench_genes
import bench_tiles
import psutil

RESULTS = Path(__file__).resolve().parent.parent / "results" / "data.json"
PACKAGES = ("numpy", "pandas", "scipy", "anndata", "scanpy", "pillow", "simplejpeg", "numba")


def machine() -> dict[str, str | int | float]:
    """Describe what the figures were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """Return the commit that was measured, marked when files differ from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../src", "../benchmarks"],
        check=True,
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + ("-changed" if changed.stdout.strip() else "")


def main() -> None:
    """Run the benchmarks and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = {
        "what": "the data layer against the published way, by benchmarks/data.py",
        "measured": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "rows": bench_tiles.run() + bench_genes.run(),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["rows"]:
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print(" ".join(f"{k}={v}" for k, v in shown.items() if not isinstance(v, list)))


if __name__ == "__main__":
    main()
