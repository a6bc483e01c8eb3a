"""Encoders for tiles, captions and genes: one card, one preprocessing and one output width each.

An image tower takes pixels between 0 and 1 at any size and does the rest inside, so that no chapter
can feed it what another tower was trained on. Its card and its weights are from `helpers.weights`.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from skimage.color import hed_from_rgb
from torch import Tensor, nn

from helpers import weights as stored
from helpers.files import DataError, atomic, cache_dir, progress
from helpers.weights import CARDS, Card, card, convert

__all__ = [
    "CARDS", "Card", "Colour", "GeneTower", "ImageTower", "TextTower", "as_pixels", "card",
    "convert", "embed", "freeze", "load", "load_clip",
]  # fmt: skip

logger = logging.getLogger(__name__)


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

    def train(self, mode: bool = True) -> "ImageTower":
        """Switch as always, but leave the running statistics of frozen batch norms alone."""
        super().train(mode)
        for module in self.trunk.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
                weight.requires_grad for weight in module.parameters()
            ):
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
    """Sort along the last axis; on a CPU by numpy, which does it in a tenth of torch's time."""
    if numbers.device.type == "cpu":
        return torch.from_numpy(np.sort(numbers.detach().numpy()))
    return numbers.sort().values


def _spread(numbers: Tensor) -> Tensor:
    """Return the standard deviation along the last axis, faster than torch's own on a CPU."""
    apart = numbers - numbers.mean(dim=-1, keepdim=True)
    return (apart.square_().sum(dim=-1) / (numbers.shape[-1] - 1)).sqrt()


