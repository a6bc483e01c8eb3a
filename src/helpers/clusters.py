"""Clusters of spots, how well they match the labels, and how far apart the labels lie."""

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
from sklearn.preprocessing import normalize

from helpers.files import DataError
from helpers.places import describe
from helpers.probes import check_rows

if TYPE_CHECKING:
    from helpers.places import Spots


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
        What `helpers.places.describe` takes, in the row order of `x`.
    weight
        Of the tissue: 0 is `leiden`, 1 looks at no feature.
    n_spatial
        Neighbours on the tissue: 6 for hexagonal Visium, 4 for the square array of ST.
    """
    if not 0 <= weight <= 1:
        raise DataError(f"a weight of {weight}", fix="give 0 (features alone) to 1 (tissue alone)")
    table = describe(spots)
    check_rows(x, table)
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


def same_footing(x: np.ndarray, dim: int, seed: int = 0) -> np.ndarray:
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
        by `same_footing`, over all slides at once.
    spots
        What `helpers.places.describe` takes. Unlabelled spots are left out, and so are slides where
        fewer than two classes, or as many as spots, are labelled.
    dim, seed
        Of `same_footing`; the same for every embedding that is compared.

    Returns
    -------
    DataFrame
        One row per slide and score: `slide`, `donor`, `measure`, `value`, `better` (``"higher"`` or
        ``"lower"``), `n`, `classes`, `dim`.
    """
    table, rows = describe(spots), []
    x = same_footing(check_rows(x, table), dim, seed)
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


def paired(
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
