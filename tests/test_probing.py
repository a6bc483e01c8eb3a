"""Probes learn from training alone; scores are those of scikit-learn, with honest intervals."""

import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_spots import SCALES, SLIDES, shuffled, spots, telling
from scipy.special import expit, logit
from scipy.stats import t as student_t
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from helpers import metrics, probing
from helpers.files import DataError
from helpers.probing import (
    FEWEST,
    NEAR,
    PENALTIES,
    confusion,
    coordinates,
    difference,
    logistic,
    logistic_path,
    majority,
    measure,
    predict,
    predict_at,
    scale_by_slide,
    score,
    spatial_neighbours,
)
from helpers.splits import Fold, Splits, inside, ladder, left_out, random_spots

HERE = Path(__file__).parent
quick = partial(logistic, alphas=(1.0, 0.01))
RUNGS = ["random spots", "spatial blocks", "left-out section", "left-out donor"]


def macro_f1(predictions: pd.DataFrame) -> float:
    return score(predictions)["value"][0]


def found(predictions: pd.DataFrame) -> float:
    return score(predictions)["value"][1]


def rungs_of(table: pd.DataFrame) -> dict[str, Splits]:
    return ladder(table, SCALES, together=True)  # fewer folds, less time


# --------------------------------------------------------------------------- honest


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize(
    "predictor", [quick, spatial_neighbours], ids=["probe", "spatial_neighbours"]
)
def test_shuffled_labels_score_at_chance(rung, predictor):
    """486 spots of 3 classes: three standard errors around a third."""
    table = shuffled(spots())
    x = np.hstack([telling(spots(), noise=0.3), coordinates(table, 3)])
    predictions = predict(x, rungs_of(table)[rung], predictor)
    assert abs(found(predictions) - 1 / 3) < 3 * np.sqrt(2 / 9 / len(predictions))


@pytest.mark.parametrize("rung", RUNGS)
def test_labels_that_can_be_told_are_told(rung):
    assert found(predict(telling(spots(), noise=0.3), rungs_of(spots())[rung], quick)) > 0.85


def test_a_split_that_tests_on_training_is_seen_by_shuffled_labels():
    table = shuffled(spots())
    splits = random_spots(table)
    every = np.arange(len(table))
    leak = Splits("leak", splits.spots, (Fold("all", every, every),))
    assert found(predict(telling(table), leak, partial(spatial_neighbours, k=1))) == 1


