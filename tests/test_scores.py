"""Scores: as scikit-learn's, with intervals over clusters; calibration."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score

from helpers.files import DataError
from helpers.probing import calibration, calibration_error, confusion, difference, measure, score


def predictions(
    clusters: int = 12, each: int = 25, luck: float = 0.3, seed: int = 0, right: float = 0.6
) -> pd.DataFrame:
    """Predictions that are right more often in some clusters: `luck` is how unequal they are."""
    rng = np.random.default_rng(seed)
    rate = np.clip(right + luck * rng.normal(size=clusters), 0, 1).repeat(each)
    n = clusters * each
    truth = rng.choice(["a", "b", "c"], n)
    hit = rng.uniform(size=n) < rate
    table = pd.DataFrame({"truth": truth, "predicted": np.where(hit, truth, "a")})
    block = np.arange(clusters).repeat(each)
    return table.assign(slide="s", spot=[f"s{i}" for i in range(n)], block=block,
                        donor=block % 3, fold=block % 4, confidence=0.5)  # fmt: skip


labels = st.lists(st.sampled_from("abcd"), min_size=3, max_size=40)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=40, deadline=None)
@given(labels, labels)
def test_the_measures_are_those_of_scikit_learn(truth, predicted):
    n = min(len(truth), len(predicted))
    truth, predicted = np.array(truth[:n]), np.array(predicted[:n])
    found = measure(confusion(truth, predicted))
    there = np.unique(truth)
    expected = f1_score(truth, predicted, labels=there, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)
    if set(predicted) <= set(truth):
        assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
        expected = balanced_accuracy_score(truth, predicted)
        assert found["balanced_accuracy"] == pytest.approx(expected)


def test_counts_by_cluster_add_up():
    table = predictions()
    parts = confusion(*(table[c].to_numpy() for c in ("truth", "predicted", "block")))
    whole = confusion(table["truth"].to_numpy(), table["predicted"].to_numpy())
    assert parts.shape == (12, 3, 3)
    np.testing.assert_array_equal(parts.sum(0), whole)


def test_the_bootstrap_is_the_one_that_repeats_rows():
    """Against the slow way: draw clusters, repeat their rows, ask scikit-learn."""
    table = predictions(clusters=5, each=8)
    fast = score(table, n_boot=60, seed=7)
    rng, slow = np.random.default_rng(7), []
    for counts in rng.multinomial(5, np.full(5, 0.2), 60):
        rows = table.loc[table.index.repeat(counts[table["block"]])]
        there = np.unique(rows["truth"])
        slow.append(f1_score(rows["truth"], rows["predicted"], labels=there, average="macro"))
    low, high = np.quantile(slow, [0.025, 0.975])
    assert fast["low"][0] == pytest.approx(low)
    assert fast["high"][0] == pytest.approx(high)


def test_an_interval_over_spots_would_be_too_narrow():
    table = predictions(clusters=20, each=50)
    wide = score(table)
    narrow = score(table.assign(block=np.arange(len(table))))
    assert (wide["high"] - wide["low"])[0] > 2 * (narrow["high"] - narrow["low"])[0]


def test_the_interval_covers_the_truth():
    """With 20 clusters, about 19 of 20 intervals hold the score of all clusters there could be."""
    rng, held = np.random.default_rng(0), 0
    for seed in range(100):
        rate = rng.uniform(0.4, 0.8, 20).repeat(30)
        truth = rng.choice(["a", "b"], 600)
        other = np.where(truth == "a", "b", "a")
        said = np.where(rng.uniform(size=600) < rate, truth, other)
        block = np.arange(20).repeat(30)
        rows = score(pd.DataFrame({"truth": truth, "predicted": said, "block": block}), seed=seed,
                     n_boot=400)  # fmt: skip
        held += rows["low"][1] <= 0.6 <= rows["high"][1]  # balanced accuracy is the mean rate
    assert 85 <= held <= 99


def test_a_tidy_table():
    table = score(predictions(), each="fold")
    assert list(table) == ["fold", "measure", "value", "low", "high", "n", "classes", "over",
                           "clusters"]  # fmt: skip
    assert len(table) == 4 * 2
    one = predictions()
    one = one[one["fold"] == 2]
    np.testing.assert_allclose(table[table["fold"] == 2]["value"], score(one)["value"])


def test_the_level_and_the_seed_of_an_interval():
    table = predictions()
    wide, narrow = score(table, level=0.99), score(table, level=0.5)
    assert (wide["low"] < narrow["low"]).all()
    assert (narrow["high"] < wide["high"]).all()
    pd.testing.assert_frame_equal(score(table, seed=3), score(table, seed=3))
    assert (score(table, seed=3)["low"] != score(table, seed=4)["low"]).any()


def test_a_single_cluster_has_no_interval():
    table = score(predictions().assign(donor="A"), over="donor")
    assert table["low"].isna().all()
    assert table["high"].isna().all()
    assert table["clusters"].tolist() == [1, 1]


def test_a_difference_is_paired():
    """What both have in common cancels: the interval of a difference is far narrower."""
    first = predictions(clusters=20, each=50)
    second = first.copy()
    worse = np.random.default_rng(1).uniform(size=len(second)) < 0.05
    second.loc[worse, "predicted"] = "a"
    gap = difference(first, second)
    alone = score(first)
    assert gap["low"][0] > 0
    assert (gap["high"] - gap["low"])[0] < (alone["high"] - alone["low"])[0] / 3
    np.testing.assert_allclose(gap["value"], gap["first"] - gap["second"])
    np.testing.assert_allclose(gap["first"], alone["value"])


def test_a_difference_joins_by_spot_whatever_the_order():
    first, second = predictions(seed=0), predictions(seed=1)
    second["truth"] = first["truth"]
    mixed = second.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(difference(first, second), difference(first, mixed))
    half = difference(first, second.iloc[:150])
    assert half["n"].tolist() == [150, 150]
    np.testing.assert_allclose(half["first"], score(first.iloc[:150])["value"])


def test_a_difference_of_nothing_is_nothing():
    same = difference(predictions(), predictions())
    assert (same[["value", "low", "high"]] == 0).all(axis=None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: score(t, "patient"), "no column"),
        (lambda t: score(t.iloc[:0]), "no predictions"),
        (lambda t: difference(t, pd.concat([t, t])), "predicted twice"),
        (lambda t: difference(t, t.assign(slide="other")), "no spot in common"),
        (lambda t: difference(t, t.assign(truth="z")), "another truth"),
        (lambda t: calibration(t.assign(confidence=np.nan)), "no probability"),
        (lambda t: calibration(t.assign(confidence=3.0)), "no probability"),
    ],
)
def test_what_cannot_be_scored_is_said(call, message):
    with pytest.raises(DataError, match=message):
        call(predictions())


def sure(confidence: list[float], right: list[bool]) -> pd.DataFrame:
    said = np.where(right, "a", "b")
    return pd.DataFrame({"truth": "a", "predicted": said, "confidence": confidence})


def test_calibration_by_hand():
    table = calibration(sure([0.45, 0.5, 0.95, 1.0], [True, False, True, False]))
    assert table["n"].tolist() == [2, 2]
    np.testing.assert_allclose(table["low"], [0.4, 0.9])
    np.testing.assert_allclose(table["confidence"], [0.475, 0.975])
    np.testing.assert_allclose(table["accuracy"], [0.5, 0.5])
    np.testing.assert_allclose(table["gap"], [0.025, -0.475])


def test_the_calibration_error_by_hand():
    table = sure([0.6] * 10 + [0.9] * 30, [True] * 6 + [False] * 4 + [True] * 21 + [False] * 9)
    assert calibration_error(table) == pytest.approx(0.75 * 0.2)


def test_a_calibrated_predictor_has_no_error():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 20_000)
    right = rng.uniform(size=20_000) < confidence
    assert calibration_error(sure(confidence, right)) < 0.02
    assert calibration_error(sure(confidence**0.25, right)) > 0.1
