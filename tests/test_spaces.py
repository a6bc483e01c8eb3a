"""Neighbourhoods: mixing of batches, and whether a map keeps what it shows."""

import numpy as np
import pytest

from helpers.files import DataError
from helpers.metrics import mixing, nearest_neighbours, neighbour_overlap, procrustes


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
        (lambda x, b: (x, ["one"] * 300), "needs two batches"),
        (lambda x, b: (x, [None, *b[1:]]), "no spot without one"),
        (lambda x, b: (x, b[:-1]), "299 batches for 300 spots"),
        (lambda x, b: (x, b, ["a"]), "1 labels for 300 spots"),
        (lambda x, b: (x[185:215], b[185:215]), "too few spots for 30 neighbours"),
        (lambda x, b: (np.where(x > 2, np.nan, x), b), "NaN or infinite"),
    ],
)
def test_what_cannot_be_mixed_is_said(change, message):
    with pytest.raises(DataError, match=message):
        mixing(*change(*two_batches(0.0)))


def test_within_labels_there_must_be_labels():
    with pytest.raises(DataError, match="no labels to look within"):
        mixing(*two_batches(0.0), within_label=True)


def test_a_map_that_only_turns_keeps_all_neighbours():
    x = np.random.default_rng(0).normal(size=(200, 2))
    turned = 3 * x @ np.array([[0.6, -0.8], [0.8, 0.6]]) + 5
    assert neighbour_overlap(x, turned)["value"][0] == 1
    assert procrustes(x, turned) == pytest.approx(0, abs=1e-12)


def test_a_map_of_something_else_keeps_them_by_chance():
    rng = np.random.default_rng(0)
    row = neighbour_overlap(rng.normal(size=(400, 5)), rng.normal(size=(400, 2)), k=40).iloc[0]
    assert row["expected"] == pytest.approx(40 / 399)
    assert row["value"] == pytest.approx(row["expected"], abs=0.02)
    assert procrustes(rng.normal(size=(400, 2)), rng.normal(size=(400, 2))) > 0.95


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
        (lambda: neighbour_overlap(np.zeros((9, 2)), np.zeros((9, 2)), k=9), "no 9 neighbours"),
        (lambda: procrustes(np.eye(3), np.eye(4)), "cannot be laid together"),
        (lambda: procrustes(np.ones((4, 2)), np.eye(4)[:, :2]), "all spots in one place"),
        (lambda: procrustes(np.eye(3), np.eye(3) * np.nan), "NaN or infinite"),
    ],
)
def test_what_cannot_be_compared_is_said(call, message):
    with pytest.raises(DataError, match=message):
        call()