def test_the_test_part_changes_nothing_in_what_is_fitted(monkeypatch):
    """Scaler, penalty and weights stay, to the bit, when test features and labels become absurd."""
    fitted = []

    class Watched(LogisticRegression):
        def fit(self, x, y):
            super().fit(x, y)
            fitted.append((self.C, self.coef_.copy(), self.intercept_.copy(), x.copy()))
            return self

    monkeypatch.setattr(probing, "LogisticRegression", Watched)
    table, x = spots(), telling(spots())
    splits = left_out(table)
    only_c = Splits("C", splits.spots, splits.folds[2:])
    test = only_c.folds[0].test
    honest = predict(x, only_c)
    first, fitted = fitted.copy(), []
    monkeypatch.setattr(Watched, "fit", _recording(fitted))
    x[test] = 1e6 * np.random.default_rng(5).normal(size=x[test].shape)
    only_c.spots["label"] = np.where(only_c.spots["donor"] == "C", "absurd", splits.spots["label"])
    absurd = predict(x, only_c)
    assert honest["setting"].iloc[0] == absurd["setting"].iloc[0]
    assert len(first) == len(fitted) > len(PENALTIES)
    for one, other in zip(first, fitted, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def _recording(fitted: list):
    def fit(self, x, y):
        LogisticRegression.fit(self, x, y)
        fitted.append((self.C, self.coef_.copy(), self.intercept_.copy(), x.copy()))
        return self

    return fit


def test_the_penalty_is_chosen_inside_training_and_used():
    """By hand: macro-F1 over the inner folds of left-out donors, then a fit with the penalty."""
    table, x = spots(), telling(spots(), noise=1.5, d=60)
    splits = left_out(table)
    chosen = predict(x, splits)
    y = table["label"].to_numpy()
    for fold in splits.folds:
        donor, inner = table["donor"].to_numpy()[fold.train], {}
        for alpha in PENALTIES:
            truth, said = [], []
            for name in sorted(set(donor)):
                train, held = fold.train[donor != name], fold.train[donor == name]
                model = logistic_path(x[train], y[train], [alpha])[alpha]
                truth.extend(y[held])
                said.extend(model.predict(x[held]))
            inner[alpha] = f1_score(truth, said, average="macro")
        rows = chosen[chosen["fold"] == fold.name]
        setting = rows["setting"].iloc[0]
        near = max(inner.values()) - NEAR
        assert inner[setting] > near - 0.01  # a cold start ends a little elsewhere
        stronger = [value for alpha, value in inner.items() if alpha > setting]
        assert all(value < near + 0.01 for value in stronger)
        alone = predict(x, splits, partial(logistic, alphas=[setting]))
        alone = alone[alone["fold"] == fold.name]
        assert np.abs(rows["confidence"] - alone["confidence"]).max() < 0.1


def test_the_fixed_penalties_include_the_chosen_one():
    table, x = spots(), telling(spots())
    split = left_out(table)
    fixed = predict_at(x, split)
    assert tuple(fixed) == PENALTIES
    for name, part in predict(x, split).groupby("fold"):
        same = fixed[part["setting"].iloc[0]]
        assert list(same[same["fold"] == name]["predicted"]) == list(part["predicted"])
    alone = predict(x, split, partial(logistic, alphas=(100.0,)))
    assert list(alone["predicted"]) == list(fixed[100.0]["predicted"])


def test_a_predictor_is_never_shown_a_label_of_the_test_part():
    asked = []

    def curious(known, x, where):
        asked.append((set(known.spots.index) & set(where.index), list(where), len(known.y)))
        return majority(known, x, where)

    predict(telling(spots()), left_out(spots()), curious)
    assert len(asked) == 3
    for both, columns, n in asked:
        assert both == set()
        assert "label" not in columns
        assert n == 2 * 162


@pytest.mark.parametrize("rung", RUNGS)
def test_a_penalty_is_judged_on_another_donor_whatever_the_split(rung, monkeypatch):
    asked = []

    def watched(spots):
        inner = inside(spots)
        asked.append(inner.name)
        return inner

    monkeypatch.setattr(probing, "inside", watched)
    predict(telling(spots()), rungs_of(spots())[rung], quick)
    assert set(asked) == {"left-out donor"}


def test_features_of_a_tower_that_is_fitted_in_each_fold():
    table, asked = spots(), []

    def features(fold: Fold) -> np.ndarray:
        asked.append(fold.name)
        return telling(table, seed=len(asked))

    predictions = predict(features, left_out(table), quick)
    assert asked == ["A", "B", "C"]
    for i, name in enumerate(asked):
        one = predictions[predictions["fold"] == name]
        again = predict(telling(table, seed=i + 1), left_out(table), quick)
        assert one["predicted"].tolist() == again[again["fold"] == name]["predicted"].tolist()


# --------------------------------------------------------------------------- what comes out


def test_one_row_per_labelled_spot():
    table = spots()
    table.iloc[::7, table.columns.get_loc("label")] = None
    predictions = predict(telling(spots()), random_spots(table))
    assert sorted(predictions["spot"]) == sorted(table.index[table["label"].notna()])
    joined = table.loc[predictions["spot"]]
    assert (joined["label"].to_numpy() == predictions["truth"]).all()
    assert (joined["donor"].to_numpy() == predictions["donor"]).all()
    assert predictions["confidence"].between(1 / 3, 1).all()
    assert set(predictions["setting"]) <= set(PENALTIES)
    assert predictions["block"].nunique() == 8 * len({group for _, group in SLIDES.values()})


def test_unlabelled_spots_change_nothing():
    table, x = spots(), telling(spots())
    table.iloc[::5, table.columns.get_loc("label")] = None
    some = predict(x, left_out(table))
    known = table["label"].notna().to_numpy()
    without = predict(x[known], left_out(table[known]))
    np.testing.assert_array_equal(some["predicted"], without["predicted"])


def test_a_classifier_of_scikit_learn_is_a_predictor():
    table, x = spots(), telling(spots())
    model = make_pipeline(StandardScaler(), LogisticRegression())
    splits = left_out(table)
    ours = predict(x, splits, model).set_index("spot").loc[table.index]
    theirs = cross_val_predict(model, x, table["label"], cv=splits)
    np.testing.assert_array_equal(ours["predicted"], theirs)
    dummy = predict(x, splits, DummyClassifier(strategy="most_frequent"))
    assert found(dummy) == pytest.approx(1 / 3)
    never_in_doubt = predict(x, splits, LinearSVC())  # it has no predict_proba
    assert set(never_in_doubt["confidence"]) == {1}
    assert found(never_in_doubt) > 0.5


def test_the_path_ends_where_a_fresh_start_does():
    x, y = telling(spots(), d=20), spots()["label"].to_numpy()
    for alpha, model in logistic_path(x, y, PENALTIES).items():
        np.testing.assert_allclose(model[0].mean_, x.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(model[0].scale_, x.std(axis=0), rtol=1e-5)
        fresh = LogisticRegression(C=1 / (alpha * len(x)), class_weight="balanced", tol=1e-8,
                                   max_iter=10_000)  # fmt: skip
        fresh.fit(StandardScaler().fit_transform(x), y)
        apart = np.abs(
            fresh.predict_proba(StandardScaler().fit_transform(x)) - model.predict_proba(x)
        )
        assert apart.max() < 0.05


def test_classes_are_balanced():
    """A rare class is found more often than by a regression that lets frequent ones win."""
    table = spots()
    table = table[(table["label"] != "inner") | (np.arange(len(table)) % 9 == 0)]
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (0.1 * 300)))
    rare = table.index[table["label"] == "inner"]
    share = {}
    for name, predictor in {"balanced": partial(logistic, alphas=[0.1]), "plain": plain}.items():
        predicted = predict(telling(table), random_spots(table), predictor).set_index("spot")
        share[name] = (predicted.loc[rare, "predicted"] == "inner").mean()
    assert share["balanced"] > share["plain"] + 0.2


