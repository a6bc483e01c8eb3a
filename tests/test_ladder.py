"""The ladder of the benchmarks: what is compared is comparable, and rows replace their like."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import ladder
from helpers import plots, probing, splits


def table(donors: str = "ABC", side: int = 9) -> pd.DataFrame:
    """Spots of one slide per donor, in a square, with labels in three bands and a few without."""
    x, y = (v.ravel() for v in np.meshgrid(np.arange(side), np.arange(side)))
    parts = []
    for donor in donors:
        part = pd.DataFrame({"slide": donor, "donor": donor, "group": donor}, index=range(len(x)))
        part = part.assign(x_px=x * 10.0, y_px=y * 10.0, x_um=x * 100.0, y_um=y * 100.0)
        part["label"] = pd.Series(np.array(["one", "two", "three"])[y * 3 // side], dtype=object)
        part.loc[:5, "label"] = np.nan
        part.index = [f"{donor} {i}" for i in part.index]
        parts.append(part)
    return pd.concat(parts)


@pytest.fixture(scope="module")
def rungs() -> dict[str, splits.Splits]:
    return splits.ladder(table(), buffer_um=150, together=True)


def known(split: splits.Splits) -> np.ndarray:
    return split.spots["label"].notna().to_numpy()


def test_every_fold_trains_on_the_same_number_of_labelled_spots(rungs):
    few, n = ladder.thinned(rungs)
    assert list(few) == list(rungs)
    for name, split in few.items():
        for fold, whole in zip(split.folds, rungs[name].folds, strict=True):
            assert fold.name == whole.name
            assert len(fold.train) == known(split)[fold.train].sum() == n
            assert set(fold.train) <= set(whole.train)
            assert np.array_equal(fold.test, whole.test)
    sizes = [known(s)[f.train].sum() for s in rungs.values() for f in s.folds]
    assert n == min(sizes) < max(sizes)


def test_thinning_is_the_same_twice_and_differs_by_seed(rungs):
    once, again, other = (ladder.thinned(rungs, seed)[0] for seed in (0, 0, 1))

    def rows(made: dict[str, splits.Splits]) -> list[list[int]]:
        return [list(f.train) for s in made.values() for f in s.folds]

    assert rows(once) == rows(again) != rows(other)


def test_a_fold_without_labels_is_left_out_and_does_not_count():
    spots = table("AB")
    spots.loc[spots["donor"] == "B", "label"] = None
    whole = splits.ladder(spots, buffer_um=150, together=True)
    few, n = ladder.thinned(whole)
    assert n > 0
    assert all(known(s)[f.test].any() for s in few.values() for f in s.folds)


def test_sections_that_are_donors_are_measured_once(rungs):
    assert list(ladder.distinct(rungs)) == ["random spots", "spatial blocks", "left-out donor"]
    spots = table().assign(donor=lambda t: t["donor"].replace("C", "B"))
    assert "left-out section" in ladder.distinct(splits.ladder(spots, buffer_um=150))


def test_seeds_are_measured_where_they_change_something():
    names = [(k.name, k.seed) for k in ladder.kinds("imagenet", (0, 1), refit=True)]
    assert names == [
        ("imagenet before", 0),
        ("imagenet before + hand-made", 0),
        ("imagenet after", 0),
        ("imagenet after + hand-made", 0),
        ("imagenet after", 1),
        ("imagenet after + hand-made", 1),
    ]
    assert [(k.name, k.seed) for k in ladder.kinds("mini", (0, 2), refit=False)] == [
        ("mini before", 0),
        ("mini before", 2),
    ]
    assert len(ladder.kinds("none", (0, 1, 2), refit=True)) == 8


def test_the_fixed_penalties_include_the_chosen_one(rungs):
    split = ladder.thinned(rungs)[0]["left-out donor"]
    x = np.random.default_rng(0).normal(size=(len(split.spots), 6))
    x[:, 0] += split.spots["label"].map({"one": 0, "two": 2, "three": 4}).fillna(0)
    fixed = ladder.at_fixed_penalties(x, split)
    assert tuple(fixed) == probing.PENALTIES
    chosen = probing.predict(x, split)
    for name, part in chosen.groupby("fold"):
        same = fixed[part["setting"].iloc[0]]
        same = same[same["fold"] == name]
        assert list(same["predicted"]) == list(part["predicted"])
    alone = probing.predict(x, split, partial(probing.logistic, alphas=(100.0,)))
    assert list(alone["predicted"]) == list(fixed[100.0]["predicted"])


@pytest.fixture(scope="module")
def study(rungs) -> SimpleNamespace:
    """A study with hand-made features that tell a little and a tower that tells more."""
    few, n = ladder.thinned(ladder.distinct(rungs))
    spots = next(iter(few.values())).spots
    rng, code = np.random.default_rng(0), spots["label"].map({"one": 0, "two": 1, "three": 2})
    made = {}
    for name, strength in (("hand-made", 0.5), ("mini before", 1.0), ("mini after", 3.0)):
        made[name] = rng.normal(size=(len(spots), 4))
        made[name][:, 0] += strength * code.fillna(0)
    found = SimpleNamespace(name="mob", spots=spots, rungs=few, n_train=n, strict="left-out donor")
    found.features = lambda kind, rung: made.get(kind.name, made["hand-made"])
    found.rungs_of = partial(ladder.Study.rungs_of, found)
    return found


@pytest.fixture(scope="module")
def rows(study) -> list[dict]:
    facts = {"study": "mob", "data": "local copy", "n_train": study.n_train}
    wanted = [ladder.Kind("hand-made"), *ladder.kinds("mini", (0, 1), refit=True)]
    told = {kind: ladder.predict(study, kind, study.rungs) for kind in wanted}
    found = [r for kind, of in told.items() for r in ladder.score_rows(study, facts, kind, of)]
    return found + ladder.difference_rows(study, facts, "mini", told)


def only(rows: list[dict], **wanted: object) -> list[dict]:
    wanted = {"measure": "macro_f1", "variant": "", "seed": 0} | wanted
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def test_rows_have_names_of_their_own(rows):
    names = [tuple(row[k] for k in ladder.KEY) for row in rows]
    assert len(set(names)) == len(names)


def test_a_score_has_its_donors_and_its_fixed_penalties(rows, study):
    (row,) = only(rows, what="score", features="mini after", split="left-out donor")
    assert set(row["donors"]) == {"A", "B", "C"}
    assert min(row["donors"].values()) < row["value"] < max(row["donors"].values())
    assert list(row["fixed"]) == [f"{a:g}" for a in probing.PENALTIES]
    assert len(row["chosen"]) == row["folds"] == 3
    assert row["n_train"] == study.n_train
    (scaled,) = only(rows, what="score", features="mini after", variant="scaled by slide")
    assert scaled["split"] == "left-out donor"


def test_other_seeds_are_on_the_strictest_split_alone(rows):
    assert {r["split"] for r in only(rows, seed=1)} == {"left-out donor"}


def test_gaps_and_differences_belong_together(rows):
    split = "gap: random spots - left-out donor"
    gaps = {
        name: only(rows, what="gap", features=name, split=split)[0]["value"]
        for name in ("hand-made", "mini after")
    }
    (both,) = only(rows, what="difference of gaps", features="mini after minus hand-made")
    assert both["value"] == pytest.approx(gaps["mini after"] - gaps["hand-made"])
    (gain,) = only(
        rows, what="difference", features="mini after minus mini before", split="left-out donor"
    )
    assert gain["value"] == pytest.approx(gain["first"] - gain["second"])
    assert gain["low"] < gain["value"] < gain["high"]
    assert gain["fixed"]["1"][0] > 0
    assert only(rows, what="difference", features="mini after minus hand-made", seed=1)


# --- the file -----------------------------------------------------------------------------------


def row(features: str = "x before", value: float | None = 0.5, **more: object) -> dict:
    made = {"study": "mob", "what": "score", "features": features, "tower": "x", "seed": 0}
    made |= {"variant": "", "split": "random spots", "measure": "macro_f1", "value": value}
    return {k: v for k, v in (made | more).items() if v is not None}


def test_a_row_replaces_its_like_and_no_other():
    old = [row(), row(seed=1), row("y before", tower="y"), row(study="demo")]
    found = ladder.merged(old, [row(value=0.7)])
    assert [r["value"] for r in found] == [0.7, 0.5, 0.5, 0.5]


def test_a_row_of_an_older_file_goes():
    assert ladder.merged([row(what=None)], []) == []


@pytest.mark.parametrize("turn", [list, lambda rows: rows[::-1]])
def test_not_measured_is_said_only_where_it_is_true(turn: Callable):
    gone = row(value=None, split="every", measure=None, note="not measured here: no weights")
    assert ladder.merged([], [gone]) == [gone]
    assert ladder.merged(*([r] for r in turn([gone, row()]))) == [row()]
    elsewhere = row(study="her2st")
    assert ladder.merged([elsewhere], [gone]) == [elsewhere, gone]


def test_the_file_can_be_read_and_knows_no_nan(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "commit", lambda: "0123456789abcdef-changed")
    path = tmp_path / "ladder.json"
    new = [row(low=np.nan, high=np.nan, note="", fixed={"1": [0.123456, np.nan, np.nan]})]
    ladder.write(path, new)
    ladder.write(path, [row("y before", tower="y")])
    found, line = plots.measured("ladder.json", folder=path.parent)
    assert len(found) == 2
    assert "with changes" in line
    first = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"][0]
    assert first["fixed"] == {"1": [0.1235, None, None]}
    assert first["variant"] == ""
    assert first.keys() & {"low", "high", "note"} == set()
    assert len([t for t in path.read_text().splitlines() if '"features": "' in t]) == 2
