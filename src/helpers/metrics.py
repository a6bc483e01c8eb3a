"""Clusters, mixing of batches, neighbours kept, retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse, spatial, stats
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import (
    adjusted_rand_score,
    calinski_harabasz_score,
    davies_bouldin_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from helpers.files import DataError
from helpers.probing import check_features
from helpers.slides import spot_table

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.slides import Spots


KS = (1, 5, 10)
"""Ranks at which recall is measured; the last one decides which epoch is the best."""

SEPARATION = {
    "silhouette": (silhouette_score, "higher"),
    "calinski_harabasz": (calinski_harabasz_score, "higher"),
    "davies_bouldin": (davies_bouldin_score, "lower"),
}
"""The three scores of Chen et al. 2024, and which way is better."""


# --------------------------------------------------------------------------- finding clusters


def kmeans(x: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """Return a number from 0 to k - 1 per row, by k-means, the best of ten starts.

    Raises
    ------
    DataError
        When there are more clusters than spots, or than different ones; or a value is NaN.
    """
    x = check_space(x)
    different = len(np.unique(x, axis=0))
    if not 1 <= k <= different:
        what = f"{k} clusters of {len(x)} spots, {different} of them different"
        raise DataError(what, fix="ask for fewer clusters")
    return KMeans(k, n_init=10, random_state=seed).fit_predict(x)


def leiden(
    x: np.ndarray, *, resolution: float = 1.0, n_neighbors: int = 15, seed: int = 0
) -> np.ndarray:
    """Return a number per row, by Leiden on scanpy's graph of nearest neighbours.

    The graph has Gaussian weights, as wide as a row's neighbourhood.

    Parameters
    ----------
    x
        ``(n, d)``, a handful of principal components or an embedding.
    resolution
        Higher for more clusters.
    n_neighbors, seed
        Of the graph, and of both.
    """
    return _communities(_even(_feature_graph(x, n_neighbors, seed)), resolution, seed)


def spatial_leiden(
    x: np.ndarray,
    spots: Spots,
    *,
    weight: float = 0.5,
    resolution: float = 1.0,
    n_neighbors: int = 15,
    n_spatial: int = 6,
    seed: int = 0,
) -> np.ndarray:
    """Return a number per row, by Leiden on features and tissue: neighbours stay together.

    The graph is a weighted mean of the one of `leiden` and squidpy's of the nearest spots of the
    same slide, each brought to the same sum of weights first.

    Parameters
    ----------
    x, resolution, n_neighbors, seed
        As for `leiden`.
    spots
        What `helpers.slides.spot_table` takes, in the row order of `x`.
    weight
        Of the tissue: 0 is `leiden`, 1 looks at no feature.
    n_spatial
        Neighbours on the tissue: 6 for hexagonal Visium, 4 for the square array of ST.
    """
    if not 0 <= weight <= 1:
        raise DataError(f"a weight of {weight}", fix="give 0 (features alone) to 1 (tissue alone)")
    table = spot_table(spots)
    check_features(x, table)
    features, tissue = _feature_graph(x, n_neighbors, seed), _tissue_graph(table, n_spatial)
    mixed = (1 - weight) * _even(features) + weight * _even(tissue)
    mixed.eliminate_zeros()
    return _communities(mixed, resolution, seed)


def _even(graph: sparse.csr_matrix) -> sparse.csr_matrix:
    """Bring the weights of a graph to a sum of 1 per spot."""
    return sparse.csr_matrix(graph * (graph.shape[0] / graph.sum()))


def _feature_graph(x: np.ndarray, n_neighbors: int, seed: int) -> sparse.csr_matrix:
    import scanpy as sc
    from anndata import AnnData

    x = check_space(x)
    if len(x) <= n_neighbors:
        what = f"{len(x)} spots have no {n_neighbors} neighbours each"
        raise DataError(what, fix="set n_neighbors below the number of spots")
    adata = AnnData(np.ascontiguousarray(x))
    # Gaussian weights: UMAP's would cost half a minute of compiling in every new process.
    sc.pp.neighbors(adata, n_neighbors, use_rep="X", method="gauss", random_state=seed)
    return adata.obsp["connectivities"]


def _tissue_graph(table: pd.DataFrame, n_spatial: int) -> sparse.csr_matrix:
    import squidpy as sq
    from anndata import AnnData

    few = table["slide"].value_counts()
    if few.min() <= n_spatial:
        what = f"{few.min()} spots have no {n_spatial} neighbours each"
        raise DataError(what, slide=str(few.idxmin()), fix="leave the slide out")
    adata = AnnData(obs=table[["slide"]].astype("category"))
    adata.obsm["spatial"] = table[["x_px", "y_px"]].to_numpy(float)
    how = {"library_key": "slide", "n_neighs": n_spatial, "copy": True}
    graph = sq.gr.spatial_neighbors_knn(adata, **how).connectivities
    return graph.maximum(graph.T)


def _communities(graph: sparse.csr_matrix, resolution: float, seed: int) -> np.ndarray:
    import scanpy as sc
    from anndata import AnnData

    adata = AnnData(obs=pd.DataFrame(index=[str(i) for i in range(graph.shape[0])]))
    how = {"flavor": "igraph", "n_iterations": 2, "directed": False, "random_state": seed}
    sc.tl.leiden(adata, resolution, adjacency=graph, **how)
    return adata.obs["leiden"].astype(int).to_numpy()


# --------------------------------------------------------------------------- scores


def agreement(labels: Sequence, clusters: Sequence) -> pd.DataFrame:
    """Compare clusters with labels: 1 is the same division, about 0 is chance for ARI.

    NMI (with the arithmetic mean of the entropies) is above 0 by chance alone, the more so the more
    clusters there are. Rows without a label are left out.

    Returns
    -------
    DataFrame
        One row for ``"ari"`` and one for ``"nmi"``: `measure`, `value`, `n`, `classes`, `clusters`.
    """
    labels, clusters = pd.Series(np.asarray(labels, object)), np.asarray(clusters)
    if len(labels) != len(clusters):
        raise DataError(f"{len(labels)} labels for {len(clusters)} spots in clusters")
    known = labels.notna().to_numpy()
    truth, found = labels[known].astype(str).to_numpy(), clusters[known]
    if len(set(truth)) < 2:
        raise DataError("fewer than two classes are labelled: nothing to agree with")
    values = {
        "ari": adjusted_rand_score(truth, found),
        "nmi": normalized_mutual_info_score(truth, found),
    }
    facts = {"n": len(truth), "classes": len(set(truth)), "clusters": len(set(found))}
    return pd.DataFrame([{"measure": m, "value": float(v), **facts} for m, v in values.items()])


def pca_normalised(x: np.ndarray, dim: int, seed: int = 0) -> np.ndarray:
    """Bring an embedding to `dim` principal components and rows of length 1.

    Distances, and with them all scores of separation, depend on both. Rows that are 0 stay 0.

    Raises
    ------
    DataError
        When it has fewer dimensions or spots than that.
    """
    x = check_space(x)
    if not 1 <= dim <= min(x.shape):
        fix = "take the smallest number of dimensions among the embeddings you compare"
        raise DataError(f"{len(x)} spots in {x.shape[1]} dimensions have no {dim}", fix=fix)
    return normalize(PCA(dim, random_state=seed).fit_transform(x))


def separation(x: np.ndarray, spots: Spots, *, dim: int = 32, seed: int = 0) -> pd.DataFrame:
    """Score how far apart the labels of each slide lie, on the same footing.

    Parameters
    ----------
    x
        Embedding ``(n, d)`` in the row order of the spots; brought to `dim` dimensions and length 1
        by `pca_normalised`, over all slides at once.
    spots
        What `helpers.slides.spot_table` takes. Unlabelled spots are left out, and so are slides
        where fewer than two classes, or as many as spots, are labelled.
    dim, seed
        Of `pca_normalised`; the same for every embedding that is compared.

    Returns
    -------
    DataFrame
        One row per slide and score: `slide`, `donor`, `measure`, `value`, `better` (``"higher"`` or
        ``"lower"``), `n`, `classes`, `dim`.
    """
    table, rows = spot_table(spots), []
    x = pca_normalised(check_features(x, table), dim, seed)
    for slide, at in table.groupby("slide", sort=False).indices.items():
        at = at[table["label"].iloc[at].notna()]
        label = table["label"].to_numpy()[at].astype(str)
        if 2 <= len(set(label)) < len(at):
            facts = {"slide": slide, "donor": table["donor"].iloc[at[0]]}
            for name, (function, better) in SEPARATION.items():
                value = {"measure": name, "value": float(function(x[at], label)), "better": better}
                rows.append(facts | value | {"n": len(at), "classes": len(set(label)), "dim": dim})
    if not rows:
        raise DataError("no slide has two labelled classes", fix="add annotated slides")
    return pd.DataFrame(rows)


def wilcoxon(
    first: Mapping[str, float] | pd.Series, second: Mapping[str, float] | pd.Series
) -> pd.DataFrame:
    """Test whether `first` differs from `second` on the same slides (Wilcoxon signed-rank).

    The p-value is exact for up to 13 pairs, ties and all: every way to flip the signs is counted.
    With `n` differences that are not 0 no two-sided p-value is below ``2 / 2**n``: with 5 slides or
    fewer it cannot be below 0.05, however clear the difference. Sections of one donor are no
    independent pairs; where there are several, average them by donor first.

    Parameters
    ----------
    first, second
        One score per slide or donor, by its name; names that are not in both are left out.

    Returns
    -------
    DataFrame
        One row: `n` (pairs), `median` (of the differences), `p`, `smallest_p` and `can_reach_05`.
        Without a difference anywhere, `p` is 1.
    """
    table = pd.DataFrame({"first": pd.Series(first), "second": pd.Series(second)}).dropna()
    if table.empty:
        raise DataError("the two have no slide in common", fix="name the scores by slide")
    gap = (table["first"] - table["second"]).to_numpy(float).round(12)  # ties are ties
    n = int((gap != 0).sum())
    method = stats.PermutationMethod(n_resamples=2**13) if n <= 13 else "auto"
    p = float(stats.wilcoxon(gap[gap != 0], method=method).pvalue) if n > 1 else 1.0
    least = min(1.0, 2 / 2**n)
    row = {"n": len(table), "median": float(np.median(gap)), "p": p, "smallest_p": least}
    return pd.DataFrame([row | {"can_reach_05": least < 0.05}])


def check_space(x: np.ndarray) -> np.ndarray:
    """Return an embedding as a finite array ``(n, d)``."""
    x = np.asarray(x)
    if x.ndim != 2 or x.dtype.kind not in "fiub":
        raise DataError(f"an embedding is {x.dtype} {x.shape}", fix="give numbers (n, d)")
    if not np.isfinite(x).all():
        bad = ~np.isfinite(x).all(axis=1)
        what = f"{bad.sum()} rows of the embedding are NaN or infinite, the first is {bad.argmax()}"
        raise DataError(what, fix="leave these spots out, or look at what made them")
    return x if x.dtype == np.float32 else x.astype(np.float64)


# --------------------------------------------------------------------------- neighbourhoods


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
    near = nearest_neighbours(x, k)
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


def nearest_neighbours(x: np.ndarray, k: int) -> np.ndarray:
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
    pairs = zip(nearest_neighbours(first, k), nearest_neighbours(second, k), strict=True)
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


def recall(
    image: np.ndarray | Tensor, other: np.ndarray | Tensor, ks: Sequence[int] = KS
) -> pd.DataFrame:
    """How often the right partner is among the k nearest of all, both ways.

    Parameters
    ----------
    image, other
        Unit vectors ``(n, dim)``, row i of one belongs to row i of the other.
    ks
        How many of the nearest are looked at.

    Returns
    -------
    DataFrame
        One row per direction and k: `direction`, `k`, `recall`, `chance` (k / n) and
        `times_chance`. A tie counts against the model: one that sees no difference scores 0.

    Raises
    ------
    DataError
        When an embedding is not finite.
    """
    import torch  # late: nothing else here needs it, and it takes seconds

    image, other = torch.as_tensor(image), torch.as_tensor(other)
    if not (torch.isfinite(image).all() and torch.isfinite(other).all()):
        raise DataError("embeddings hold NaN or infinite values", fix="look at the training loss")
    n, rows = len(image), []
    for direction, (ask, answer) in {
        "image to other": (image, other),
        "other to image": (other, image),
    }.items():
        rank = []
        for first in range(0, n, 1024):  # n x n numbers would not fit for a whole study
            near = ask[first : first + 1024] @ answer.T
            own = near.diagonal(first).unsqueeze(1)
            rank.append((near >= own).sum(1) - 1)
        rank = torch.cat(rank)
        for k in ks:
            share, chance = float((rank < k).float().mean()), min(k / n, 1.0)
            rows.append((direction, k, share, chance, share / chance))
    return pd.DataFrame(rows, columns=["direction", "k", "recall", "chance", "times_chance"])
