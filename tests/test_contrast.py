"""Pairs joined by name and kept apart, augmentation, captions, settings, model and loss."""

import math
from dataclasses import replace

import anndata as ad
import numpy as np
import open_clip.loss
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch import nn

from helpers import contrast, genes, towers
from helpers.contrast import (
    NUMBERS,
    Pairs,
    Settings,
    TwoTowers,
    augment,
    check_apart,
    info_nce,
    pair,
)
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
    with pytest.raises(DataError, match="cannot be paired"):
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
    with pytest.raises(DataError, match="no pair is selected"):
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
    with pytest.raises(DataError, match="different genes"):
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
    whole = augment(pixels, numbers, 1, 0.3)
    torch.testing.assert_close(augment(pixels[9:20], numbers[9:20], 1, 0.3), whole[9:20])


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


# --------------------------------------------------------------------------- captions


BLUE, PINK, GLASS = (90, 80, 150), (235, 130, 180), (245, 245, 245)


def painted(*colours: tuple[int, int, int]) -> np.ndarray:
    """One tile of 8 px per colour."""
    return np.stack([np.full((8, 8, 3), colour, np.uint8) for colour in colours])


def spots_of(slides_of: list[str], labels: list) -> pd.DataFrame:
    table = pd.DataFrame({"slide": slides_of, "label": labels})
    table["donor"] = table["group"] = table["slide"].str[0]
    table["x_px"] = table["y_px"] = 0.0
    return table.set_index("s" + table.index.astype(str))


def shade(colour: tuple[int, int, int], amount: float) -> tuple[int, int, int]:
    """A stain of another amount: optical densities add up."""
    return tuple(round(255 * (c / 255) ** amount) for c in colour)


def test_a_caption_by_hand() -> None:
    dark, middle, light = (shade(BLUE, amount) for amount in (1.0, 0.6, 0.2))
    spots = spots_of(["A1"] * 3, ["Layer 1", "Layer 2", np.nan])
    said = contrast.captions(painted(dark, middle, light), spots)
    assert said.index.equals(spots.index)
    nuclei = ["Layer 1 with many nuclei", "Layer 2 with some nuclei", "tissue with few nuclei"]
    assert [sentence.split(" on ")[0] for sentence in said] == nuclei


def test_ground_follows_the_eosin() -> None:
    tiles = painted(*(shade(PINK, amount) for amount in (0.3, 1.0, 1.8)))
    said = contrast.captions(tiles, spots_of(["A1"] * 3, ["x"] * 3))
    ground = ["pale ground", "pink ground", "deep pink ground"]
    assert [sentence.split(" on ")[1] for sentence in said] == ground


