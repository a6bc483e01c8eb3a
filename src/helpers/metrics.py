"""Clusters and their scores, mixing of batches, neighbours kept by a map, retrieval.

Importing this module does not import torch; `recall` does when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse, stats
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


def pca_normalised(x: np.ndarray, dim: int, seed: int = 0) -> np.ndarray:
    """Reduce an embedding to `dim` principal components and scale its rows to length 1.

    Distances, and with them all scores of separation, depend on both. Rows of zeros stay zero.

    Raises
    ------
    DataError
        When there are fewer dimensions or spots than `dim`.
    """
    x = check_features(x)
    if not 1 <= dim <= min(x.shape):
        what = f"{len(x)} spots in {x.shape[1]} dimensions do not have {dim} principal components"
        raise DataError(what, fix="use the smallest number of dimensions among your embeddings")
    return normalize(PCA(dim, random_state=seed).fit_transform(x))


def kmeans(x: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """Return a number from 0 to k - 1 per row, by k-means, the best of ten starts.

    Raises
    ------
    DataError
        When there are more clusters than different rows, or a value is NaN.
    """
    x = check_features(x)
    different = len(np.unique(x, axis=0))
    if not 1 <= k <= different:
        what = f"{k} clusters of {len(x)} spots, {different} of them different"
        raise DataError(what, fix="ask for fewer clusters")
    return KMeans(k, n_init=10, random_state=seed).fit_predict(x)


def leiden(
    x: np.ndarray, *, resolution: float = 1.0, n_neighbors: int = 15, seed: int = 0
) -> np.ndarray:
    """Return a cluster number per row, by Leiden on scanpy's graph of nearest neighbours.

    The graph has Gaussian weights, as wide as the neighbourhood of a row.

    Parameters
    ----------
    x
        ``(n, d)``, a few principal components or an embedding.
    resolution
        Higher for more clusters.
    n_neighbors, seed
        Of the graph, and of both steps.
    """
    return _communities(_feature_graph(x, n_neighbors, seed), resolution, seed)


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
    """Return a cluster number per row, by Leiden on features and tissue together.

    The graph is a weighted mean of that of `leiden` and squidpy's graph of the nearest spots on the
    same slide, both first scaled to the same sum of weights.

    Parameters
    ----------
    x, resolution, n_neighbors, seed
        As for `leiden`.
    spots
        What `helpers.slides.spot_table` takes, in the row order of `x`.
    weight
        Of the tissue: 0 is `leiden`, 1 ignores the features.
    n_spatial
        Neighbours on the tissue: 6 for hexagonal Visium, 4 for the square array of ST.
    """
    import squidpy as sq
    from anndata import AnnData

    if not 0 <= weight <= 1:
        raise DataError(f"the weight is {weight}", fix="give 0 (features only) to 1 (tissue only)")
    table = spot_table(spots)
    features = _feature_graph(check_features(x, table), n_neighbors, seed)
    few = table["slide"].value_counts()
    if few.min() <= n_spatial:
        what = f"{few.min()} spots cannot have {n_spatial} neighbours each"
        raise DataError(what, slide=str(few.idxmin()), fix="leave the slide out")
    adata = AnnData(obs=table[["slide"]].astype("category"))
    adata.obsm["spatial"] = table[["x_px", "y_px"]].to_numpy(float)
    tissue = sq.gr.spatial_neighbors_knn(
        adata, library_key="slide", n_neighs=n_spatial, copy=True
    ).connectivities
    mixed = (1 - weight) * features + weight * _scaled(tissue.maximum(tissue.T))
    mixed.eliminate_zeros()
    return _communities(mixed, resolution, seed)


def _scaled(graph: sparse.csr_matrix) -> sparse.csr_matrix:
    """Scale the weights of a graph to a sum of 1 per spot, on average."""
    return sparse.csr_matrix(graph * (graph.shape[0] / graph.sum()))


def _feature_graph(x: np.ndarray, n_neighbors: int, seed: int) -> sparse.csr_matrix:
    import scanpy as sc
    from anndata import AnnData

    x = check_features(x)
    if len(x) <= n_neighbors:
        what = f"{len(x)} spots cannot have {n_neighbors} neighbours each"
        raise DataError(what, fix="set n_neighbors below the number of spots")
    adata = AnnData(np.ascontiguousarray(x))
    # Gaussian weights: UMAP's would cost half a minute of compiling in every new process.
    sc.pp.neighbors(adata, n_neighbors, use_rep="X", method="gauss", random_state=seed)
    return _scaled(adata.obsp["connectivities"])


def _communities(graph: sparse.csr_matrix, resolution: float, seed: int) -> np.ndarray:
    import scanpy as sc
    from anndata import AnnData

    adata = AnnData(obs=pd.DataFrame(index=[str(i) for i in range(graph.shape[0])]))
    options = {"flavor": "igraph", "n_iterations": 2, "directed": False, "random_state": seed}
    sc.tl.leiden(adata, resolution, adjacency=graph, **options)
    return adata.obs["leiden"].astype(int).to_numpy()


# --------------------------------------------------------------------------- scores of clusters


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
        what = f"there are {len(labels)} labels and {len(clusters)} cluster numbers"
        raise DataError(what, fix="give one of each per spot")
    known = labels.notna().to_numpy()
    truth, found = labels[known].astype(str).to_numpy(), clusters[known]
    facts = {"n": len(truth), "classes": len(set(truth)), "clusters": len(set(found))}
    if facts["classes"] < 2:
        raise DataError("fewer than two classes are labelled", fix="add annotated slides")
    values = {
        "ari": adjusted_rand_score(truth, found),
        "nmi": normalized_mutual_info_score(truth, found),
    }
    return pd.DataFrame([{"measure": m, "value": float(v), **facts} for m, v in values.items()])


def separation(x: np.ndarray, spots: Spots, *, dim: int = 32, seed: int = 0) -> pd.DataFrame:
    """Score how far apart the labels of each slide lie in an embedding.

    Parameters
    ----------
    x
        Embedding ``(n, d)`` in the row order of the spots; `pca_normalised` over all slides first.
    spots
        What `helpers.slides.spot_table` takes. Unlabelled spots are left out, and so are slides
        with fewer than two classes, or as many classes as spots.
    dim, seed
        Of `pca_normalised`; use the same for all embeddings that are compared.

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

    The p-value is exact for up to 13 pairs, with ties: every way to flip the signs is counted. With
    `n` differences that are not 0 no two-sided p-value is below ``2 / 2**n``, so with 5 slides or
    fewer it cannot be below 0.05. Sections of one donor are not independent; average them by donor
    first.

    Parameters
    ----------
    first, second
        One score per slide or donor, by its name; names that are not in both are left out.

    Returns
    -------
    DataFrame
        One row: `n` (pairs), `median` (of the differences), `p`, `smallest_p` and `can_reach_05`.
        Without any difference, `p` is 1.
    """
    table = pd.DataFrame({"first": pd.Series(first), "second": pd.Series(second)}).dropna()
    if table.empty:
        raise DataError("the two share no slide", fix="name the scores by slide")
    gap = (table["first"] - table["second"]).to_numpy(float).round(12)  # ties are ties
    n = int((gap != 0).sum())
    method = stats.PermutationMethod(n_resamples=2**13) if n <= 13 else "auto"
    p = float(stats.wilcoxon(gap[gap != 0], method=method).pvalue) if n > 1 else 1.0
    least = min(1.0, 2 / 2**n)
    row = {"n": len(table), "median": float(np.median(gap)), "p": p, "smallest_p": least}
    return pd.DataFrame([row | {"can_reach_05": least < 0.05}])


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
    square test at 0.05 (as in kBET of Buettner et al. 2019, doi:10.1038/s41592-018-0254-1). The
    silhouettes are near 0 for batches that mix, and near 1 for labels that stay apart.

    Where batches differ in their shares of labels, perfect mixing would be wrong: use
    `within_label` then.

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
        Look for neighbours among spots of the same label, and average over labels, weighted by
        their spots. Unlabelled spots are left out, and so are labels with one batch or at most `k`
        spots.
    seed
        Of the random batches behind `expected`.

    Returns
    -------
    DataFrame
        One row per measurement: `measure`, `value`, `expected` (mean over ten random permutations
        of the batches; NaN for the silhouette by label), `better`, `n`, `k`.

    Raises
    ------
    DataError
        When there is one batch, too few spots for `k` neighbours, a NaN, or rows do not match.
    """
    x, batch = check_features(x), np.asarray(batch, object)
    label = np.full(len(x), None) if label is None else np.asarray(label, object)
    if not len(x) == len(batch) == len(label):
        what = f"{len(batch)} batches and {len(label)} labels for {len(x)} spots"
        raise DataError(what, fix="give one of each per spot")
    if pd.isna(batch).any() or len(set(batch)) < 2:
        raise DataError("mixing needs at least two batches, and a batch for every spot")
    rng, rows = np.random.default_rng(seed), [np.arange(len(x))]
    if within_label:
        rows = [np.flatnonzero(label == name) for name in sorted(set(label[~pd.isna(label)]))]
        rows = [r for r in rows if len(r) > k and len(set(batch[r])) > 1]
    if not rows or len(rows[0]) <= k:
        of_one = " of one label" if within_label else ""
        raise DataError(f"too few spots{of_one} for {k} neighbours each", fix="use a smaller k")
    found = np.array([_mixing_once(x[r], batch[r], k, rng) for r in rows])
    weights = [len(r) for r in rows]
    (simpson, rejected), (dealt_simpson, dealt_rejected) = np.average(
        found, axis=0, weights=weights
    )
    table = [
        ("batches among neighbours", simpson, dealt_simpson, "higher", sum(weights)),
        ("neighbourhoods rejected", rejected, dealt_rejected, "lower", sum(weights)),
    ]
    for name, groups, expected, better in (
        ("silhouette by batch", batch, 0.0, "lower"),
        ("silhouette by label", label, np.nan, "higher"),
    ):
        there = ~pd.isna(groups)
        if 2 <= len(set(groups[there])) < there.sum():
            value = float(silhouette_score(x[there], groups[there].astype(str)))
            table.append((name, value, expected, better, int(there.sum())))
    return pd.DataFrame(table, columns=["measure", "value", "expected", "better", "n"]).assign(k=k)


