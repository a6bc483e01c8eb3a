"""Clusters: found, compared with labels, and scored on the same footing."""

import numpy as np
import pandas as pd
import pytest
from made_spots import SLIDES, spots, telling
from scipy import stats
from sklearn.metrics import adjusted_rand_score, silhouette_score

from helpers.files import DataError
from helpers.metrics import (
    agreement,
    kmeans,
    leiden,
    pca_normalised,
    separation,
    spatial_leiden,
    wilcoxon,
)


def blobs(n: int = 60, apart: float = 10.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three clouds of `n` points in 5 dimensions."""
    rng, code = np.random.default_rng(seed), np.arange(3).repeat(n)
    return rng.normal(size=(3 * n, 5)) + apart * np.eye(5)[code], code


def ari(labels, clusters) -> float:
    return agreement(labels, clusters)["value"][0]


def test_kmeans_finds_clouds_and_repeats_itself():
    x, code = blobs()
    assert ari(code, kmeans(x, 3)) == 1
    np.testing.assert_array_equal(kmeans(x, 5, seed=1), kmeans(x, 5, seed=1))


@pytest.mark.parametrize("k", [181, 0])
def test_more_clusters_than_spots_are_refused(k):
    with pytest.raises(DataError, match=f"{k} clusters of 180 spots, 180 of them different"):
        kmeans(blobs()[0], k)


def test_more_clusters_than_different_spots_are_refused():
    with pytest.raises(DataError, match="3 clusters of 50 spots, 2 of them different"):
        kmeans(np.arange(2).repeat(25)[:, None], 3)


def test_leiden_finds_clouds_and_repeats_itself():
    x, code = blobs()
    found = leiden(x, resolution=0.3)
    assert ari(code, found) > 0.9
    np.testing.assert_array_equal(found, leiden(x, resolution=0.3))
    assert len(set(leiden(x, resolution=3.0))) > len(set(found))


def test_tissue_keeps_neighbours_together():
    """Noisy features, smooth layers: with the tissue's graph the layers come out, else not."""
    table = spots(slides={"A1": ("A", "A"), "B1": ("B", "B")})
    x = telling(table, noise=0.6)
    alone = spatial_leiden(x, table, weight=0, n_spatial=4)
    np.testing.assert_array_equal(alone, leiden(x))
    mixed = spatial_leiden(x, table, weight=0.5, n_spatial=4)
    assert _disagreeing(table, mixed) < 0.7 * _disagreeing(table, alone)


def _disagreeing(table: pd.DataFrame, clusters: np.ndarray) -> float:
    """Share of vertical neighbours on a slide that are in other clusters."""
    grid = pd.Series(clusters, table.index).to_numpy().reshape(-1, 9, 9)
    return float((np.diff(grid, axis=1) != 0).mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spatial_leiden(telling(spots()), spots(), weight=2), "a weight of 2"),
        (lambda: spatial_leiden(telling(spots())[:9], spots()), r"\(9, 8\) for 486 spots"),
        (lambda: leiden(np.zeros((10, 2)), n_neighbors=15), "10 spots have no 15 neighbours"),
        (lambda: leiden(np.full((30, 2), np.nan)), "30 rows of the embedding are NaN"),
        (lambda: kmeans(np.array([[0.0], [np.inf]]), 1), "the first is 1"),
        (lambda: agreement(["a", "b"], [1]), "2 labels for 1 spots"),
        (lambda: agreement(["a", None, "a"], [1, 2, 3]), "fewer than two classes"),
        (lambda: pca_normalised(np.zeros((5, 3)), 4), "5 spots in 3 dimensions have no 4"),
        (lambda: pca_normalised(np.zeros(5), 1), r"an embedding is float64 \(5,\)"),
        (
            lambda: separation(telling(spots()), spots().assign(label="a"), dim=2),
            "no slide has two",
        ),
        (lambda: wilcoxon({"a": 1}, {"b": 1}), "no slide in common"),
    ],
)
def test_what_cannot_be_done_is_said(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_agreement_leaves_unlabelled_spots_out():
    labels, clusters = ["a", "a", None, "b", "b", "b"], [1, 1, 9, 2, 2, 1]
    table = agreement(labels, clusters)
    assert table["n"].tolist() == [5, 5]
    assert table["value"][0] == adjusted_rand_score(list("aabbb"), [1, 1, 2, 2, 1])
    assert agreement(list("aabb"), [7, 7, 3, 3])["value"].tolist() == [1, 1]


def test_the_same_footing_is_one_norm_and_one_dimension():
    x = 100 + 7 * blobs()[0]
    y = pca_normalised(x, 3)
    assert y.shape == (180, 3)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1)
    np.testing.assert_allclose(np.abs(pca_normalised(5 * x - 3, 3)), np.abs(y), atol=1e-9)