def test_scaled_by_slide():
    table, x = spots().sample(frac=1, random_state=0), telling(spots())
    x[:, 2] = 7
    scaled = pd.DataFrame(scale_by_slide(x, table)).groupby(table["slide"].to_numpy())
    np.testing.assert_allclose(scaled.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(ddof=0).iloc[:, [0, 1, 3]], 1, rtol=1e-4)
    assert x[0, 2] == 7  # a copy
    of_fold = scale_by_slide(lambda fold: x, table)
    np.testing.assert_array_equal(of_fold(None), scale_by_slide(x, table))


# --------------------------------------------------------------------------- baselines


def test_coordinates_run_from_minus_one_to_one_on_each_slide():
    table = spots().sample(frac=1, random_state=0)
    table.loc[table["slide"] == "B1", ["x_px", "y_px"]] *= 3
    xy = pd.DataFrame(coordinates(table), index=table["slide"])
    assert (xy.groupby(level=0).min() == -1).all(axis=None)
    assert (xy.groupby(level=0).max() == 1).all(axis=None)
    assert coordinates(spots(), 3).shape == (486, 9)
    line = spots()
    line["x_px"] = 7.0
    assert np.isfinite(coordinates(line)).all()


def test_neighbours_tell_what_is_around_a_spot():
    predictions = predict(np.zeros((486, 1)), random_spots(spots()), spatial_neighbours)
    assert found(predictions) > 0.85


def test_neighbours_know_nothing_on_another_slide():
    table, nothing = spots(), np.zeros((486, 1))
    there = predict(nothing, left_out(table), spatial_neighbours)
    blind = predict(nothing, left_out(table), majority)
    np.testing.assert_array_equal(there["predicted"], blind["predicted"])


def test_neighbours_of_another_slide_have_no_vote():
    """Two slides with the same places, one upside down: only its own neighbours are right."""
    table = spots(slides={"A1": ("A", "A"), "B1": ("B", "B")})
    table.loc[table["slide"] == "B1", "label"] = table.loc[
        table["slide"] == "B1", "label"
    ].to_numpy()[::-1]
    assert found(predict(np.zeros((162, 1)), random_spots(table), spatial_neighbours)) > 0.8


# --------------------------------------------------------------------------- trouble


def test_a_donor_without_labels_is_skipped(caplog):
    table = spots()
    table.loc[table["donor"] == "B", "label"] = None
    predictions = predict(telling(spots()), left_out(table, um_per_px=SCALES), quick)
    assert set(predictions["fold"]) == {"A", "C"}
    assert "1 folds lack labels in training or test: ['B']" in caplog.text


def test_labels_of_one_donor_alone_cannot_be_probed_across_donors():
    table = spots()
    table.loc[table["donor"] != "B", "label"] = None
    with pytest.raises(DataError, match="every fold of left-out donor lacks labels"):
        predict(telling(spots()), left_out(table))


