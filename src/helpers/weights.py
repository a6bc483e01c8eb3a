"""What is known of a tower before it is built, and how its weights get here.

Weights come from a pinned revision on the hub or from a given file, as safetensors or as plain
tensors (``weights_only``), never as a pickle that could run code. They must fit the tower name by
name and shape by shape. CLIP models of Transformers, as PLIP is one, are converted to open_clip.
"""

import difflib
import hashlib
import json
import logging
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import files
from helpers.files import DataError

logger = logging.getLogger(__name__)

open_clip.add_model_config(Path(__file__).parent / "configs")  # `stimage-mini`


@dataclass(frozen=True)
class Source:
    """A file of weights on the hub: repository, commit, path in it, and its SHA-256 if published.

    The revision ``main`` is not pinned: it may give other weights tomorrow.
    """

    repo: str
    revision: str
    file: str
    sha256: str | None = None


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


def card(name: str) -> Card:
    """Return the card of a tower.

    Parameters
    ----------
    name
        One of `CARDS`; or an open_clip architecture (``ViT-B-16``), with the tag of its weights
        (``ViT-B-16:laion2b_s34b_b88k``); or ``hf-hub:owner/model`` with ``@commit`` to pin it; or
        ``local-dir:folder``; or ``timm:name``.

    Raises
    ------
    DataError
        For a name that nobody knows, or when the hub is needed and cannot be reached.
    """
    if name in CARDS:
        return CARDS[name]
    if name.startswith("timm:"):
        return _timm_card(name)
    architecture, tag = name, ""
    if not name.startswith(("hf-hub:", "local-dir:")):
        architecture, _, tag = name.partition(":")
    told = config(architecture)
    model, look = told["model_cfg"], told.get("preprocess_cfg", {})
    if tag:
        look = open_clip.get_pretrained_cfg(architecture, tag)
        if not look.get("hf_hub"):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
            raise DataError(
                f"{architecture} has no weights {tag!r} on the hub", fix=f"choose among {tags}"
            )
        if look.get("quick_gelu", False) != model.get("quick_gelu", False):
            raise DataError(
                f"the weights {tag!r} were trained with the other kind of GELU",
                fix=f"add -quickgelu to {architecture}, or take it away",
            )
        repo, _, file = look["hf_hub"].rpartition("/")
        source = Source(repo, "main", file or "open_clip_model.safetensors")
    elif ":" in name:
        repo, revision = name.partition(":")[2], "main"
        if name.startswith("hf-hub:") and "@" in repo:
            repo, _, revision = repo.partition("@")
        source = Source(repo, revision, "open_clip_model.safetensors")
    else:
        source = None
    size = model["vision_cfg"]["image_size"]
    return Card(
        name,
        architecture,
        size if isinstance(size, int) else size[0],
        model["embed_dim"],
        tuple(look.get("mean", OPENAI_DATASET_MEAN)),
        tuple(look.get("std", OPENAI_DATASET_STD)),
        source=source,
    )


def _timm_card(name: str) -> Card:
    model = name.removeprefix("timm:")
    if not timm.is_model(model):
        raise DataError(f"timm has no model {model!r}", fix=_nearest(model, timm.list_models()))
    known = timm.get_pretrained_cfg(model)
    with torch.device("meta"):  # the shape of the network, without its weights
        width = timm.create_model(model, num_classes=0).head_hidden_size
    source = Source(known.hf_hub_id, "main", "model.safetensors") if known.hf_hub_id else None
    look = {"mean": known.mean, "std": known.std, "source": source}
    return Card(
        name, name, known.input_size[-1], width, licence=known.license or "not stated", **look
    )


