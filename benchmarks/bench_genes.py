"""Counts and gene panels: this book's way against the published one, in paired runs.

Reading counts. The published way is ``pandas.read_csv(path, index_col=0)``, which ends in a dense
table. The book's way is `helpers.counts.load`: with an empty cache (the file is streamed into a
sparse matrix, and the cache is written), and again from the cache.

Overlap-HVG. The published way is written from its description: read every dense table with pandas,
keep the genes that all slides share, write these as text, put the text files under each other, read
the result with pandas again, make a dense AnnData, filter, normalise, log1p, choose. The book's way
streams the same files into sparse matrices (no cache) and calls `helpers.genes.overlap_hvg`. Both
must choose the same genes.

``run()`` returns rows for ``benchmarks/data.py``. Each way runs in a process of its own, which
measures the time of the work and its peak memory. Imports, and what numba compiles, are left out of
the clock for both ways by a warm-up on tiny files; the memory they take is in the peak. The ways
take turns, so that a busy machine slows both, and the file system's cache is warm for both.
All tables are simulated here, at the size of real slides, so that the figures need no download.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_tiles import peak_mb


def write_table(path: Path, spots: int, genes: list[str], density: float, seed: int) -> None:
    """Write a dense count table with about the given share of cells above zero."""
    rng = np.random.default_rng(seed)
    mean = np.random.default_rng(0).gamma(density, 2.0, 60_000)[: len(genes)]
    with path.open("w") as file:
        file.write("," + ",".join(genes) + "\n")
        for i in range(spots):
            row = rng.poisson(mean * rng.gamma(3, 1 / 3))
            file.write(f"{path.stem}_{i}," + ",".join(map(str, row.tolist())) + "\n")


def write_sections(folder: Path, slides: int, spots: int = 350, genes: int = 15_600) -> list[Path]:
    """Write sections of the size of the HER2+ breast study; each lacks a few other genes."""
    names = np.array([f"GENE{j}" for j in range(genes)])
    paths = []
    for k in range(slides):
        kept = np.random.default_rng(k).random(genes) > 0.01
        paths.append(folder / f"section_{k:02}_count.csv")
        write_table(paths[-1], spots, names[kept].tolist(), 0.2, seed=k)
    return paths


# --- the ways ----------------------------------------------------------------------------------


def published_read(path: Path):
    """Read a dense table with pandas."""
    import pandas as pd

    return pd.read_csv(path, index_col=0)


def book_read(path: Path):
    """Read a table through the cache: the first time it is streamed and the cache written."""
    from helpers import counts

    return counts.load(path)


def published_overlap(paths: list[Path], folder: Path, n: int = 100) -> list[str]:
    """Choose the overlap-HVG by way of text files."""
    import anndata as ad
    import pandas as pd
    import scanpy as sc

    frames = [pd.read_csv(path, index_col=0) for path in paths]
    shared = frames[0].columns
    for frame in frames[1:]:
        shared = shared[shared.isin(frame.columns)]
    parts = [folder / f"part_{k}.csv" for k in range(len(paths))]
    for frame, part in zip(frames, parts, strict=True):
        frame[shared].to_csv(part, header=False)
    del frames, frame
    together = folder / "together.csv"
    with together.open("w") as out:
        for part in parts:
            out.write(part.read_text())
    table = pd.read_csv(together, index_col=0, header=None)
    table.columns = shared
    adata = ad.AnnData(table)
    sc.pp.filter_cells(adata, min_genes=1)
    sc.pp.filter_genes(adata, min_cells=1)
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=n)
    return adata.var_names[adata.var["highly_variable"]].tolist()


def book_overlap(paths: list[Path], folder: Path, n: int = 100) -> list[str]:
    """Choose the overlap-HVG from sparse matrices; `folder` is not needed."""
    import anndata as ad
    import pandas as pd

    from helpers import counts, genes

    slides = {}
    for path in paths:
        read = counts.read_dense(path, slide=path.stem)
        slides[path.stem] = ad.AnnData(
            read.X, pd.DataFrame(index=read.spots), pd.DataFrame(index=read.genes)
        )
    return list(genes.overlap_hvg(slides, n).genes)


# --- one run in a process of its own -----------------------------------------------------------


def _same(result: object) -> str:
    """Return a text that is equal for equal results of the two ways."""
    if isinstance(result, list):
        return hashlib.sha256(" ".join(sorted(result)).encode()).hexdigest()
    matrix = result.X if hasattr(result, "X") else result.to_numpy()
    by_gene = np.asarray(matrix.sum(axis=0), dtype=float).ravel()
    by_spot = np.asarray(matrix.sum(axis=1), dtype=float).ravel()
    return hashlib.sha256(by_gene.tobytes() + by_spot.tobytes()).hexdigest()


def _child(way: str, *files: str) -> None:
    """Warm up on tiny files, run one way once, print what was measured."""
    paths = [Path(name) for name in files]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("STIMAGE_CACHE", str(folder / "cache"))
        names = [f"GENE{j}" for j in range(300)]
        tiny = [folder / "tiny_a.csv", folder / "tiny_b.csv"]
        for k, path in enumerate(tiny):
            write_table(path, 40, names, 0.5, seed=k)
        read = {"published_read": published_read, "book_read": book_read}.get(way)
        choose = {"published_overlap": published_overlap, "book_overlap": book_overlap}.get(way)
        result = read(tiny[0]) if read else choose(tiny, folder, 10)
        start = time.perf_counter()
        result = read(paths[0]) if read else choose(paths, folder)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb(), "same": _same(result)}))


def _run(way: str, paths: list[Path], cache: Path | None = None) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "STIMAGE_CACHE"}
    if cache:
        environment["STIMAGE_CACHE"] = str(cache)
    command = [sys.executable, __file__, way, *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _rows(what: str, case: str, results: dict[str, list[dict]]) -> list[dict]:
    """One row per way: medians, and the ratio to the published way run by run."""
    base = results["published"]
    assert len({r["same"] for runs in results.values() for r in runs}) == 1, f"{what} differ"
    rows = []
    for way, runs in results.items():
        ratios = [p["seconds"] / r["seconds"] for p, r in zip(base, runs, strict=True)]
        memory = [r["peak_mb"] / p["peak_mb"] for p, r in zip(base, runs, strict=True)]
        rows.append(
            {
                "what": what,
                "case": case,
                "way": way,
                "seconds": statistics.median(r["seconds"] for r in runs),
                "peak_mb": statistics.median(r["peak_mb"] for r in runs),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "memory_share": statistics.median(memory),
                "runs": len(runs),
            }
        )
    return rows


def compare_read(case: str, path: Path, repeats: int = 3) -> list[dict]:
    """Compare reading one table: published, book the first time, book from its cache."""
    results = {"published": [], "book, first time": [], "book, cached": []}
    with tempfile.TemporaryDirectory() as cache:
        _run("book_read", [path], Path(cache))  # fills the cache for the third way
        for repeat in range(repeats):
            for way in list(results)[:: 1 if repeat % 2 == 0 else -1]:
                name = "published_read" if way == "published" else "book_read"
                kept = Path(cache) if way == "book, cached" else None
                results[way].append(_run(name, [path], kept))
    return _rows("counts", case, results)


def compare_overlap(case: str, paths: list[Path], repeats: int = 3) -> list[dict]:
    """Compare choosing the overlap-HVG of several tables."""
    results = {"published": [], "book": []}
    for repeat in range(repeats):
        for way in list(results)[:: 1 if repeat % 2 == 0 else -1]:
            results[way].append(_run(f"{way}_overlap", paths))
    return _rows("overlap-HVG", case, results)


def run(repeats: int = 3) -> list[dict]:
    """Measure everything; return rows for ``benchmarks/data.py``."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = folder / "visium_count.csv"
        write_table(table, 5_000, [f"GENE{j}" for j in range(33_000)], 0.2, seed=0)
        rows += compare_read("Visium scale, simulated: 5,000 x 33,000", table, repeats)
        table.unlink()
        sections = write_sections(folder, 24)
        rows += compare_read("HER2 scale, simulated: 350 x 15,400", sections[0], repeats)
        rows += compare_overlap("24 sections of HER2 scale, simulated", sections, repeats)
    return rows


if __name__ == "__main__":
    _child(*sys.argv[1:])