def test_one_class_only_is_refused():
    table = spots().assign(label="outer")
    with pytest.raises(DataError, match=r"at least two classes, and the labels are \['outer'\]"):
        predict(telling(spots()), left_out(table))
    with pytest.raises(DataError, match=r"the labels are \[\]"):
        predict(telling(spots()), left_out(table.assign(label=None)))


def test_training_with_one_class_predicts_it(caplog):
    table = spots(slides={"A1": ("A", "A"), "B1": ("B", "B")})
    table.loc[table["donor"] == "A", "label"] = "outer"
    with pytest.raises(DataError, match="give um_per_px"):
        predict(telling(table), left_out(table))
    predictions = predict(telling(table), left_out(table, um_per_px=SCALES))
    of_b = predictions[predictions["fold"] == "B"]
    assert set(of_b["predicted"]) == {"outer"}
    assert "fold B: training holds one class, 'outer'" in caplog.text


def test_training_too_small_to_be_split(caplog):
    """One small section is left: the buffer takes all of it."""
    table = spots(side=3, slides={"A1": ("A", "A"), "B1": ("B", "B")})
    predictions = predict(telling(table), left_out(table, um_per_px=SCALES))
    assert set(predictions["setting"]) == {0.01}
    assert "too small to be split to choose a penalty: the middle one, 0.01, is used" in caplog.text


def test_a_class_in_one_fold_only_counts_as_wrong():
    table = spots()
    table.loc[(table["donor"] == "B") & (table["label"] == "inner"), "label"] = "only B"
    x = telling(spots(), noise=0.1)
    predictions = predict(x, left_out(table))
    rare = predictions[predictions["truth"] == "only B"]
    assert len(rare) == 54
    assert "only B" not in set(rare["predicted"])
    right = predictions["truth"] == predictions["predicted"]
    recall = right.groupby(predictions["truth"]).mean()
    assert recall["only B"] == 0
    assert found(predictions) == pytest.approx(recall.mean())  # of four classes, not of three


def test_constant_features_say_nothing(caplog):
    with caplog.at_level(logging.ERROR):
        predictions = predict(np.full((486, 4), 1e4, np.float32), left_out(spots()))
    assert np.isfinite(predictions["confidence"]).all()
    np.testing.assert_allclose(predictions["confidence"], 1 / 3, atol=1e-3)