def config(architecture: str) -> dict:
    """Return open_clip's description of a model: ``model_cfg``, and mostly ``preprocess_cfg``."""
    place, _, rest = architecture.partition(":")
    if place == "local-dir":
        path = Path(rest) / "open_clip_config.json"
        if not path.is_file():
            raise DataError("there is no such file", file=path, fix="give an open_clip folder")
    elif place == "hf-hub":
        repo, _, revision = rest.partition("@")
        path = _from_hub(architecture, Source(repo, revision or "main", "open_clip_config.json"))
    else:
        model = open_clip.get_model_config(architecture)
        if model is None:
            near = _nearest(architecture, [*CARDS, *open_clip.list_models()])
            raise DataError(f"open_clip has no architecture {architecture!r}", fix=near)
        return {"model_cfg": model}
    return json.loads(path.read_text(encoding="utf-8"))


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.3)
    return "perhaps you mean " + ", ".join(close or names[:4])


def hashed(values: Iterable) -> str:
    """Return the SHA-256 over arrays, tensors and whatever else shows its value when printed."""
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


def find(known: Card, pretrained: bool, weights: Path | str | None) -> Path | None:
    """Return the file with the weights of a tower, fetched if need be; None for random ones.

    Raises
    ------
    DataError
        When there is no such file, or the hub cannot or will not send it.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise DataError("there is no such file of weights", file=Path(weights))
        return Path(weights)
    if not pretrained or known is CARDS["mini"]:
        return None
    if known.source is None:
        raise DataError(
            f"no weights are known for the tower {known.name!r}. {known.note}".strip(". "),
            fix="give weights=, or a tag as in 'ViT-B-16:laion2b_s34b_b88k', or pretrained=False",
        )
    if known.architecture.startswith("local-dir:"):
        names = (known.source.file, _PLAIN[known.source.file])
        found = [path for name in names if (path := Path(known.source.repo) / name).is_file()]
        if not found:
            raise DataError(f"none of {names} is here", file=Path(known.source.repo))
        return found[0]
    return _from_hub(known.name, known.source)


_PLAIN = {  # the older name of the same weights in a repository without safetensors
    "open_clip_model.safetensors": "open_clip_pytorch_model.bin",
    "model.safetensors": "pytorch_model.bin",
}


def _from_hub(name: str, source: Source) -> Path:
    """Fetch one file of a model into the hub's own cache; say within seconds if that cannot be."""
    import httpx
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

    place = {"repo_id": source.repo, "filename": source.file, "revision": source.revision}
    where = f"{source.file} of {source.repo} at revision {source.revision[:8]}"
    elsewhere = "fetch that file by another way and give its path as weights=, or use 'mini'"
    if isinstance(cached := hub.try_to_load_from_cache(**place), str):
        return Path(cached)
    other = replace(source, file=_PLAIN.get(source.file, source.file))
    out_of_reach = DataError(
        f"the tower {name!r} needs {where}, which is not in the hub's cache, and the hub cannot be "
        "reached",
        fix=f"connect to the internet once, or {elsewhere}",
    )
    if hub.constants.HF_HUB_OFFLINE or not files.reachable(hub.constants.ENDPOINT):
        if isinstance(
            cached := hub.try_to_load_from_cache(**place | {"filename": other.file}), str
        ):
            return Path(cached)
        raise out_of_reach
    try:
        logger.info("fetching %s", where)
        file = Path(hub.hf_hub_download(**place))
    except GatedRepoError as error:
        raise DataError(
            f"the weights of the tower {name!r} are gated",
            fix=f"ask for access at {hub.constants.ENDPOINT}/{source.repo}, then make a token "
            f"there and set the environment variable HF_TOKEN to it; or {elsewhere}",
        ) from error
    except LocalEntryNotFoundError as error:
        raise out_of_reach from error
    except EntryNotFoundError as error:
        if other.file != source.file:
            return _from_hub(name, other)
        raise DataError(f"the hub has no {where}", fix=elsewhere) from error
    except (hub.errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise DataError(f"fetching {where} failed: {error}", fix=elsewhere) from error
    files._verify_blob(file, None)
    return file


def read(file: Path, known: Card, pinned: bool) -> dict[str, Tensor]:
    """Return named weights from a file; what Transformers wrote is converted, once.

    Parameters
    ----------
    file
        ``.safetensors``, or plain tensors that torch saved.
    known
        The tower they are for.
    pinned
        Whether the file must have the hash on the card.
    """
    key = files.digest(source=files.fingerprint(file), format=1)
    converted = files.cache_dir() / "towers" / f"{key}.safetensors"
    if converted.is_file():
        return _tensors(converted)
    expected = known.source.sha256 if pinned and known.source else None
    if expected and files.sha256(file) != expected:
        raise DataError(
            f"the weights of {known.name!r} do not match their pinned hash",
            file=file,
            fix="delete the file and fetch it again",
        )
    state = _tensors(file)
    if "text_model.embeddings.token_embedding.weight" in state:
        state = convert(state)
        with files.atomic(converted) as temporary:
            save_file(state, temporary)
        logger.info("converted %s to %s", file, converted)
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    """Read named tensors, and nothing else, from a file."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = str(error).partition("\n")[0] or "it is empty"
        if isinstance(error, pickle.UnpicklingError):  # its text says how to open it anyway
            why = "it is damaged, or holds more than tensors"
        raise DataError(
            f"no weights can be read from it: {why}",
            file=file,
            fix="fetch it again if it is cut short; a pickle with more than tensors in it could "
            "run code and is never opened",
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError("it holds something else than named tensors", file=file)
    return dict(state)


def fill(model: nn.Module, state: Mapping[str, Tensor], name: str, file: Path) -> None:
    """Give a model the weights that fit it exactly, or say what does not fit."""
    own = model.state_dict()
    lists = {
        "lacks": own.keys() - state.keys(),
        "has too much": state.keys() - own.keys(),
        "has another shape of": {
            key for key in own.keys() & state.keys() if own[key].shape != state[key].shape
        },
    }
    wrong = [f"it {what} {len(keys)}, such as {min(keys)}" for what, keys in lists.items() if keys]
    if wrong:
        raise DataError(
            f"the weights do not fit the tower {name!r}: " + "; ".join(wrong),
            file=file,
            fix="use the tower that these weights were made with, or other weights",
        )
    model.load_state_dict(state)


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
_BLOCKS = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
}


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and join the weights of a CLIP model of Transformers to those of open_clip.

    Query, key and value lie one below the other in open_clip, and its two projections are
    transposed. Whether the GELU was the quick one is not in the weights: the tower must know.

    Raises
    ------
    DataError
        When a name is not known, or one of query, key and value is missing.
    """
    new, thirds = {}, {}
    for name, value in state.items():
        block = next((start for start in _BLOCKS if name.startswith(start)), None)
        if name in _OUTSIDE:
            flip = name in ("text_projection.weight", "visual_projection.weight")
            new[_OUTSIDE[name]] = (value.T if flip else value).contiguous()
        elif block:
            number, _, rest = name.removeprefix(block).partition(".")
            part, _, kind = rest.rpartition(".")
            if part in _INSIDE:
                new[f"{_BLOCKS[block]}{number}.{_INSIDE[part]}.{kind}"] = value.contiguous()
            elif part in (f"self_attn.{letter}_proj" for letter in "qkv"):
                joint = thirds.setdefault(f"{_BLOCKS[block]}{number}.attn.in_proj_{kind}", {})
                joint[part[-6]] = value
            else:
                raise _unconverted(f"has {name}, which open_clip has no place for")
        elif not name.endswith("position_ids"):  # older versions saved these 0, 1, 2, ...
            raise _unconverted(f"has {name}, which open_clip has no place for")
    for name, parts in thirds.items():
        if len(parts) < 3:
            raise _unconverted(f"lacks a part of what becomes {name}")
        new[name] = torch.cat([parts[letter] for letter in "qkv"])
    return new


def _unconverted(what: str) -> DataError:
    return DataError(f"this checkpoint {what}", fix="convert only CLIP models of Transformers")