def test_separation_does_not_see_scale_or_useless_dimensions():
    table = spots()
    x = telling(table, noise=0.2)
    wide = 40 * np.hstack([x, np.full((len(x), 500), 3.0)])
    first, second = (separation(e, table, dim=4)["value"] for e in (x, wide))
    np.testing.assert_allclose(first, second, rtol=1e-3)


def test_separation_is_by_slide_and_by_label():
    table = spots().sample(frac=1, random_state=0)
    table.loc[table["slide"] == "A2", "label"] = None
    table.loc[table.index[::6], "label"] = None
    x = telling(table, noise=0.3)
    rows = separation(x, table, dim=4)
    assert sorted(set(rows["slide"])) == sorted(set(SLIDES) - {"A2"})
    assert rows.groupby("slide").size().eq(3).all()
    here = (table["slide"] == "B1").to_numpy() & table["label"].notna().to_numpy()
    expected = silhouette_score(pca_normalised(x, 4)[here], table["label"][here])
    row = rows[(rows["slide"] == "B1") & (rows["measure"] == "silhouette")].iloc[0]
    assert row["value"] == pytest.approx(expected)
    assert (row["n"], row["better"]) == (here.sum(), "higher")


def test_better_separated_labels_score_better_by_all_three():
    far, near = (
        separation(telling(spots(), noise=noise), spots(), dim=4).groupby("measure")["value"].mean()
        for noise in (0.1, 1.0)
    )
    assert far["silhouette"] > near["silhouette"]
    assert far["calinski_harabasz"] > near["calinski_harabasz"]
    assert far["davies_bouldin"] < near["davies_bouldin"]


def test_a_paired_test_over_slides():
    rng = np.random.default_rng(0)
    names = [f"s{i}" for i in range(9)]
    first = pd.Series(rng.normal(0.3, 1, 9), names)
    second = pd.Series(rng.normal(0, 1, 9), names)
    row = wilcoxon(first, second[::-1]).iloc[0]  # joined by name
    expected = stats.wilcoxon(first - second, method="exact")
    assert (row["n"], row["p"]) == (9, pytest.approx(expected.pvalue))
    assert row["median"] == pytest.approx(np.median(first - second))


@pytest.mark.parametrize(
    ("n", "smallest", "can"), [(4, 0.125, False), (5, 0.0625, False), (6, 0.03125, True)]
)
def test_few_slides_can_never_be_significant(n, smallest, can):
    row = wilcoxon({i: i + 1.0 for i in range(n)}, dict.fromkeys(range(n), 0.0)).iloc[0]
    assert row["p"] == row["smallest_p"] == smallest  # the clearest difference there can be
    assert row["can_reach_05"] == can


def test_ties_and_zeros_are_counted_exactly():
    """By hand: gaps 1, 1, -1 and a zero. All 8 signs: W+ is 0, 2 (3x), 4 (3x), 6; ours is 4."""
    row = wilcoxon({"a": 1, "b": 1, "c": -1, "d": 0}, dict.fromkeys("abcd", 0)).iloc[0]
    assert (row["n"], row["p"], row["smallest_p"]) == (4, 1.0, 0.25)
    assert wilcoxon({"a": 1}, {"a": 1})["p"][0] == 1


def test_a_single_pair_proves_nothing():
    row = wilcoxon({"a": 1.0}, {"a": 0.0}).iloc[0]
    assert (row["n"], row["p"], row["can_reach_05"]) == (1, 1.0, False)
