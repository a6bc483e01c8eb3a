"""Probes: they learn from the training part alone, and are at chance where nothing can be told."""

import logging
from functools import partial

import numpy as np
import pandas as pd
import pytest
from made_spots import SCALES, SLIDES, shuffled, spots, telling
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import f1_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import probing
from helpers.files import DataError
from helpers.probing import (
    ALPHAS,
    PENALTIES,
    coordinates,
    logistic,
    logistic_path,
    majority,
    paper_protocol,
    predict,
    score,
    spatial_neighbours,
)
from helpers.splits import Fold, Splits, ladder, left_out, random_spots

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
    leak = Splits("leak", splits.spots, (Fold("all", every, every),), splits.within)
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
    only_c = Splits("C", splits.spots, splits.folds[2:], splits.within)
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
    """By hand: the best macro-F1 over the inner folds of left-out donors, then a fit with it."""
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
                ((_, model),) = logistic_path(x[train], y[train], [alpha])
                truth.extend(y[held])
                said.extend(model.predict(x[held]))
            inner[alpha] = f1_score(truth, said, average="macro")
        rows = chosen[chosen["fold"] == fold.name]
        setting = rows["setting"].iloc[0]
        assert inner[setting] > max(inner.values()) - 0.01  # a cold start ends a little elsewhere
        alone = predict(x, splits, partial(logistic, alphas=[setting]))
        alone = alone[alone["fold"] == fold.name]
        assert np.abs(rows["confidence"] - alone["confidence"]).max() < 0.02


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


def test_the_inner_split_holds_donors_together():
    parts = []

    def watch(known, x, where):
        inner = known.within(known.spots)
        parts.append((inner.name, len(inner.folds), set(known.spots["donor"])))
        return majority(known, x, where)

    predict(telling(spots()), left_out(spots()), watch)
    assert parts == [
        ("left-out donor", 2, {"B", "C"}),
        ("left-out donor", 2, {"A", "C"}),
        ("left-out donor", 2, {"A", "B"}),
    ]


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
    assert predictions["block"].nunique() == 8 * len(SLIDES)


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


def test_the_path_ends_where_a_fresh_start_does():
    x, y = telling(spots(), d=20), spots()["label"].to_numpy()
    for alpha, model in logistic_path(x, y, ALPHAS):
        np.testing.assert_allclose(model[0].mean_, x.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(model[0].scale_, x.std(axis=0), rtol=1e-5)
        fresh = LogisticRegression(C=1 / (alpha * len(x)), class_weight="balanced", tol=1e-8,
                                   max_iter=10_000)  # fmt: skip
        fresh.fit(StandardScaler().fit_transform(x), y)
        apart = np.abs(
            fresh.predict_proba(StandardScaler().fit_transform(x)) - model.predict_proba(x)
        )
        assert apart.max() < 0.02


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


# --------------------------------------------------------------------------- the paper_protocol


def test_the_paper_protocol_by_hand():
    table, x = spots(), telling(spots())
    rows = paper_protocol(x, table, seeds=[3])
    order = np.random.default_rng(3).permutation(len(table))
    train, validation, test = np.split(order, [int(0.8 * 486), int(0.9 * 486)])
    y = table["label"].to_numpy()
    best = (-1.0,)
    for alpha in ALPHAS:
        model = SGDClassifier(loss="log_loss", alpha=alpha, class_weight="balanced",
                              max_iter=10_000, random_state=3).fit(x[train], y[train])  # fmt: skip
        seen = f1_score(y[validation], model.predict(x[validation]), average="macro")
        asked = f1_score(y[test], model.predict(x[test]), average="macro")
        best = max(best, (seen, alpha, asked), key=lambda one: one[0])
    row = rows[(rows["part"] == "test") & (rows["measure"] == "macro_f1")].iloc[0]
    assert (row["alpha"], row["value"]) == (best[1], pytest.approx(best[2]))


def test_the_paper_protocol_gives_a_tidy_table():
    rows = paper_protocol(telling(spots()), spots(), path=logistic_path)
    assert len(rows) == 5 * 2 * 2
    assert rows.groupby("seed")["alpha"].nunique().eq(1).all()
    assert rows["value"].between(0, 1).all()
    assert rows.groupby("seed")["value"].first().nunique() > 1  # five splits, not one


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


def test_a_donor_with_no_labels_is_passed_over(caplog):
    table = spots()
    table.loc[table["donor"] == "B", "label"] = None
    predictions = predict(telling(spots()), left_out(table, um_per_px=SCALES), quick)
    assert set(predictions["fold"]) == {"A", "C"}
    assert "1 folds have no labels on both sides: ['B']" in caplog.text


def test_labels_of_one_donor_alone_cannot_be_probed_across_donors():
    table = spots()
    table.loc[table["donor"] != "B", "label"] = None
    with pytest.raises(DataError, match="no fold of left-out donor has labels on both sides"):
        predict(telling(spots()), left_out(table))


def test_one_class_only_is_refused():
    table = spots().assign(label="outer")
    for call in (
        lambda: predict(telling(spots()), left_out(table)),
        lambda: paper_protocol(telling(spots()), table),
    ):
        with pytest.raises(DataError, match=r"1 class \['outer'\]: there is nothing to tell apart"):
            call()
    with pytest.raises(DataError, match="0 classes"):
        predict(telling(spots()), left_out(table.assign(label=None)))


def test_training_with_one_class_predicts_it(caplog):
    table = spots(slides={"A1": ("A", "A"), "B1": ("B", "B")})
    table.loc[table["donor"] == "A", "label"] = "outer"
    with pytest.raises(DataError, match="give um_per_px, to left_out too"):
        predict(telling(table), left_out(table))
    predictions = predict(telling(table), left_out(table, um_per_px=SCALES))
    of_b = predictions[predictions["fold"] == "B"]
    assert set(of_b["predicted"]) == {"outer"}
    assert "fold B: all of training is 'outer'" in caplog.text


def test_training_too_small_to_be_split(caplog):
    """One small section is left: the buffer takes all of it."""
    table = spots(side=3, slides={"A1": ("A", "A"), "B1": ("B", "B")})
    predictions = predict(telling(table), left_out(table, um_per_px=SCALES))
    assert set(predictions["setting"]) == {1.0}
    assert "cannot be split to choose a penalty: it is 1, the middle" in caplog.text


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
        match="slide A2: the features of 1 spots are NaN or infinite, the first is spot A2_1x2",
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
    with pytest.raises(DataError, match="named otherwise"):
        predict(named.iloc[::-1], left_out(spots()), majority)


def test_too_few_labels_for_the_paper_protocol():
    table = spots()
    table.iloc[9:, table.columns.get_loc("label")] = None
    table.iloc[0, table.columns.get_loc("label")] = "outer"
    with pytest.raises(DataError, match="9 labelled spots cannot be split"):
        paper_protocol(telling(spots()), table)
