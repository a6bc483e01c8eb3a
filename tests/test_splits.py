"""Splits: nothing in training gives a tested spot away."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_spots import SCALES, SLIDES, spots
from scipy.spatial.distance import cdist
from sklearn.dummy import DummyClassifier
from sklearn.model_selection import cross_val_score

from helpers.files import DataError
from helpers.slides import spot_table
from helpers.splits import (
    Splits,
    blocks,
    inside,
    ladder,
    left_out,
    parts,
    random_spots,
    spatial_blocks,
    units,
)


def trouble(splits: Splits, *, adjacent: bool = True, buffer_um: float | None = None) -> list[str]:
    """What is wrong with a split, in words; looked for without the code that made it."""
    table, found = splits.spots, []
    for fold in splits.folds:
        train, test = table.iloc[fold.train], table.iloc[fold.test]
        if not (len(train) and len(test)):
            found.append("empty")
        if set(fold.train) & set(fold.test):
            found.append("spot")
        if len(set(fold.train)) < len(fold.train) or len(set(fold.test)) < len(fold.test):
            found.append("spot twice in a part")
        for slide, held in test.groupby("slide"):
            group = held["group"].iloc[0]
            others = train[(train["group"] == group) & (train["slide"] != slide)]
            if adjacent and len(others):
                found.append("adjacent section")
            own = train[train["slide"] == slide]
            if buffer_um is not None and len(own):
                apart = cdist(held[["x_um", "y_um"]], own[["x_um", "y_um"]])
                if apart.min() <= buffer_um:
                    found.append("within the buffer")
    return found


def once_each(splits: Splits) -> bool:
    """Whether every spot is tested in exactly one fold."""
    tested = np.concatenate([fold.test for fold in splits.folds])
    return sorted(tested) == list(range(len(splits.spots)))


@st.composite
def wild(draw) -> tuple[pd.DataFrame, dict]:
    """Slides of all sizes, in groups of all sizes, their spots anywhere, scales of their own."""
    groups = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    rng, tables, scales = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), [], {}
    for g, sections in enumerate(groups):
        for s in range(sections):
            n, slide = int(rng.integers(8, 60)), f"slide {g} {s}"
            xy = rng.uniform(0, 1000, (n, 2)).round(draw(st.integers(-2, 1)))
            table = pd.DataFrame(
                xy, columns=["x_px", "y_px"], index=[f"{slide} {i}" for i in range(n)]
            )
            table["label"] = rng.choice(["a", "b"], n)
            tables.append(table.assign(slide=slide, donor=f"D{g // 2}", group=f"G{g}"))
            scales[slide] = float(rng.uniform(0.3, 4))
    table = pd.concat(tables)
    return table.iloc[rng.permutation(len(table))], scales  # rows in no order at all


@settings(max_examples=40, deadline=None)
@given(wild(), st.integers(2, 5), st.floats(0, 900), st.booleans())
def test_blocks_keep_spots_sections_and_buffer_apart(made, n, buffer_um, together):
    table, scales = made
    try:
        splits = spatial_blocks(table, n, buffer_um=buffer_um, um_per_px=scales, together=together)
    except DataError as error:
        assert "leaves no spot to train on" in str(error)  # noqa: PT017
        return
    assert trouble(splits, buffer_um=buffer_um) == []
    assert once_each(splits)


@settings(max_examples=25, deadline=None)
@given(wild(), st.sampled_from(["group", "donor", "slide"]))
def test_what_is_left_out_has_no_relative_in_training(made, by):
    table, _ = made
    if table[by].nunique() < 2 or (by == "slide" and table["group"].nunique() < 2):
        with pytest.raises(DataError, match="to train on"):
            left_out(table, by)
        return
    splits = left_out(table, by)
    assert trouble(splits) == []
    assert once_each(splits)
    for fold in splits.folds:
        assert not set(table[by].iloc[fold.train]) & set(table[by].iloc[fold.test])


@settings(max_examples=20, deadline=None)
@given(wild(), st.integers(2, 8))
def test_random_spots_are_tested_once_and_leak_by_design(made, n):
    splits = random_spots(made[0], n)
    assert set(trouble(splits)) <= {"adjacent section"}
    assert once_each(splits)


def test_the_check_of_splits_sees_a_leak():
    table = spot_table(spots(), SCALES)
    assert {"adjacent section", "within the buffer"} <= set(
        trouble(random_spots(table), buffer_um=400)
    )


def test_blocks_train_on_all_that_is_far_away():
    """Nothing more is thrown away than the buffer and the adjacent section."""
    splits = spatial_blocks(spots(), 4, buffer_um=400, um_per_px=SCALES)
    table = splits.spots
    assert len(splits.folds) == 4 * len(SLIDES)
    for fold in splits.folds:
        slide = table["slide"].iloc[fold.test[0]]
        away = set(range(len(table))) - set(fold.train) - set(fold.test)
        lost = table.iloc[sorted(away)]
        group = SLIDES[slide][1]
        adjacent = [s for s, (_, g) in SLIDES.items() if g == group and s != slide]
        assert set(lost["slide"]) == {slide, *adjacent}
        own = lost[lost["slide"] == slide][["x_um", "y_um"]]
        assert (cdist(own, table.iloc[fold.test][["x_um", "y_um"]]).min(axis=1) <= 400).all()


def test_a_buffer_is_in_microns_of_its_own_slide():
    table = spots(slides={"A1": ("A", "A"), "B1": ("B", "B")})
    coarse = spatial_blocks(table, 2, buffer_um=500, um_per_px={"A1": 2.0, "B1": 20.0})
    left = {
        slide: len(table) // 2 - sum(table["slide"].iloc[fold.train] == slide) - len(fold.test)
        for slide, fold in zip(("A1", "B1"), coarse.folds[::2], strict=True)
    }
    assert left["A1"] > 0  # 200 um apart: two rows and the ragged edge
    assert left["B1"] == 0  # 2,000 um apart: no spot within 500


def test_together_needs_fewer_folds():
    splits = spatial_blocks(spots(), 4, buffer_um=400, um_per_px=SCALES, together=True)
    assert len(splits.folds) == 2 * 4  # pieces times sections of the largest group
    assert once_each(splits)
    first = splits.spots["slide"].iloc[splits.folds[0].test]
    assert set(first) == {"A1", "B1", "C1", "C2"}  # the two of C are groups of their own


def test_donors_of_two_studies_are_not_confused():
    one, two = spots().assign(study="one"), spots().assign(study="two")
    two["slide"] = "two " + two["slide"]
    both = pd.concat([one, two])
    assert len(left_out(both).folds) == 6
    assert [fold.name for fold in left_out(both, "study").folds] == ["one", "two"]
    assert units(one, "donor").unique().tolist() == ["A", "B", "C"]


def test_the_ladder_in_order():
    rungs = ladder(spots(), SCALES)
    assert list(rungs) == ["random spots", "spatial blocks", "left-out section", "left-out donor"]
    assert [fold.name for fold in rungs["left-out donor"].folds] == ["A", "B", "C"]
    names = [fold.name for fold in rungs["left-out section"].folds]
    assert names == ["A", "B", "C-left", "C-right"]
    assert len({fold.name for fold in rungs["spatial blocks"].folds}) == 24
    assert all(name == splits.name for name, splits in rungs.items())
    with_study = spots().assign(study=np.repeat(["one", "two"], [4 * 81, 2 * 81]))
    assert list(ladder(with_study, SCALES))[-1] == "left-out study"


def test_a_split_without_two_labelled_units_is_left_out(caplog):
    table = spots()
    table.loc[table["donor"] != "C", "label"] = None
    assert list(ladder(table, SCALES)) == ["random spots", "spatial blocks", "left-out section"]
    assert "no second donor has labels" in caplog.text


def test_stricter_rungs_train_on_less_that_is_related():
    rungs = ladder(spots(), SCALES)
    table = rungs["random spots"].spots
    donor, slide = table["donor"].to_numpy(), table["slide"].to_numpy()
    for name, own_slide, own_donor in (
        ("random spots", True, True),
        ("spatial blocks", True, True),
        ("left-out section", False, True),
        ("left-out donor", False, False),
    ):
        folds = rungs[name].folds
        assert any(set(slide[f.train]) & set(slide[f.test]) for f in folds) == own_slide
        assert any(set(donor[f.train]) & set(donor[f.test]) for f in folds) == own_donor


def test_a_training_part_is_split_by_the_largest_unit_it_has_two_of():
    table = spot_table(spots(), SCALES)
    assert inside(table).name == "left-out donor"
    assert len(inside(table).folds) == 3
    assert inside(table[table["donor"] == "C"]).name == "left-out section"
    assert inside(table[table["slide"] == "C1"]).name == "spatial blocks"
    many = pd.concat([table.assign(donor=f"D{i}", group=f"D{i}", slide=f"{i} " + table["slide"])
                      for i in range(5)])  # fmt: skip
    assert len(inside(many).folds) == 3  # at most, each of several donors


def test_many_donors_are_dealt_into_few_folds():
    splits = left_out(spots(), "group", at_most=3)
    assert [fold.name for fold in splits.folds] == ["A, C-right", "B", "C-left"]
    assert once_each(splits)
    assert trouble(splits) == []


def test_scikit_learn_takes_it_for_a_cross_validator():
    splits = left_out(spots())
    assert splits.get_n_splits() == 3
    x = np.zeros((len(splits.spots), 2))
    model = DummyClassifier(strategy="most_frequent")
    scores = cross_val_score(model, x, splits.spots["label"], cv=splits)
    np.testing.assert_allclose(scores, 1 / 3)
    with pytest.raises(DataError, match=r"5 rows of features for a split of 486 spots"):
        next(splits.split(x[:5]))


def test_parts_are_compact_and_of_equal_size():
    xy = np.random.default_rng(0).uniform(size=(700, 2))
    number = parts(xy, 7)
    assert np.bincount(number).tolist() == [100] * 7
    for i in range(7):
        assert np.ptp(xy[number == i], axis=0).max() < 0.6
    assert sorted(set(parts(xy[:3], 7))) != []  # fewer points than parts: some are empty


def test_adjacent_sections_share_their_blocks():
    table = spots().sample(frac=1, random_state=0)
    name = blocks(table, 4)
    assert name.index.equals(table.index)
    assert name.nunique() == 4 * 4  # pieces times groups
    assert (name.str.split(",").str[0] == table["group"]).all()
    assert name["A1_2x3"] == name["A2_2x3"]
    assert name["C1_2x3"] != name["C2_2x3"]  # two groups of one donor


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: spatial_blocks(t), "needs the scale"),
        (lambda t: spatial_blocks(t, 1, um_per_px=SCALES), "n is 1, buffer_um is 400"),
        (lambda t: spatial_blocks(t, buffer_um=-1, um_per_px=SCALES), "buffer_um is -1"),
        (
            lambda t: spatial_blocks(t[t["group"] == "A"], buffer_um=1e5, um_per_px=SCALES),
            "leaves no spot to train on",
        ),
        (lambda t: random_spots(t, 1), "486 spots cannot be split into 1 folds"),
        (lambda t: left_out(t[t["donor"] == "A"]), "all spots are of one donor, 'A'"),
        (lambda t: left_out(t, "study"), "no column 'study'"),
        (lambda t: left_out(t[t["group"] == "A"], "slide"), "leaves no spot to train on"),
    ],
)
def test_what_cannot_be_split_is_said(call, message):
    with pytest.raises(DataError, match=message):
        call(spots())
