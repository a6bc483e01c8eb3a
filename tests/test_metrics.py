"""Clusters, mixing and maps: found, compared, and refused where they make no sense."""

import numpy as np
import pandas as pd
import pytest
import torch
from made_spots import SLIDES, spots, telling
from scipy import stats
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import nn

from helpers.files import DataError
from helpers.metrics import (
    agreement,
    kmeans,
    leiden,
    mixing,
    nearest_neighbours,
    neighbour_overlap,
    pca_normalised,
    recall,
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
        (lambda: spatial_leiden(telling(spots()), spots(), weight=2), "the weight is 2"),
        (lambda: spatial_leiden(telling(spots())[:9], spots()), r"\(9, 8\) for 486 spots"),
        (lambda: leiden(np.zeros((10, 2)), n_neighbors=15), "10 spots cannot have 15 neighbours"),
        (lambda: leiden(np.full((30, 2), np.nan)), "the features of 30 of 30 spots are NaN"),
        (lambda: kmeans(np.array([[0.0], [np.inf]]), 1), "first row 1"),
        (lambda: agreement(["a", "b"], [1]), "2 labels and 1 cluster numbers"),
        (lambda: agreement(["a", None, "a"], [1, 2, 3]), "fewer than two classes"),
        (lambda: pca_normalised(np.zeros((5, 3)), 4), "5 spots in 3 dimensions do not have 4"),
        (lambda: pca_normalised(np.zeros(5), 1), r"the features are float64 \(5,\)"),
        (
            lambda: separation(telling(spots()), spots().assign(label="a"), dim=2),
            "no slide has two",
        ),
        (lambda: wilcoxon({"a": 1}, {"b": 1}), "share no slide"),
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


def test_pca_normalised_is_one_norm_and_one_dimension():
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


# --------------------------------------------------------------------------- neighbourhoods


def two_batches(apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """200 and 100 points around two places `apart`."""
    rng = np.random.default_rng(seed)
    batch = np.array(["one"] * 200 + ["two"] * 100)
    return rng.normal(size=(300, 4)) + apart * (batch == "two")[:, None], batch


def by_measure(table, column: str = "value") -> dict[str, float]:
    return dict(zip(table["measure"], table[column], strict=True))


def test_batches_that_mix_score_as_dealt_out_at_random():
    table = mixing(*two_batches(0.0))
    value, expected = by_measure(table), by_measure(table, "expected")
    assert value["batches among neighbours"] == pytest.approx(
        expected["batches among neighbours"], abs=0.05
    )
    assert abs(value["neighbourhoods rejected"] - expected["neighbourhoods rejected"]) < 0.08
    assert abs(value["silhouette by batch"]) < 0.05


def test_batches_apart_do_not_mix():
    value = by_measure(mixing(*two_batches(20.0)))
    assert value["batches among neighbours"] == 1
    assert value["neighbourhoods rejected"] == 1
    assert value["silhouette by batch"] > 0.8


def test_the_expectation_knows_the_sizes_of_the_batches():
    """2 to 1: neighbourhoods of a perfect mixture hold 1 / (4/9 + 1/9) = 1.8 batches, not 2."""
    table = mixing(*two_batches(20.0), k=60)
    expected = by_measure(table, "expected")["batches among neighbours"]
    assert expected == pytest.approx(1.8, abs=0.06)
    assert by_measure(table, "expected")["neighbourhoods rejected"] == pytest.approx(0.05, abs=0.05)


def test_within_a_label_other_shares_of_labels_are_no_batch_effect():
    """Two classes far apart, each mixed; but one batch has mostly the first, one the second."""
    rng = np.random.default_rng(0)
    label = rng.choice(["a", "b"], 600)
    batch = np.where(rng.uniform(size=600) < np.where(label == "a", 0.8, 0.2), "one", "two")
    x = rng.normal(size=(600, 3)) + 10 * (label == "b")[:, None]
    over_all, within = (
        mixing(x, batch, label, within_label=w).set_index("measure").loc["neighbourhoods rejected"]
        for w in (False, True)
    )
    assert over_all["value"] > 0.9
    assert abs(within["value"] - within["expected"]) < 0.1


def test_labels_stand_beside_batches():
    x, batch = two_batches(0.0)
    label = np.array(["left", "right", None], object)[np.arange(300) % 3]
    x[:, 0] += 30 * (label == "right")
    table = mixing(x, batch, label)
    row = table[table["measure"] == "silhouette by label"].iloc[0]
    assert row["value"] > 0.7
    assert row["n"] == 200  # unlabelled spots are left out
    assert list(table) == ["measure", "value", "expected", "better", "n", "k"]


def test_mixing_repeats_itself():
    assert mixing(*two_batches(1.0)).equals(mixing(*two_batches(1.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, b: (x, ["one"] * 300), "needs at least two batches"),
        (lambda x, b: (x, [None, *b[1:]]), "a batch for every spot"),
        (lambda x, b: (x, b[:-1]), "299 batches and 300 labels for 300 spots"),
        (lambda x, b: (x, b, ["a"]), "300 batches and 1 labels for 300 spots"),
        (lambda x, b: (x[185:215], b[185:215]), "too few spots for 30 neighbours"),
        (lambda x, b: (np.where(x > 2, np.nan, x), b), "NaN or infinite"),
    ],
)
def test_what_cannot_be_mixed_is_said(change, message):
    with pytest.raises(DataError, match=message):
        mixing(*change(*two_batches(0.0)))


def test_within_labels_there_must_be_labels():
    with pytest.raises(DataError, match="too few spots of one label"):
        mixing(*two_batches(0.0), within_label=True)


def test_a_map_that_only_turns_keeps_all_neighbours():
    x = np.random.default_rng(0).normal(size=(200, 2))
    turned = 3 * x @ np.array([[0.6, -0.8], [0.8, 0.6]]) + 5
    assert neighbour_overlap(x, turned)["value"][0] == 1


def test_a_map_of_something_else_keeps_them_by_chance():
    rng = np.random.default_rng(0)
    row = neighbour_overlap(rng.normal(size=(400, 5)), rng.normal(size=(400, 2)), k=40).iloc[0]
    assert row["expected"] == pytest.approx(40 / 399)
    assert row["value"] == pytest.approx(row["expected"], abs=0.02)


def test_neighbours_kept_by_hand():
    """On a line 0, 1, 3, 6 and with the second moved to 5: whose nearest is still the same?"""
    first, second = np.array([[0.0], [1], [3], [6]]), np.array([[0.0], [5], [3], [6]])
    assert nearest_neighbours(first, 1).ravel().tolist() == [1, 0, 1, 2]
    assert nearest_neighbours(second, 1).ravel().tolist() == [2, 3, 1, 1]
    assert neighbour_overlap(first, second, k=1)["value"][0] == 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: neighbour_overlap(np.zeros((3, 2)), np.zeros((4, 2))), "3 and 4 rows"),
        (
            lambda: neighbour_overlap(np.zeros((9, 2)), np.zeros((9, 2)), k=9),
            "9 spots cannot have 9 neighbours",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_recall_by_hand():
    image = torch.eye(4)
    other = torch.eye(4)[[0, 1, 3, 2]]  # the last two are swapped
    table = recall(image, other, ks=(1, 2, 4)).set_index(["direction", "k"])
    assert table.loc[("image to other", 1), "recall"] == 0.5
    assert table.loc[("other to image", 1), "recall"] == 0.5
    assert table.loc[("image to other", 4), "recall"] == 1.0
    assert table.loc[("image to other", 2), "chance"] == 0.5
    assert table.loc[("image to other", 1), "times_chance"] == 2.0


def test_recall_directions_differ():
    cosines = torch.tensor([[0.90, 0.50], [0.95, 0.99]])  # rows ask among columns, or the reverse
    table = recall(torch.eye(2), cosines.T, ks=(1,)).set_index("direction")["recall"]
    assert table["image to other"] == 1.0
    assert table["other to image"] == 0.5


def test_a_tie_counts_against_the_model():
    collapsed = np.ones((40, 3), np.float32) / 3**0.5
    assert (recall(collapsed, collapsed)["recall"] == 0).all()


def test_recall_in_blocks_and_of_nan():
    image = nn.functional.normalize(torch.randn(2500, 4), dim=-1)
    other = nn.functional.normalize(image + 0.2 * torch.randn(2500, 4), dim=-1)
    near = image @ other.T
    rank = (near > near.diagonal()[:, None]).sum(1)
    table = recall(image, other, ks=(10,)).set_index("direction")["recall"]
    assert table["image to other"] == pytest.approx(float((rank < 10).float().mean()), abs=1e-3)
    image[7, 2] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        recall(image, other)
