"""Time t-SNE against scikit-learn's, and compare how many neighbours each map keeps."""

import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
from bench_probe import features
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from helpers.metrics import neighbour_overlap

K = 15  # neighbours that are looked for again on the map


def published(x: np.ndarray, jobs: int) -> np.ndarray:
    """Run scikit-learn as it comes: Barnes-Hut, perplexity 30."""
    return TSNE(random_state=0, n_jobs=jobs).fit_transform(x)


def opened(x: np.ndarray, jobs: int) -> np.ndarray:
    """Run openTSNE as it comes."""
    from openTSNE import TSNE as OpenTSNE

    return np.asarray(OpenTSNE(random_state=0, n_jobs=jobs).fit(x))


def opened_on_components(x: np.ndarray, jobs: int) -> np.ndarray:
    """Run openTSNE on 50 principal components."""
    return opened(PCA(min(50, *x.shape), random_state=0).fit_transform(x), jobs)


WAYS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "published: scikit-learn": published,
    "openTSNE": opened,
    "openTSNE, 50 components": opened_on_components,
}


def run(n: int = 30_000, d: int = 512, repeats: int = 1, jobs: int = 2) -> list[dict]:
    """Run all ways in turns; a way whose package is not here says so."""
    x, _ = features(n, d)
    case = f"{n:,} x {d}, perplexity 30, {jobs} threads, made up"
    here = importlib.util.find_spec("openTSNE") is not None
    ways = {way: f for way, f in WAYS.items() if here or f is published}
    times, kept = {way: [] for way in ways}, {}
    for _ in range(repeats):
        for way, function in ways.items():
            start = time.perf_counter()
            found = function(x, jobs)
            times[way].append(time.perf_counter() - start)
            kept[way] = float(neighbour_overlap(x, found, K)["value"][0])
    base, rows = times[next(iter(WAYS))], []
    for way in WAYS:
        row = {"what": "t-SNE", "case": case, "way": way}
        if way not in times:
            rows.append(row | {"seconds": "not measured here: openTSNE is not installed"})
            continue
        ratios = [b / s for b, s in zip(base, times[way], strict=True)]
        measured = {"seconds": statistics.median(times[way]), "ratio": statistics.median(ratios)}
        rows.append(row | measured | {"ratios": ratios, f"kept of {K}": kept[way], "runs": repeats})
    return rows