@pytest.mark.parametrize("n", [3, 6, 30])
def test_thirds_are_thirds(n: int) -> None:
    tiles = painted(*(shade(BLUE, 0.2 + amount) for amount in np.linspace(0, 1, n)))
    said = contrast.captions(tiles, spots_of(["A1"] * n, ["x"] * n))
    counts = said.str.extract(r"with (\w+) nuclei")[0].value_counts()
    assert counts.to_dict() == dict.fromkeys(contrast.NUCLEI_WORDS, n // 3)


def test_words_are_relative_to_the_slide() -> None:
    """A slide stained twice as strongly gets the same words, in any order of its rows."""
    amounts = np.array([0.2, 0.3, 0.4])
    tiles = painted(*(shade(BLUE, a) for a in (*amounts, *2 * amounts)))
    order = [4, 0, 2, 5, 1, 3]
    spots = spots_of(["A1"] * 3 + ["B1"] * 3, ["x"] * 6)
    said = contrast.captions(tiles[order], spots.iloc[order])[spots.index].str.split(" on ").str[0]
    assert said.iloc[:3].tolist() == said.iloc[3:].tolist()
    assert said.iloc[:3].nunique() == 3


def test_labels_may_be_categories_and_may_be_missing() -> None:
    spots = spots_of(["A1"] * 3, pd.Categorical(["L1", None, "L1"]))
    said = contrast.captions(painted(BLUE, PINK, GLASS), spots)
    assert said.str.split(" with ").str[0].tolist() == ["L1", "tissue", "L1"]
    spots = spots_of(["A1"] * 2, [np.nan, np.nan])
    assert contrast.captions(painted(BLUE, PINK), spots).str.startswith("tissue with").all()


def test_tiles_and_spots_must_be_as_many() -> None:
    with pytest.raises(DataError, match="2 tiles and 3 spots"):
        contrast.captions(painted(BLUE, PINK), spots_of(["A1"] * 3, ["x"] * 3))


def test_tokens() -> None:
    spots = spots_of(["A1"] * 3, ["Layer 1", "Layer 1", np.nan])
    tiles = painted(BLUE, PINK, GLASS)
    bare = Pairs(tiles, np.empty((3, 0), np.float32), spots)
    pairs = contrast.with_captions(bare)
    assert pairs.other.shape == (3, 32)
    assert pairs.other.dtype == np.int64
    assert pairs.panel is None
    assert pairs.spots["caption"].tolist() == contrast.captions(tiles, spots).tolist()
    assert "caption" not in bare.spots
    expected = towers.load_clip("mini", pretrained=False)[1](pairs.spots["caption"].tolist())
    assert (pairs.other == expected.numpy()).all()
    assert contrast.with_captions(bare, context=20).other.shape == (3, 20)


# --------------------------------------------------------------------------- model and loss


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 1}, "no negatives"),
        ({"optimiser": "sgd"}, "one of"),
        ({"schedule": "linear"}, "one of"),
        ({"precision": "fp16"}, "one of"),
        ({"epochs": 0}, "1 or more"),
        ({"micro_batch": 0}, "1 or more"),
        ({"temperature": 0.0}, "or more"),
        ({"keep": "last", "patience": 2}, "patience=None"),
    ],
)
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(DataError, match=message):
        replace(contrast.BOOK, **wrong)


class Small(nn.Module):
    """A tower of one layer, for tiles of 6 px."""

    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(108, 16)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layer(pixels.flatten(1))


def test_model_makes_unit_vectors_from_its_seed_alone():
    settings = Settings(dim=8)
    before = torch.get_rng_state()
    one, two = TwoTowers(Small(), Small(), settings), TwoTowers(Small(), Small(), settings)
    assert torch.equal(one.image_head.weight, two.image_head.weight)
    other = TwoTowers(Small(), Small(), replace(settings, seed=1))
    assert not torch.equal(one.image_head.weight, other.image_head.weight)
    torch.set_rng_state(before)
    pixels = torch.rand(5, 3, 6, 6)
    torch.testing.assert_close(one.embed_images(pixels).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(one.embed_other(pixels).norm(dim=1), torch.ones(5))
    assert one.scale.item() == pytest.approx(1 / 0.07)


def test_loss_of_two_pairs_by_hand():
    image, other = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    right = [math.e**2, math.e**1.6]  # exp(scale * cosine) of the pairs
    rows = [right[0] + math.e**1.2, right[1] + math.e**0]
    columns = [right[0] + math.e**0, right[1] + math.e**1.2]
    expected = -np.mean([np.log(right[i] / x[i]) for x in (rows, columns) for i in (0, 1)])
    assert info_nce(image, other, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_loss_is_open_clips_and_knows_chance():
    image, other = nn.functional.normalize(torch.randn(2, 50, 8), dim=-1)
    expected = open_clip.loss.ClipLoss()(image, other, torch.tensor(14.3))
    torch.testing.assert_close(info_nce(image, other, torch.tensor(14.3)), expected)
    blind = torch.ones(50, 8) / 8**0.5
    assert info_nce(blind, other[:1].expand(50, -1), 10.0).item() == pytest.approx(math.log(50))


def test_a_trained_tower_is_tuned_gently_and_a_random_one_trained_whole():
    scratch, tuned = contrast.settings_for("mini", seed=3), contrast.settings_for("imagenet")
    assert scratch == replace(contrast.BOOK, keep="last", seed=3)
    assert tuned == replace(contrast.FINE_TUNING, keep="last")
    assert tuned.train_blocks is not None
    assert tuned.epochs < scratch.epochs
