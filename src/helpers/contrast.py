"""Two towers brought together: the model, the loss, and one `fit` for laptop, GPU and torchrun.

`fit` is a function of initial weights, data and settings alone: every random number is drawn from
the seed, the epoch and the step. So a result is looked up instead of computed twice, and a training
that was killed goes on where it stood, to the same weights.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from helpers import genes, towers
from helpers.files import DataError, atomic, cache_dir, digest
from helpers.model import (
    BOOK,
    KS,
    PAPER,
    Settings,
    TwoTowers,
    choose_device,
    choose_precision,
    embed_pairs,
    info_nce,
    recall,
)  # fmt: skip
from helpers.pairs import Pairs, augment, check_apart, pair
from helpers.training import Run, ranks, share
from helpers.weights import hashed

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "BOOK", "PAPER", "Fitted", "Fold", "Pairs", "Settings", "TwoTowers", "augment", "check_apart",
    "embed_pairs", "fit", "info_nce", "leave_out", "pair", "recall",
]  # fmt: skip

logger = logging.getLogger(__name__)

_VERSION = 1  # of what `fit` computes; a new one makes every cached model stale


@dataclass(frozen=True)
class Fitted:
    """A trained model and how it got there.

    Attributes
    ----------
    model
        In eval mode, with the weights of `best_epoch`.
    history
        One row per measurement: `epoch`, `split` (``"train"``, ``"validation"``), `measure`
        (``"loss"``, ``"recall"``, ``"temperature"``, ``"learning rate"``, ``"seconds"``,
        ``"tiles per second"``), `direction` and `k` and `chance` of a recall, `value`. Epoch 0 is
        before training.
    best_epoch
        The epoch that was kept.
    folder
        Where it lies in the cache; None when it does not.
    """

    model: TwoTowers
    history: pd.DataFrame
    best_epoch: int
    folder: Path | None


def fit(
    model: TwoTowers,
    train: Pairs,
    validation: Pairs | None = None,
    settings: Settings = BOOK,
    *,
    device: str | torch.device | None = None,
    cache: bool = True,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
) -> Fitted:
    """Train two towers to find each other's rows.

    The result is a function of the model's weights, the pairs and the settings. It is kept in the
    cache and read back when the same is asked for again; a training that was cut off goes on from
    its last checkpoint. Under torchrun, every process takes its share of each batch.

    Parameters
    ----------
    model
        Where to start; left as it is.
    train, validation
        Pairs with no slide, no group of adjacent sections and no other panel in common. A tower
        with `set_scale` learns the scale of the second view, from `train` alone.
    settings
        How to train.
    device
        ``"cuda"`` if there is one, else ``"cpu"``, when None.
    cache
        Look the result up and keep it.
    on_epoch
        Called with the history after every epoch, for a live curve; once when read back.

    Returns
    -------
    Fitted

    Raises
    ------
    DataError
        When training and validation are not apart; the loss is no number any more; memory runs
        out; or what lies in the cache is damaged.
    """
    rank, _ = ranks()
    device = choose_device(device)
    settings = replace(settings, precision=choose_precision(settings.precision, device))
    _check(model, train, validation, settings)
    key = share(_key(model, train, validation, settings)) if cache else None
    folder = cache_dir() / "models" / key if cache else None
    if folder is not None and share((folder / "model.safetensors").exists()):
        return _read(folder, model, device, on_epoch)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # the caller's random numbers stay as they were
        try:
            run = Run(model, train, validation, settings, device)
            if folder is not None and share((folder / "checkpoint.pt").exists()):
                run.load(folder / "checkpoint.pt", key)
            run.go(folder, key, on_epoch if rank == 0 else None)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            micro, batch = settings.micro_batch, settings.batch_size
            raise DataError(
                f"the memory of {device} does not hold a training step (micro_batch={micro}, "
                f"batch_size={batch})",
                fix=f"set micro_batch={max(1, min(micro or batch, batch) // 4)}, which takes "
                "the same steps with less memory; should that not help, lower batch_size, which "
                "gives another result",
            ) from error
    epoch = run.keep()
    fitted = Fitted(run.model, run.history(), epoch, folder)
    if folder is not None and rank == 0:
        _write(folder, key, fitted, settings, (train, validation))
    return fitted


def _out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)  # as torch says on a CPU


def _check(model: TwoTowers, train: Pairs, validation: Pairs | None, settings: Settings) -> None:
    """Refuse what cannot be trained, or only with a leak."""
    if len(train) < 2:
        raise DataError(f"{len(train)} pair to train on has no negatives", fix="give more pairs")
    if model.dim != settings.dim:
        what = f"the model has dim {model.dim}, the settings have {settings.dim}"
        raise DataError(what, fix="build TwoTowers with the settings it is trained with")
    named = getattr(model.other, "genes", None)
    if named is not None and train.panel is not None and tuple(named) != train.panel.genes:
        what = f"the gene tower and panel {train.panel.name!r} name other genes"
        raise DataError(what, fix="build GeneTower with panel.genes")
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.image.modules())
    if normed and (settings.micro_batch or ranks()[1] > 1):
        what = "this image tower has batch norm, which would see parts of a batch instead of all"
        fix = "set micro_batch=None in a single process, or take a tower with layer norm"
        raise DataError(what, fix=fix)
    if validation is not None:
        check_apart(train, validation)
        if len(validation) <= KS[-1]:
            what = f"among {len(validation)} pairs of validation, recall@{KS[-1]} says nothing"
            raise DataError(what, fix="validate on more pairs, or on none")
    elif settings.patience is not None:
        raise DataError("patience without validation", fix="give validation, or patience=None")


def _key(model: TwoTowers, train: Pairs, validation: Pairs | None, settings: Settings) -> str:
    """Return what stands for settings, initial weights and data."""
    state = {**dict(model.named_buffers()), **model.state_dict()}
    return digest(
        version=_VERSION,
        settings=asdict(settings),
        architecture=f"{model!r} {getattr(model.image, 'card', None)}",
        trainable=[name for name, p in model.named_parameters() if p.requires_grad],
        weights=hashed(x for item in state.items() for x in item),
        data=[
            hashed([p.tiles, p.other, *p.spots.index, *p.spots["slide"], *_names(p)])
            for p in (train, validation)
            if p is not None
        ],
    )


def _names(pairs: Pairs) -> tuple[str, ...]:
    return () if pairs.panel is None else pairs.panel.genes


def _write(
    folder: Path, key: str, fitted: Fitted, settings: Settings, data: tuple[Pairs, Pairs | None]
) -> None:
    """Keep a result: the weights come last, and with them it counts as finished."""
    facts = {"key": key, "best_epoch": fitted.best_epoch, "settings": asdict(settings)}
    slides = {str(s) for pairs in data if pairs is not None for s in pairs.spots["slide"]}
    facts["slides"] = sorted(slides)  # tools/workshop.py asks which study a model is of
    with atomic(folder / "history.csv") as temporary:
        fitted.history.to_csv(temporary, index=False)
    with atomic(folder / "settings.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1))
    weights = {name: value.contiguous() for name, value in fitted.model.state_dict().items()}
    with atomic(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, {"key": key})
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def _read(
    folder: Path,
    model: TwoTowers,
    device: torch.device,
    on_epoch: Callable[[pd.DataFrame], None] | None,
) -> Fitted:
    """Read a finished training back."""
    path = folder / "model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            key, weights = file.metadata()["key"], {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        facts = json.loads((folder / "settings.json").read_text())
        history = pd.read_csv(folder / "history.csv", float_precision="round_trip")
        history["direction"] = history["direction"].fillna("")
        best = int(facts["best_epoch"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        fix = f"delete the folder {folder} to train again"
        raise DataError(f"the model kept here is damaged ({error})", file=path, fix=fix) from error
    if {key, facts["key"]} != {folder.name}:
        fix = f"delete the folder {folder} to train again"
        raise DataError("the model kept here is of another training", file=path, fix=fix)
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    logger.info("the trained model is read from %s", folder)
    if on_epoch is not None and ranks()[0] == 0:
        on_epoch(history)
    return Fitted(model.to(device).eval(), history, best, folder)


@dataclass(frozen=True)
class Fold:
    """A model trained without one donor, and what it was trained and is tested on.

    Attributes
    ----------
    donor
        Who was held out.
    panel
        Genes, chosen on the training slides; None where the second view holds none.
    train, validation, test
        Pairs of the other donors, of those kept to validate on (or None), and of the donor.
    before, fitted
        The model before training, and after.
    """

    donor: str
    panel: genes.Panel | None
    train: Pairs
    validation: Pairs | None
    test: Pairs
    before: TwoTowers
    fitted: Fitted


def leave_out(
    adatas: Mapping[str, AnnData],
    donor: str,
    *,
    validation: str | None = None,
    tower: str | nn.Module = "mini",
    choose: Callable[..., genes.Panel] | genes.Panel = genes.shared_hvg,
    n_genes: int = 256,
    standardise: bool = True,
    settings: Settings = BOOK,
    side_um: float = 100.0,
    size: int = 96,
    edge: str = "pad",
    device: str | torch.device | None = None,
    cache: bool = True,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
) -> Fold:
    """Train on all donors but one.

    Nothing of the donor reaches training but the *names* of the genes that its slides measured:
    panel, scaler and weights come from the others.

    Parameters
    ----------
    adatas
        Slides from `helpers.genes.normalise`.
    donor
        Whom to hold out.
    validation
        Another donor, whom to validate on; None: nobody, the last epoch is kept.
    tower
        A name for `helpers.towers.load`, or a tower.
    choose, n_genes
        How to choose the panel, from slides and a number of genes; or a panel, which is refused
        if it was chosen with a slide held out.
    standardise
        As for `pair`.
    settings, device, cache, on_epoch
        As for `fit`.
    side_um, size, edge
        As for `helpers.tiles.cut_study`.

    Raises
    ------
    DataError
        When no slide is of the donor, or something of the donor would leak.
    """
    from helpers import tiles

    donors = {slide: str(adata.obs["donor"].iloc[0]) for slide, adata in adatas.items()}
    for name in (donor, validation):
        if name is not None and name not in donors.values():
            fix = f"one of {sorted(set(donors.values()))}"
            raise DataError(f"no slide is of donor {name!r}", fix=fix)
    if donor == validation:
        what = f"donor {donor!r} cannot be held out and choose the best epoch"
        raise DataError(what, fix="validate on another donor, or on none")
    training = {s: a for s, a in adatas.items() if donors[s] not in (donor, validation)}
    if not training:
        raise DataError(f"all slides are of donor {donor!r}", fix="give slides of other donors")
    if isinstance(choose, genes.Panel):
        panel = choose
    else:
        shared = genes.shared_genes(adatas)
        panel = choose({s: a[:, shared] for s, a in training.items()}, n_genes)
    cut = tiles.cut_study(adatas, side_um=side_um, size=size, edge=edge, cache=cache)
    pairs = pair(adatas, cut, panel, standardise=standardise)

    def of(some: Callable[[str], bool]) -> Pairs:
        return pairs.of([slide for slide, name in donors.items() if some(name)])

    train, test = of(lambda name: name not in (donor, validation)), of(lambda name: name == donor)
    check_apart(train, test, f"the held-out donor {donor}")
    watched = None if validation is None else of(lambda name: name == validation)
    if watched is not None:
        check_apart(watched, test, f"the held-out donor {donor}")
    image = towers.load(tower, seed=settings.seed) if isinstance(tower, str) else tower
    other = towers.GeneTower(panel.genes, settings.encoder, width=settings.dim, seed=settings.seed)
    before = TwoTowers(image, other, settings)
    fitted = fit(before, train, watched, settings, device=device, cache=cache, on_epoch=on_epoch)
    return Fold(donor, panel, train, watched, test, before, fitted)