def _mixing_once(
    x: np.ndarray, batch: np.ndarray, k: int, rng: np.random.Generator
) -> tuple[tuple[float, float], np.ndarray]:
    """Return both scores of neighbourhoods, and their means over ten random permutations."""
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
    return scores(code), dealt


def nearest_neighbours(x: np.ndarray, k: int) -> np.ndarray:
    """Return the row numbers of the `k` nearest other rows, int ``(n, k)``, the nearest first."""
    x = check_features(x)
    if not 1 <= k < len(x):
        raise DataError(f"{len(x)} spots cannot have {k} neighbours each", fix="use a smaller k")
    return NearestNeighbors(n_neighbors=k).fit(x).kneighbors(return_distance=False)


def neighbour_overlap(first: np.ndarray, second: np.ndarray, k: int = 15) -> pd.DataFrame:
    """Return the share of nearest neighbours in one space that are neighbours in a second one.

    For an embedding and its map, it says how far the map can be trusted; for two maps, such as of
    two seeds, how far they agree. Turning, mirroring or scaling a map changes nothing.

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
    n = len(first)
    if n != len(second):
        what = f"the two spaces have {n} and {len(second)} rows"
        raise DataError(what, fix="give the same spots row by row")
    pairs = zip(nearest_neighbours(first, k), nearest_neighbours(second, k), strict=True)
    kept = np.mean([len(np.intersect1d(a, b, assume_unique=True)) for a, b in pairs]) / k
    row = {"measure": "neighbours kept", "value": kept, "expected": k / (n - 1), "n": n, "k": k}
    return pd.DataFrame([row])


# --------------------------------------------------------------------------- retrieval


def recall(
    image: np.ndarray | Tensor, other: np.ndarray | Tensor, ks: Sequence[int] = KS
) -> pd.DataFrame:
    """Return how often the right partner is among the k nearest of all, in both directions.

    Parameters
    ----------
    image, other
        Unit vectors ``(n, dim)``; row i of one belongs to row i of the other.
    ks
        How many of the nearest count as found.

    Returns
    -------
    DataFrame
        One row per direction and k: `direction`, `k`, `recall`, `chance` (k / n) and
        `times_chance`. A tie counts as wrong, so a model that sees no difference scores 0.

    Raises
    ------
    DataError
        When an embedding holds NaN or infinite values.
    """
    import torch  # takes seconds, and nothing else here needs it

    image, other = torch.as_tensor(image), torch.as_tensor(other)
    if not (torch.isfinite(image).all() and torch.isfinite(other).all()):
        raise DataError("embeddings hold NaN or infinite values", fix="look at the training loss")
    n, rows = len(image), []
    directions = {"image to other": (image, other), "other to image": (other, image)}
    for direction, (query, answer) in directions.items():
        ranks = []
        for first in range(0, n, 1024):  # n x n numbers would not fit for a whole study
            similarity = query[first : first + 1024] @ answer.T
            own = similarity.diagonal(first).unsqueeze(1)
            ranks.append((similarity >= own).sum(1) - 1)
        rank = torch.cat(ranks)
        for k in ks:
            share, chance = float((rank < k).float().mean()), min(k / n, 1.0)
            rows.append((direction, k, share, chance, share / chance))
    return pd.DataFrame(rows, columns=["direction", "k", "recall", "chance", "times_chance"])
