"""A tower refitted within a fold sees the training spots of the fold, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import contrast, slides, splits, tiles, training
from helpers.files import DataError
from helpers.splits import Fold

SETTINGS = replace(contrast.BOOK, epochs=1, batch_size=16, dim=8, keep="last")
HOW = {"settings": SETTINGS, "n_genes": 10, "tower": "colour", "size": 32}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def spots(sections):
    return slides.spot_table(sections)


def weights(fitted):
    return torch.cat([p.detach().flatten() for p in fitted.model.parameters()])


def test_a_left_out_donor_gives_the_model_of_leave_out(sections, spots):
    fold = next(f for f in splits.left_out(spots, "donor").folds if f.name == "Y")
    again = training.fit_fold(sections, spots, fold, **HOW)
    assert again.folder == training.leave_donor_out(sections, "Y", **HOW).fitted.folder


def test_counts_and_pixels_of_untrained_spots_reach_no_weight(sections, spots):
    fold = splits.spatial_blocks(spots, 2, buffer_um=200.0).folds[0]
    clean = training.fit_fold(sections, spots, fold, cache=False, **HOW)
    slide = spots["slide"].iloc[fold.test[0]]
    unseen = ~sections[slide].obs_names.isin(spots.index[fold.train])
    assert 0 < unseen.sum() < len(unseen)
    poisoned = sections[slide].copy()
    many = 1 + 49 * unseen[:, None]
    poisoned.X = poisoned.X.multiply(many).tocsr()
    poisoned.layers["counts"] = poisoned.layers["counts"].multiply(many).tocsr()
    other = training.fit_fold({**sections, slide: poisoned}, spots, fold, cache=False, **HOW)
    assert torch.equal(weights(clean), weights(other))
    everything = Fold("everything", np.arange(len(spots)), np.array([], int))
    seen = [
        training.fit_fold(a, spots, everything, cache=False, **HOW)
        for a in (sections, {**sections, slide: poisoned})
    ]
    assert not torch.equal(*map(weights, seen))  # where they are trained on, they do


def test_features_are_in_the_order_of_the_spots(sections, spots):
    shuffled = spots.sample(frac=1, random_state=0)
    cut = tiles.cut_study(sections, size=32)
    tile_of = dict(zip(cut.index.index, cut.array, strict=True))
    found = tiles.of_spots(cut, shuffled)
    for name, tile in zip(shuffled.index, found, strict=True):
        np.testing.assert_array_equal(tile, tile_of[name])
    fold = splits.left_out(shuffled, "donor").folds[0]
    assert training.features_by_fold(sections, shuffled, **HOW)(fold).shape == (len(spots), 49)


def test_a_fold_that_tests_what_it_trains_on_is_refused(sections, spots):
    fold = Fold("leaky", np.arange(20), np.arange(10, 30))
    with pytest.raises(DataError, match="trains on 10 spots that it tests"):
        training.fit_fold(sections, spots, fold, **HOW)


def test_a_spot_that_is_on_no_slide_is_named_by_its_slide(sections, spots):
    fold = Fold("all", np.arange(len(spots)), np.array([], int))
    rest = {s: a for s, a in sections.items() if s != "X1"}
    with pytest.raises(DataError, match="X1"):
        training.fit_fold(rest, spots, fold, **HOW)


def test_a_spot_without_a_tile_is_named(sections, spots):
    rest = {s: a for s, a in sections.items() if s != "X1"}
    with pytest.raises(DataError, match="X1_0"):
        tiles.of_spots(tiles.cut_study(rest, size=32), spots)
