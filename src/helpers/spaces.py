"""Neighbourhoods: whether batches mix in an embedding, and whether two embeddings tell the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import spatial, stats
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from helpers.clusters import check_space
from helpers.files import DataError


def mixing(
    x: np.ndarray,
    batch: Sequence,
    label: Sequence | None = None,
    *,
    k: int = 30,
    within_label: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Score how well batches mix and, beside it, how well labels stay apart.

    ``"batches among neighbours"`` is the inverse Simpson index of the batches of the `k` nearest
    neighbours, averaged: 1 where every neighbourhood is of one batch (as in LISI of Korsunsky et
    al. 2019, doi:10.1038/s41592-019-0619-0, but with plain nearest neighbours). ``"neighbourhoods
    rejected"`` is the share of neighbourhoods whose batches differ from those of all spots by a chi
    square test at 0.05 (as in kBET of Buettner et al. 2019, doi:10.1038/s41592-018-0254-1). Beside
    each stands what batches dealt out at random would give here. The silhouettes are near 0 for
    batches that mix, and near 1 for labels that stay apart.

    Where batches hold other shares of the labels (other layers, other cell types), perfect mixing
    would be wrong: mixing is sought within each label then, with `within_label`.

    Parameters
    ----------
    x
        Embedding ``(n, d)``.
    batch
        Donor, slide or study of each row.
    label
        Class of each row, missing where unknown.
    k
        Neighbours.
    within_label
        Look for neighbours among spots of the same label, and average over labels by their spots.
        Unlabelled spots are left out, and labels with `k` spots or fewer, or one batch.
    seed
        Of the dealing.

    Returns
    -------
    DataFrame
        One row per measurement: `measure`, `value`, `expected` (under perfect mixing; NaN for the
        silhouette by label), `better`, `n`, `k`.

    Raises
    ------
    DataError
        With one batch only, `k` neighbours or fewer, NaN, or rows that do not match.
    """
    x, batch = check_space(x), _names(batch, len(x), "batches")
    if pd.isna(batch).any() or len(set(batch)) < 2:
        raise DataError("mixing needs two batches and no spot without one", fix="add slides")
    label = None if label is None else _names(label, len(x), "labels")
    if within_label and label is None:
        raise DataError("no labels to look within", fix="give label")
    rng, rows = np.random.default_rng(seed), [np.arange(len(x))]
    if within_label:
        rows = [np.flatnonzero(label == name) for name in sorted(set(label[~pd.isna(label)]))]
        rows = [r for r in rows if len(r) > k and len(set(batch[r])) > 1]
    if not rows or len(rows[0]) <= k:
        raise DataError(f"too few spots for {k} neighbours each", fix="set k lower")
    found = np.array([_mixing_once(x[r], batch[r], k, rng) for r in rows])
    weights = [len(r) for r in rows]
    value, expected = np.average(found, axis=0, weights=weights).T
    table = [
        ("batches among neighbours", value[0], expected[0], "higher", sum(weights)),
        ("neighbourhoods rejected", value[1], expected[1], "lower", sum(weights)),
    ]
    names = {"silhouette by batch": (batch, 0.0, "lower")}
    if label is not None:
        names["silhouette by label"] = (label, np.nan, "higher")
    for name, (groups, hoped, better) in names.items():
        there = ~pd.isna(groups)
        if 2 <= len(set(groups[there])) < there.sum():
            one = float(silhouette_score(x[there], groups[there].astype(str)))
            table.append((name, one, hoped, better, int(there.sum())))
    columns = ["measure", "value", "expected", "better", "n"]
    return pd.DataFrame(table, columns=columns).assign(k=k)


def _mixing_once(
    x: np.ndarray, batch: np.ndarray, k: int, rng: np.random.Generator
) -> tuple[tuple[float, float], ...]:
    """Both scores of neighbourhoods, each with its mean over ten random deals of the batches."""
    near = neighbours_of(x, k)
    names, code = np.unique(batch.astype(str), return_inverse=True)
    share = np.bincount(code) / len(code)

    def scores(code: np.ndarray) -> tuple[float, float]:
        counts = np.eye(len(names))[code][near].sum(axis=1)
        simpson = 1 / ((counts / k) ** 2).sum(axis=1)
        chi = ((counts - k * share) ** 2 / (k * share)).sum(axis=1)
        rejected = stats.chi2.sf(chi, len(names) - 1) < 0.05
        return float(simpson.mean()), float(rejected.mean())

    dealt = np.mean([scores(rng.permutation(code)) for _ in range(10)], axis=0)
    return tuple(zip(scores(code), dealt, strict=True))


def neighbours_of(x: np.ndarray, k: int) -> np.ndarray:
    """Return the row numbers of the `k` nearest other rows, int ``(n, k)``, the nearest first."""
    x = check_space(x)
    if not 1 <= k < len(x):
        raise DataError(f"{len(x)} spots have no {k} neighbours each", fix="set k lower")
    return NearestNeighbors(n_neighbors=k).fit(x).kneighbors(return_distance=False)


def neighbour_overlap(first: np.ndarray, second: np.ndarray, k: int = 15) -> pd.DataFrame:
    """Say which share of the nearest neighbours in one space are so in another.

    Of an embedding and its map, it is how far the map can be trusted; of two maps, from two seeds
    say, how far they tell the same. Turning, mirroring or scaling a map changes nothing.

    Parameters
    ----------
    first, second
        ``(n, d)`` and ``(n, e)``, the same spots row by row.
    k
        Neighbours of each spot.

    Returns
    -------
    DataFrame
        One row: `measure`, `value` (0 to 1), `expected` (by chance, ``k / (n - 1)``), `n`, `k`.
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} rows are not the same spots")
    pairs = zip(neighbours_of(first, k), neighbours_of(second, k), strict=True)
    kept = [len(np.intersect1d(a, b, assume_unique=True)) for a, b in pairs]
    row = {
        "measure": "neighbours kept",
        "value": np.mean(kept) / k,
        "expected": k / (len(first) - 1),
    }
    return pd.DataFrame([row | {"n": len(first), "k": k}])


def procrustes(first: np.ndarray, second: np.ndarray) -> float:
    """Return how far two maps are apart when one is moved, turned, mirrored and scaled to fit.

    Parameters
    ----------
    first, second
        ``(n, d)``, the same spots row by row.

    Returns
    -------
    The share of the variance that does not fit: 0 for the same shape, near 1 for nothing in common
    (scipy's ``procrustes``).
    """
    first, second = check_space(first), check_space(second)
    if first.shape != second.shape:
        raise DataError(f"maps of shape {first.shape} and {second.shape} cannot be laid together")
    if not (np.ptp(first, axis=0).any() and np.ptp(second, axis=0).any()):
        raise DataError("a map puts all spots in one place", fix="look at what made it")
    return float(spatial.procrustes(first.astype(float), second.astype(float))[2])


def _names(values: Sequence, n: int, what: str) -> np.ndarray:
    values = np.asarray(values, dtype=object)
    if len(values) != n:
        raise DataError(f"{len(values)} {what} for {n} spots")
    return values