def load(
    name: str, *, seed: int = 0, pretrained: bool = True, weights: Path | str | None = None
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

    Raises
    ------
    DataError
        When weights cannot be had, cannot be read, or belong to another tower.
    """
    known = card(name)
    if name == "colour":
        return Colour()
    file = stored.find(known, pretrained, weights)
    if known.architecture.startswith("timm:"):
        with _seeded(seed):
            model = trunk = timm.create_model(
                known.architecture.removeprefix("timm:"), num_classes=0, **known.options
            )
    else:
        model = _clip(known, seed)
        trunk = model.visual
    tower = ImageTower(known, trunk)
    if file:
        state = stored.read(file, known, weights is None)
        if all(key.startswith("trunk.") for key in state):
            model = tower
        elif model is trunk:  # timm's file has a classifier, the tower has none
            heads = trunk.default_cfg.get("classifier") or ()
            heads = tuple(f"{h}." for h in ([heads] if isinstance(heads, str) else heads))
            state = {key: value for key, value in state.items() if not key.startswith(heads)}
        stored.fill(model, state, name, file)
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
    file = stored.find(known, pretrained, weights)
    model = _clip(known, seed)
    text = stored.config(known.architecture)["model_cfg"]["text_cfg"]
    if "hf_tokenizer_name" in text:
        raise DataError(
            f"the tokenizer of {name!r} comes with the package transformers",
            fix="use towers.load for its image side, or open_clip itself",
        )
    if file:
        stored.fill(model, stored.read(file, known, weights is None), name, file)
    return model.eval(), open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))


def _clip(known: Card, seed: int) -> open_clip.CLIP:
    """Build both towers with random weights."""
    config = stored.config(known.architecture)["model_cfg"]
    if "multimodal_cfg" in config or "hf_model_name" in config["text_cfg"]:
        raise DataError(
            f"{known.name!r} is more than two towers of open_clip", fix="build it with open_clip"
        )
    custom = config.pop("custom_text", False)
    config["vision_cfg"]["timm_model_pretrained"] = False  # no download behind our back
    with _seeded(seed):
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


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
            raise DataError(f"{type(clip).__name__} is built differently", fix="use its .text")
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
                f"tokens must be whole numbers (n, {self.context}), not {tokens.dtype} "
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
            raise DataError(f"a panel needs genes, each once; more than once: {_some(twice)}")
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
                raise DataError(f"a gene tower is 'linear' or 'mlp', not {kind!r}")
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("std", torch.ones(n))

    def set_scale(self, expression: np.ndarray | Tensor) -> "GeneTower":
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
            raise DataError(f"expression is empty, NaN or infinite, for: {_some(broken)}")
        if self.kind == "mlp":
            std = rows.std(dim=0, correction=0)
            self.mean.copy_(rows.mean(dim=0))
            self.std.copy_(torch.where(std > 1e-6, std, 1.0))
        return self

    def table(self, expression: pd.DataFrame) -> np.ndarray:
        """Return expression with genes as columns as float32 ``(spots, genes)`` in panel order.

        Raises
        ------
        DataError
            Naming the genes that are missing, there twice, or not finite.
        """
        columns = expression.columns
        if missing := [gene for gene in self.genes if gene not in columns]:
            raise DataError(
                f"genes of the panel are not in the table: {_some(missing)}",
                fix="choose the panel among genes that every slide has",
            )
        if twice := [gene for gene in columns[columns.duplicated()].unique() if gene in self.genes]:
            raise DataError(f"genes of the panel are in the table twice: {_some(twice)}")
        values = expression[list(self.genes)].to_numpy(np.float32)
        if not np.isfinite(values).all():
            broken = np.asarray(self.genes)[~np.isfinite(values).all(axis=0)]
            raise DataError(f"expression is NaN or infinite for: {_some(broken)}")
        return values

    def forward(self, x: Tensor) -> Tensor:
        """Turn expression, float32 ``(n, genes)``, into features ``(n, width)``."""
        self._check(x)
        return self.layers((x - self.mean) / self.std)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != len(self.genes):
            raise DataError(
                f"expression must have shape (n, {len(self.genes)}), not {tuple(x.shape)}",
                fix="make it with the tower's table()",
            )

    def get_extra_state(self) -> Tensor:
        """Return the names as a tensor of bytes, which safetensors and ``weights_only`` hold."""
        return torch.tensor(list(json.dumps(self.genes).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the state of another panel."""
        genes = tuple(json.loads(bytes(state.tolist())))
        if genes != self.genes:
            other = [gene for gene in genes if gene not in self.genes]
            raise DataError(
                "these weights belong to another panel: "
                + (f"{_some(other)} is not in this one" if other else "the order differs"),
                fix="build the tower with the panel it was trained on",
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" * (len(names) > 5))


def as_pixels(tiles: np.ndarray | Tensor, device: str | torch.device = "cpu") -> Tensor:
    """Return uint8 tiles ``(n, h, w, 3)`` as float32 ``(n, 3, h, w)`` in [0, 1] on a device.

    The bytes are copied first and converted there: a quarter of the traffic.
    """
    if isinstance(tiles, np.ndarray) and not tiles.flags.writeable:
        tiles = tiles.copy()  # torch wants to be able to write
    tiles = torch.as_tensor(tiles)
    if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3:
        raise DataError(f"tiles must be uint8 (n, h, w, 3), not {tiles.dtype} {tuple(tiles.shape)}")
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
        What embeds what, how many at a time, and where.
    cache
        Keep the features and compute only those of tiles which these weights have not seen before.
        For towers of `load` alone; what a module of another class computes, its weights do not say.
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
"""Counted up whenever a tower of the same weights gives other features than before."""


def _remembered(
    tower: nn.Module, tiles: np.ndarray, batch_size: int, device: torch.device
) -> np.ndarray:
    """`embed`, with one file in the cache per tower: the digests of its tiles, and their features.

    Where two processes add to it at a time, the later one wins, and the rest is computed again.
    """
    what = [FEATURES, device.type, tiles.shape[1:], repr(tower), tower.card]
    key = stored.hashed([*what, *(x for item in tower.state_dict().items() for x in item)])
    file = cache_dir() / "features" / f"{key[:16]}.npz"
    tiles = np.ascontiguousarray(tiles)
    asked = pd.Index([blake2b(tile, digest_size=16).hexdigest() for tile in tiles])
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
        except Exception as error:  # at damaged bytes zipfile and numpy throw a dozen kinds
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
        How many: None for the whole tower, 0 for nothing at all.
    """
    tower.requires_grad_(blocks is None)
    if blocks:
        trunk = getattr(tower, "trunk", None)
        if isinstance(trunk, open_clip.transformer.VisionTransformer):
            there = len(trunk.transformer.resblocks)
        elif hasattr(trunk, "group_matcher"):
            groups = timm.models.group_parameters(trunk, trunk.group_matcher())
            there = len(groups) - 1  # the first one is what comes before the blocks
        else:
            raise DataError(f"no blocks are known in {type(trunk or tower).__name__}")
        if not 0 < blocks <= there:
            raise DataError(
                f"it has {there} blocks, of which {blocks} cannot stay trainable",
                fix="give a smaller number, or None to train everything",
            )
        if isinstance(trunk, open_clip.transformer.VisionTransformer):
            trunk.lock(unlocked_groups=blocks + 1)  # the projection is a group of its own
        else:
            for group in sorted(groups)[-blocks:]:
                for name in groups[group]:
                    trunk.get_parameter(name).requires_grad_(True)
    tower.train(tower.training)  # frozen batch norms stop counting
