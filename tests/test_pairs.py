"""Pairs: joined by name, kept apart, and augmented on the batch."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from helpers import genes
from helpers.contrast import NUMBERS, Pairs, augment, augmented, check_apart, pair
from helpers.files import DataError
from helpers.tiles import Tiles

GENES = ["Ga", "Gb", "Gc", "Gd"]


def slide(name: str, donor: str = "D1", n: int = 6, seed: int = 0) -> ad.AnnData:
    """A slide of raw counts, its spots in an order of their own."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(index=[f"{name}_{i}" for i in rng.permutation(n)])
    for key, value in {"slide": name, "donor": donor, "group": donor}.items():
        obs[key] = value
    obs["label"] = [f"layer {i[-1]}" for i in obs.index]
    X = sparse.csr_matrix(rng.poisson(3.0, (n, 4)).astype(np.float32))
    return ad.AnnData(X, obs=obs, var=pd.DataFrame(index=GENES))


def tiles_of(*adatas: ad.AnnData, drop: tuple[str, ...] = ()) -> Tiles:
    """Tiles whose grey value is the number of the spot, in the order of the numbers."""
    spots = sorted(s for a in adatas for s in a.obs_names if s not in drop)
    index = pd.DataFrame({"slide": [s.rsplit("_", 1)[0] for s in spots]}, index=spots)
    number = np.array([int(s.rsplit("_", 1)[1]) for s in spots])
    index["x_px"], index["y_px"], index["row"] = number, -number, np.arange(len(spots))
    array = np.repeat(number.astype(np.uint8), 4 * 4 * 3).reshape(-1, 4, 4, 3)
    return Tiles(array, index, {})


@pytest.fixture
def study() -> dict[str, ad.AnnData]:
    slides = {"A": slide("A"), "B": slide("B", "D2", 5, seed=1)}
    return {name: genes.normalise(a) for name, a in slides.items()}


PANEL = genes.Panel("some", ("Gc", "Ga"), "by hand", ("A",))


def test_rows_are_joined_by_slide_and_spot(study):
    pairs = pair(study, tiles_of(*study.values(), drop=("A_3",)), PANEL)
    assert len(pairs) == 10
    assert "A_3" not in pairs.spots.index
    for i, (spot, row) in enumerate(pairs.spots.iterrows()):
        adata = study[row["slide"]]
        expected = adata[spot, ["Gc", "Ga"]].X.toarray().ravel()
        np.testing.assert_array_equal(pairs.other[i], expected)
        assert (pairs.tiles[i] == int(spot[-1])).all()
        assert (row["x_px"], row["label"]) == (int(spot[-1]), f"layer {spot[-1]}")
        assert row["donor"] == adata.obs["donor"].iloc[0]
    assert pairs.other.dtype == np.float32


def test_slides_without_tiles_and_tiles_without_slides(study):
    both = tiles_of(*study.values())
    assert set(pair({"A": study["A"]}, both, PANEL).spots["slide"]) == {"A"}
    with pytest.raises(DataError, match=r"slide B.*no spot has a tile"):
        pair(study, tiles_of(study["A"]), PANEL)


def test_bad_slides_are_named(study):
    every = tiles_of(*study.values())
    with pytest.raises(DataError, match=r"slide B.*not normalised"):
        pair({**study, "B": slide("B", "D2", 5, seed=1)}, every, PANEL)
    with pytest.raises(DataError, match=r"slide B.*Ga"):
        pair({**study, "B": study["B"][:, ["Gb", "Gc", "Gd"]].copy()}, every, PANEL)
    broken = study["B"].copy()
    broken.X = broken.X.toarray()
    broken.X[2, 0] = np.nan
    with pytest.raises(DataError, match=rf"slide B.*spot {broken.obs_names[2]}, gene Ga"):
        pair({**study, "B": broken}, every, PANEL)
    mixed = study["B"].copy()
    mixed.obs["donor"] = ["D2"] * 4 + ["D1"]
    with pytest.raises(DataError, match=r"slide B.*one donor for all spots"):
        pair({**study, "B": mixed}, every, PANEL)


def test_what_does_not_fit_makes_no_pairs(study):
    pairs = pair(study, tiles_of(*study.values()), PANEL)
    with pytest.raises(DataError, match="do not make pairs"):
        Pairs(pairs.tiles[:-1], pairs.other, pairs.spots)
    with pytest.raises(DataError, match="float64"):
        Pairs(pairs.tiles, pairs.other.astype(float), pairs.spots)
    with pytest.raises(DataError, match=r"lacks \['donor'\]"):
        Pairs(pairs.tiles, pairs.other, pairs.spots.drop(columns="donor"))
    with pytest.raises(DataError, match="1 columns for 2 genes"):
        Pairs(pairs.tiles, pairs.other[:, :1], pairs.spots, PANEL)