def test_a_constant_column_does_no_harm():
    x = telling(spots())
    with_it = np.hstack([x, np.full((486, 1), 1e4, np.float32)])
    np.testing.assert_array_equal(
        predict(x, left_out(spots()))["predicted"], predict(with_it, left_out(spots()))["predicted"]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_features_are_refused(bad):
    x = telling(spots())
    x[100, 3] = bad
    with pytest.raises(
        DataError,
        match="slide A2: the features of 1 of 486 spots are NaN or infinite, first spot A2_1x2",
    ):
        predict(x, left_out(spots()))
    with pytest.raises(DataError, match="spot A2_1x2"):
        predict(lambda fold: x, left_out(spots()))


def test_rows_that_do_not_match_are_refused():
    x = telling(spots())
    with pytest.raises(DataError, match=r"\(485, 8\) for 486 spots"):
        predict(x[:-1], left_out(spots()))
    with pytest.raises(DataError, match=r"\(486,\) for 486 spots"):
        predict(x[:, 0], left_out(spots()))
    named = pd.DataFrame(x, index=spots().index)
    predict(named, left_out(spots()), majority)
    with pytest.raises(DataError, match="the row names of the features differ"):
        predict(named.iloc[::-1], left_out(spots()), majority)


# --------------------------------------------------------------------------- scores


def made(
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
    table = made()
    parts = confusion(*(table[c].to_numpy() for c in ("truth", "predicted", "block")))
    whole = confusion(table["truth"].to_numpy(), table["predicted"].to_numpy())
    assert parts.shape == (12, 3, 3)
    np.testing.assert_array_equal(parts.sum(0), whole)


def test_the_interval_is_the_one_made_by_hand():
    """Leave each cluster out, ask scikit-learn, and take the spread on the logit scale."""
    table = made(clusters=7, each=20)
    left = [table[table["block"] != block] for block in range(7)]
    scores = [f1_score(part["truth"], part["predicted"], average="macro") for part in left]
    whole = f1_score(table["truth"], table["predicted"], average="macro")
    spread = logit(scores) - np.mean(logit(scores))
    reach = student_t.ppf(0.975, 6) * np.sqrt(6 / 7 * (spread**2).sum())
    found = score(table).iloc[0]
    assert found["low"] == pytest.approx(expit(logit(whole) - reach))
    assert found["high"] == pytest.approx(expit(logit(whole) + reach))


def test_an_interval_over_spots_would_be_too_narrow():
    table = made(clusters=20, each=50)
    wide = score(table)
    narrow = score(table.assign(block=np.arange(len(table))))
    assert (wide["high"] - wide["low"])[0] > 2 * (narrow["high"] - narrow["low"])[0]


def study(rng: np.random.Generator, clusters: int, shares: np.ndarray) -> tuple[pd.DataFrame, ...]:
    """Two models on one study: clusters differ in their classes and in how hard they are."""
    mix = rng.dirichlet(2 * shares, clusters).repeat(24, axis=0)
    truth = (mix.cumsum(axis=1) < rng.uniform(size=(len(mix), 1))).sum(axis=1)
    hard = rng.normal(0, 0.8, clusters)
    block, tables = np.arange(clusters).repeat(24), []
    for skill in (1.0, 0.5):
        right = expit(skill - hard + rng.normal(0, 0.3, clusters))[block]
        wrong = (truth + rng.integers(1, len(shares), len(truth))) % len(shares)
        said = np.where(rng.uniform(size=len(truth)) < right, truth, wrong)
        spot = np.arange(len(truth))
        tables.append(pd.DataFrame({"truth": truth.astype(str), "predicted": said.astype(str),
                                    "block": block, "slide": "s", "spot": spot}))  # fmt: skip
    return tuple(tables)


@pytest.mark.parametrize("clusters", [8, 24, 64])
@pytest.mark.parametrize("rarest", [0.2, 0.03], ids=["balanced", "a class of 3 %"])
def test_intervals_cover_the_truth(clusters, rarest):
    """At the numbers of pieces that the studies have: 8 on her2st, 24 on mob, 96 on dlpfc."""
    shares = np.array([rarest, *[(1 - rarest) / 4] * 4])
    one, two = study(np.random.default_rng(1), 8000, shares)
    true = score(one)["value"]
    true_gap = difference(one, two)["value"]
    rng, held, asked = np.random.default_rng(2), np.zeros(4), 0
    while asked < 200:
        first, second = study(rng, clusters, shares)
        rows, gap = score(first), difference(first, second)
        if rows["note"].any():
            continue  # of 8 pieces, often a single one holds the rare class
        asked += 1
        for i, (table, value) in enumerate(((rows, true), (gap, true_gap))):
            held[2 * i : 2 * i + 2] += (table["low"] <= value) & (value <= table["high"])
    assert (held / asked >= 0.90).all()
    assert (held / asked <= 0.98).all()


def test_a_class_in_a_single_cluster_has_no_interval():
    table = made()
    table.loc[table["block"] == 3, "truth"] = "d"
    rows = score(table)
    assert rows[["low", "high"]].isna().all(axis=None)
    assert set(rows["note"]) == {"a class lies in a single block: no interval"}


def test_a_perfect_score_has_no_interval():
    rows = score(made().assign(predicted=lambda t: t["truth"]))
    assert rows["value"].tolist() == [1, 1]
    assert rows["low"].isna().all()
    assert set(rows["note"]) == {"a score of 0 or 1 has no spread: no interval"}


def test_a_tidy_table():
    table = score(made(), each="fold")
    assert list(table) == ["fold", "measure", "value", "low", "high", "n", "classes", "over",
                           "clusters", "note"]  # fmt: skip
    assert len(table) == 4 * 2
    one = made()
    one = one[one["fold"] == 2]
    np.testing.assert_allclose(table[table["fold"] == 2]["value"], score(one)["value"])


def test_the_level_of_an_interval():
    wide, narrow = score(made(), level=0.99), score(made(), level=0.5)
    assert (wide["low"] < narrow["low"]).all()
    assert (narrow["high"] < wide["high"]).all()


@pytest.mark.parametrize("donors", [1, 3, FEWEST - 1])
def test_few_clusters_have_no_interval(donors):
    table = made().assign(donor=lambda t: t["block"] % donors)
    rows = score(table, over="donor")
    assert rows[["low", "high"]].isna().all(axis=None)
    several = "s" if donors > 1 else ""
    assert set(rows["note"]) == {f"{donors} donor{several}: too few for an interval"}
    assert score(made().assign(donor=lambda t: t["block"] % FEWEST), "donor")["low"].notna().all()


def test_a_difference_is_paired():
    """What both have in common cancels: the interval of a difference is far narrower."""
    first = made(clusters=20, each=50)
    second = first.copy()
    worse = np.random.default_rng(1).uniform(size=len(second)) < 0.05
    second.loc[worse, "predicted"] = "a"
    gap = difference(first, second)
    alone = score(first)
    assert gap["low"][0] > 0
    assert (gap["high"] - gap["low"])[0] < (alone["high"] - alone["low"])[0] / 3
    np.testing.assert_allclose(gap["value"], gap["first"] - gap["second"])
    np.testing.assert_allclose(gap["first"], alone["value"])


def test_a_difference_of_differences():
    tables = [made(seed=i).assign(truth=made()["truth"]) for i in range(4)]
    gains = difference(tuple(tables[:2]), tuple(tables[2:]))
    one, two = difference(*tables[:2]), difference(*tables[2:])
    np.testing.assert_allclose(gains["value"], one["value"] - two["value"])
    np.testing.assert_allclose(gains["first"], one["value"])
    np.testing.assert_allclose(gains["second"], two["value"])
    assert gains["low"].notna().all()
    same = difference(tuple(tables[:2]), tuple(tables[:2]))
    assert (same[["value", "low", "high"]] == 0).all(axis=None)


def test_a_difference_joins_by_spot_whatever_the_order():
    first, second = made(seed=0), made(seed=1)
    second["truth"] = first["truth"]
    mixed = second.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(difference(first, second), difference(first, mixed))
    half = difference(first, second.iloc[:150])
    assert half["n"].tolist() == [150, 150]
    np.testing.assert_allclose(half["first"], score(first.iloc[:150])["value"])


def test_a_difference_of_nothing_is_nothing():
    same = difference(made(), made())
    assert (same[["value", "low", "high"]] == 0).all(axis=None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: score(t, "patient"), r"lacks the columns \['patient'\]"),
        (lambda t: score(t.iloc[:0]), "the table of predictions is empty"),
        (lambda t: difference(t, pd.concat([t, t])), "duplicate spot id"),
        (lambda t: difference(t, t.assign(slide="other")), "share no spot"),
        (lambda t: difference(t, t.assign(truth="z")), "different truths"),
    ],
)
def test_what_cannot_be_scored_is_said(call, message):
    with pytest.raises(DataError, match=message):
        call(made())


