"""Captions: what they say of painted tiles, and what of a held-out donor may reach training."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import sparse

from helpers import contrast, genes, slides, towers, training
from helpers.contrast import Pairs
from helpers.files import DataError

BLUE, PINK, GLASS = (90, 80, 150), (235, 130, 180), (245, 245, 245)
TINY = replace(training.CAPTION_SETTINGS, epochs=1, batch_size=8, dim=8)


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


def test_stains_see_hematoxylin_in_blue_and_eosin_in_pink() -> None:
    blue, pink, glass = contrast.stain_amounts(painted(BLUE, PINK, GLASS))
    assert blue[0] > 0.2 > max(pink[0], glass[0]) + 0.1
    assert blue[0] > blue[1]
    assert pink[1] > pink[0]
    assert np.abs(glass).max() < 0.03


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
    assert counts.to_dict() == dict.fromkeys(contrast.NUCLEI, n // 3)


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


# --- leaving a donor out ------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path, monkeypatch) -> dict[str, ad.AnnData]:
    """Three donors with a slide of nine spots each; only donor C has a secret garden."""
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))
    rng, adatas = np.random.default_rng(0), {}
    for slide in ("A1", "B1", "C1"):
        path = tmp_path / f"{slide}.png"
        Image.fromarray(rng.integers(60, 220, (180, 180, 3), np.uint8)).save(path)
        obs = pd.DataFrame({"slide": slide}, index=[f"{slide}_{i}" for i in range(9)])
        obs["donor"] = obs["group"] = slide[0]
        obs["label"] = "secret garden" if slide == "C1" else "plain"
        counts = sparse.csr_matrix(rng.poisson(5, (9, 6)).astype(np.float32))
        adata = ad.AnnData(counts, obs, pd.DataFrame(index=[f"G{i}" for i in range(6)]))
        grid = [(50.0 + 40 * x, 50.0 + 40 * y) for y in range(3) for x in range(3)]
        adata.obsm["spatial"] = np.array(grid)
        slides.attach_image(adata, slide, path, "ST", radius_px=10.0, image=False)
        adatas[slide] = genes.normalise(adata)
    return adatas


def test_an_unknown_or_an_only_donor_is_refused(study) -> None:
    with pytest.raises(DataError, match=r"donor 'Z' of \['A', 'B', 'C'\]"):
        training.leave_donor_out_captions(study, "Z", settings=TINY)
    with pytest.raises(DataError, match=r"donor 'A' of \['A'\]"):
        training.leave_donor_out_captions({"A1": study["A1"]}, "A", settings=TINY)


def test_words_of_the_held_out_donor_never_reach_training(study, monkeypatch) -> None:
    given = []

    def fit(model, train, validation, settings, **_):
        given.append((train, validation))
        return training.Fitted(model, pd.DataFrame(), 0, None)

    monkeypatch.setattr(training, "fit", fit)
    fold = training.leave_donor_out_captions(study, "C", settings=TINY)
    ((train, validation),) = given
    assert validation is None
    assert set(train.spots["donor"]) == {"A", "B"}
    assert not train.spots["caption"].str.contains("secret").any()
    secret = towers.load_clip("mini", pretrained=False)[1](["secret garden"])[0, 1:3].numpy()
    assert not np.isin(train.other, secret).any()
    assert np.isin(fold.test.other, secret).any(axis=1).all()
    training.leave_donor_out_captions(study, "A", settings=TINY)
    assert given[1][0].spots["caption"].str.contains("secret").sum() == 9  # with C in training


def test_it_trains_and_is_read_back(study) -> None:
    fold = training.leave_donor_out_captions(study, "C", settings=TINY)
    before, after = fold.before.state_dict(), fold.fitted.model.state_dict()
    assert not torch.equal(before["image_head.weight"], after["image_head.weight"])
    fixed = "other.token_embedding.weight"
    assert torch.equal(before[fixed], after[fixed])
    assert fold.panel is None
    assert len(fold.test) == 9
    again = training.leave_donor_out_captions(study, "C", settings=TINY)
    assert again.fitted.folder == fold.fitted.folder
    for one, two in zip(after.values(), again.fitted.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    image, text = contrast.embed_pairs(fold.fitted.model, fold.test)
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)
    assert image.shape == text.shape == (9, 8)