def test_some_of_the_pairs(study):
    pairs = pair(study, tiles_of(*study.values()), PANEL)
    only = pairs.of(["B"])
    assert list(only.spots.index) == [f"B_{i}" for i in range(5)]
    assert np.shares_memory(only.tiles, pairs.tiles)  # one run of rows: not copied
    mask = pairs.spots["donor"] == "D1"
    assert list(pairs.of(mask).spots.index) == [f"A_{i}" for i in range(6)]
    rows = [9, 0, 4]
    some = pairs.of(rows)
    np.testing.assert_array_equal(some.other, pairs.other[rows])
    np.testing.assert_array_equal(some.tiles, pairs.tiles[rows])
    with pytest.raises(DataError, match="no pair comes from"):
        pairs.of(["B", "Z"])
    with pytest.raises(DataError, match="none of the pairs"):
        pairs.of(pairs.spots["donor"] == "D9")


def test_training_is_kept_apart_from_validation(study):
    pairs = pair(study, tiles_of(*study.values()), PANEL)
    check_apart(pairs.of(["A"]), pairs.of(["B"]))
    with pytest.raises(DataError, match=r"share the slide A"):
        check_apart(pairs.of([0, 1, 6]), pairs.of([2, 3]))
    near = pairs.spots.copy()
    near["group"] = "same block"
    adjacent = Pairs(pairs.tiles, pairs.other, near, PANEL)
    with pytest.raises(DataError, match=r"share the group same block.*\['A'\].*\['B'\]"):
        check_apart(adjacent.of(["A"]), adjacent.of(["B"]))
    with pytest.raises(DataError, match=r"panel 'some' was chosen with held-out slides: A"):
        check_apart(pairs.of(["B"]), pairs.of(["A"]))
    turned = genes.Panel("turned", ("Ga", "Gc"), "by hand", ())
    other = pair(study, tiles_of(*study.values()), turned)
    with pytest.raises(DataError, match="other genes"):
        check_apart(pairs.of(["A"]), other.of(["B"]))


# --------------------------------------------------------------------------- augmentation


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(64, 3, 6, 6, generator=drawn(1))


def test_augmented_tiles_are_tiles(pixels):
    for strength, crop in [(1, 0), (5, 0.5), (0, 0.5)]:
        result = augment(pixels, drawn(), strength, crop)
        assert result.shape == pixels.shape
        assert result.dtype == pixels.dtype
        assert 0 <= result.min() <= result.max() <= 1
    assert augment(pixels, drawn(), 0) is pixels


def test_turns_are_exact_and_all_eight_come(pixels):
    tile = pixels[:1].repeat(400, 1, 1, 1)
    turned = augment(tile, drawn(), 1e-12)  # next to no change of stain
    whole = tile[0].flatten(1).sort(dim=1).values
    torch.testing.assert_close(turned.flatten(2).sort(dim=2).values, whole.expand(400, -1, -1))
    seen = {tuple((t * 1000).round().int().flatten().tolist()) for t in turned}
    square = pixels[0]
    ways = [torch.rot90(s, k, (1, 2)) for s in (square, square.flip(2)) for k in range(4)]
    assert seen == {tuple((w * 1000).round().int().flatten().tolist()) for w in ways}


def test_every_tile_for_itself_and_the_same_again(pixels):
    tile = pixels[:1].repeat(50, 1, 1, 1)
    result = augment(tile, drawn(), 1, 0.2)
    assert len({tuple(t.flatten().tolist()) for t in result}) == 50
    torch.testing.assert_close(augment(tile, drawn(), 1, 0.2), result, rtol=0, atol=0)
    assert not torch.equal(augment(tile, drawn(1), 1, 0.2), result)


def test_a_part_is_as_the_whole(pixels):
    numbers = torch.rand(64, NUMBERS, generator=drawn())
    whole = augmented(pixels, numbers, 1, 0.3)
    torch.testing.assert_close(augmented(pixels[9:20], numbers[9:20], 1, 0.3), whole[9:20])


def test_stain_changes_and_glass_stays_white():
    glass = augment(torch.ones(99, 3, 4, 4), drawn(), 1)
    assert glass.min() > np.exp(-0.051)
    assert torch.allclose(glass, glass.mean(1, keepdim=True), atol=1e-6)  # not tinted
    purple = torch.tensor([0.55, 0.35, 0.65]).view(1, 3, 1, 1).expand(99, 3, 4, 4)
    changed = augment(purple, drawn(), 1)
    assert changed[:, :, 0, 0].std(0).min() > 0.02
    double = augment(purple, drawn(), 2)
    assert (double - purple).abs().mean() > 1.5 * (changed - purple).abs().mean()


def test_cropping_enlarges():
    ramp = torch.linspace(0, 1, 32).expand(200, 3, 32, 32)
    cropped = augment(ramp, drawn(), 0, 0.5)
    span = cropped.amax((1, 2, 3)) - cropped.amin((1, 2, 3))
    assert 0.4 < span.min() < 0.6
    assert span.max() > 0.9