# --------------------------------------------------------------------------- the whole way


def whole() -> str:
    """Everything that sorts, draws or hashes, as text."""
    table = spots().assign(label=lambda t: t["label"].astype("category"))
    x, rungs = telling(table), ladder(table, SCALES, together=True)
    quick = partial(logistic, alphas=(1.0, 0.1))
    found = [predict(x, rungs[name], quick) for name in ("random spots", "left-out donor")]
    tables = [
        *found,
        difference(*found, over="donor"),
        metrics.mixing(x, table["donor"], table["label"]),
        pd.DataFrame(metrics.kmeans(x, 4)),
    ]
    names = [fold.name for rung in rungs.values() for fold in rung.folds]
    return "\n".join([*names, *(one.to_csv() for one in tables)])


def test_another_process_finds_the_same():
    """The order of sets and hashes has no say (the published splits differ in each process)."""
    path = [str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": other, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", "from test_probing import whole; print(whole())"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == whole().strip()
    assert len(done.stdout) > 10_000


def test_a_leak_through_neighbours_is_named_in_numbers():
    """Features that know only where a spot lies on its own slide: near others they seem to see."""
    table = spots()
    rng = np.random.default_rng(0)
    table["label"] = np.concatenate(
        [
            np.roll(part.to_numpy(), 27 * i)
            for i, (_, part) in enumerate(table.groupby("slide")["label"])
        ]
    )  # each slide has its layers at another height
    slide = np.unique(table["slide"], return_inverse=True)[1]
    place = np.eye(54)[slide * 9 + (table["y_px"] / 100).astype(int)]
    x = place + 0.01 * rng.normal(size=place.shape)
    rungs = ladder(table, SCALES, together=True)
    quick = partial(logistic, alphas=(0.1, 0.001))
    random = predict(x, rungs["random spots"], quick)
    donor = predict(x, rungs["left-out donor"], quick)
    assert score(random)["value"][1] > 0.9
    gap = difference(random, donor, over="block").iloc[1]
    assert gap["low"] > 0.3
    assert gap["second"] == pytest.approx(1 / 3, abs=0.15)
