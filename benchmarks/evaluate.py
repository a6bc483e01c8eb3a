"""Measure the probe's sweep and t-SNE against the published way, into ``results/evaluate.json``.

Run by hand, on a quiet machine: about a quarter of an hour on two cores. ``--rows`` makes it
smaller, to see that it runs; write that elsewhere with ``--out``.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
from pathlib import Path

import bench_maps
import bench_probe
from data import commit, machine

RESULTS = Path(__file__).resolve().parent.parent / "results" / "evaluate.json"
PACKAGES = ("numpy", "scikit-learn", "scipy", "openTSNE")


def versions() -> dict[str, str]:
    """Say with what was measured."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def stamped(rows: list[dict]) -> list[dict]:
    """Say in each row of which commit it is: parts may be measured apart."""
    return [
        row | {"commit": commit(), "measured": datetime.date.today().isoformat()} for row in rows
    ]


def main() -> None:
    """Run the benchmarks and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of the probe; t-SNE runs once")
    parser.add_argument("--only", choices=["probe", "maps"])
    options = parser.parse_args()
    n, d, rows = options.rows, options.columns, []
    if options.only != "maps":
        rows += stamped(bench_probe.run(n, d, options.seeds, options.repeats))
    if options.only != "probe":
        rows += stamped(bench_maps.run(n, d))
    if options.only and options.out.exists():  # the rows of the other part stay
        new = {row["what"] for row in rows}
        rows += [r for r in json.loads(options.out.read_text())["rows"] if r["what"] not in new]
    report = {
        "what": "evaluation against the published way, by benchmarks/evaluate.py",
        "measured": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith("OMP_")},
        "packages": versions(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print(" ".join(f"{k}={v}" for k, v in shown.items() if not isinstance(v, list)))


if __name__ == "__main__":
    main()
