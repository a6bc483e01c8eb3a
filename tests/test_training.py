"""Training, its cache and checkpoints, the errors it must raise, and what it must never see."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from helpers import contrast, genes, slides, splits, towers, training
from helpers.contrast import BOOK, PAPER, Pairs, Settings, TwoTowers
from helpers.files import DataError
from helpers.metrics import recall
from helpers.splits import Fold
from helpers.towers import GeneTower, TextTower, load_clip
from helpers.training import fit

HERE = Path(__file__).parent
PANEL = genes.Panel("ten", tuple(f"G{i}" for i in range(10)), "by hand", ("A1", "A2"))
QUICK = Settings(
    epochs=4, batch_size=24, lr=5e-3, dim=8, augment=0.0, precision="fp32", micro_batch=None
)


class Small(nn.Module):
    """An image tower of two layers, for tiles of 6 px."""

    width = 16

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(108, 16), nn.GELU(), nn.LayerNorm(16))
        self.drop, self.seen = nn.Dropout(dropout), 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return self.drop(self.layers(pixels.flatten(1) - 0.5))


def model_of(dropout: float = 0.1, settings: Settings = QUICK, kind: str = "mlp") -> TwoTowers:
    torch.manual_seed(3)
    other = GeneTower(PANEL.genes, kind, width=settings.dim, hidden=16, dropout=dropout)
    return TwoTowers(Small(), other, settings)


def study(n: int = 24, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Two slides to train on and one to validate on; tiles and genes show the same 4 numbers."""
    rng = np.random.default_rng(seed)
    slides = np.repeat(["A1", "A2", "B1"], n)
    hidden = rng.normal(size=(len(slides), 4))
    light = 128 + 40 * hidden @ rng.normal(size=(4, 108)) / 2
    tiles = light.clip(0, 255).astype(np.uint8).reshape(-1, 6, 6, 3)
    expression = (5 + hidden @ rng.normal(size=(4, 10))).astype(np.float32)
    spots = pd.DataFrame({"slide": slides}, index=[f"{s}_{i}" for i, s in enumerate(slides)])
    spots["donor"] = spots["group"] = spots["slide"].str[0]
    spots["label"], spots["x_px"], spots["y_px"] = "layer", 0.0, 0.0
    pairs = Pairs(tiles, expression, spots, PANEL)
    return pairs.of(["A1", "A2"]), pairs.of(["B1"])


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))


def same(one: nn.Module, two: nn.Module, rtol: float = 0.0, atol: float = 0.0) -> None:
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def different(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return any(not torch.equal(a[name], b[name]) for name in a)


def curve(history: pd.DataFrame) -> pd.DataFrame:
    """What a history says, but for how long it took."""
    timed = history["measure"].isin(["seconds", "tiles per second"])
    return history[~timed].reset_index(drop=True)


# --------------------------------------------------------------------------- steps


def test_paper_is_what_the_paper_did():
    assert (PAPER.optimiser, PAPER.lr, PAPER.weight_decay) == ("adam", 5e-5, 0.2)
    assert (PAPER.betas, PAPER.eps) == ((0.9, 0.98), 1e-6)
    assert (PAPER.batch_size, PAPER.epochs, PAPER.dim) == (1024, 15, 32)
    assert (PAPER.encoder, PAPER.temperature, PAPER.max_scale) == ("linear", 0.07, None)
    assert (PAPER.warmup, PAPER.schedule, PAPER.augment, PAPER.crop) == (0.0, "constant", 0, 0)
    assert (PAPER.precision, PAPER.keep, PAPER.train_blocks) == ("fp32", "last", None)
    model = model_of(settings=replace(PAPER, dim=8), kind="linear")
    assert isinstance(model.other_head, nn.Identity)  # the gene encoder is one linear layer
    groups = training._optimiser(model, PAPER).param_groups
    assert [g["weight_decay"] for g in groups] == [0.2]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_adamw_spares_biases_norms_and_temperature():
    model = model_of()
    groups = training._optimiser(model, replace(QUICK, tower_lr=0.1)).param_groups
    spared = [p for g in groups if g["weight_decay"] == 0 for p in g["params"]]
    assert {id(p) for p in spared} == {id(p) for p in model.parameters() if p.ndim < 2}
    slow = [p for g in groups if g["factor"] == 0.1 for p in g["params"]]
    assert {id(p) for p in slow} == {id(p) for p in model.image.parameters()}


def test_learning_rate_climbs_and_falls():
    settings = replace(QUICK, epochs=10, lr=1.0, warmup=0.2, schedule="cosine")
    rates = [training._rate(step, 10, settings) for step in range(100)]
    assert np.argmax(rates) == 20
    assert rates[20] == 1.0
    assert (np.diff(rates[:21]) > 0).all()
    assert (np.diff(rates[20:]) < 0).all()
    assert rates[-1] < 1e-3
    constant = replace(settings, schedule="constant", warmup=0.0)
    assert {training._rate(step, 10, constant) for step in range(100)} == {1.0}


def test_batches():
    slides = np.repeat(["a", "b", "c"], [50, 30, 9])
    settings = replace(QUICK, batch_size=20)

    def batches(epoch=1, world=1, **changes):
        return training._batches(slides, replace(settings, **changes), epoch, world)

    assert list(map(len, batches())) == [20, 20, 20, 20]  # 9 are less than half of 20
    assert list(map(len, batches(batch_size=26))) == [26, 26, 26]
    assert list(map(len, batches(batch_size=25))) == [25, 25, 25, 14]
    assert list(map(len, batches(batch_size=1000))) == [89]
    assert list(map(len, batches(batch_size=1000, world=2))) == [88]
    rows = torch.cat(batches())
    assert len(rows.unique()) == 80
    assert torch.equal(rows, torch.cat(batches()))
    assert not torch.equal(rows, torch.cat(batches(epoch=2)))
    assert not torch.equal(rows, torch.cat(batches(seed=1)))
    alone = batches(same_slide=True)
    assert all(len(set(slides[b])) == 1 for b in alone)
    assert sorted(map(len, alone)) == [9, 10, 10, 20, 20, 20]


# --------------------------------------------------------------------------- training


def test_training_learns_and_says_how():
    train, validation = study(100)
    model = model_of()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    said = []
    settings = replace(QUICK, epochs=15)
    fitted = fit(model, train, validation, settings, on_epoch=said.append)
    history = fitted.history
    found = history[(history["measure"] == "recall") & (history["k"] == 10)]
    best = found.groupby("epoch")["value"].mean()
    assert best.max() > 4 * found["chance"].iloc[0] > 0
    assert best.drop(0).idxmax() == fitted.best_epoch
    assert found["direction"].nunique() == 2
    loss = history[history["measure"] == "loss"].pivot(
        index="epoch", columns="split", values="value"
    )
    assert loss["train"].iloc[-1] < 0.5 * math.log(24)
    assert list(loss.index) == list(range(16))
    assert {"temperature", "learning rate", "seconds", "tiles per second"} <= set(
        history["measure"]
    )
    assert [h["epoch"].max() for h in said] == list(range(1, 16))
    assert not fitted.model.training
    for name, value in model.state_dict().items():  # the model given stays as it was
        assert torch.equal(value, start[name])
    kept = recall(*contrast.embed_pairs(fitted.model, validation, "cpu"))
    assert kept.loc[kept["k"] == 10, "recall"].mean() == pytest.approx(best[fitted.best_epoch])


def test_same_seed_same_weights_and_the_callers_numbers_untouched():
    train, validation = study()
    settings = replace(QUICK, augment=1.0, crop=0.2)
    one = fit(model_of(), train, validation, settings, cache=False)
    torch.manual_seed(99)
    two = fit(model_of(), train, validation, settings, cache=False)
    same(one.model, two.model)
    pd.testing.assert_frame_equal(curve(one.history), curve(two.history))
    other = fit(model_of(), train, validation, replace(settings, seed=1), cache=False)
    assert different(one.model, other.model)
    start = model_of()
    kept = torch.get_rng_state()
    fit(start, train, None, settings, cache=False)
    assert torch.equal(kept, torch.get_rng_state())


def test_the_tower_may_go_slower_and_numbers_follow_the_seed():
    train, _ = study()
    model = model_of()
    fitted = fit(model, train, None, replace(QUICK, tower_lr=0.0), cache=False)
    same(fitted.model.image, model.image)
    assert different(fitted.model.other, model.other)
    drawn = []
    for seed, epoch, step in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]:
        run = training.Run(model, train, None, replace(QUICK, seed=seed), torch.device("cpu"))
        run.epoch = epoch
        drawn.append(tuple(run._load((step, torch.arange(4)))[2].flatten().tolist()))
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("augment", [0.0, 1.0])
def test_micro_batches_change_nothing(augment):
    """Dropout in the gene tower is on: the second tower sees the batch whole both ways."""
    train, validation = study()
    settings = replace(QUICK, augment=augment, lr=1e-3)
    whole = fit(model_of(0.3), train, validation, settings, cache=False)
    parts = fit(model_of(0.3), train, validation, replace(settings, micro_batch=7), cache=False)
    same(whole.model, parts.model, rtol=1e-5, atol=1e-6)
    loss = [h.history.loc[h.history["measure"] == "loss", "value"] for h in (whole, parts)]
    np.testing.assert_allclose(*loss, rtol=1e-6)


def test_micro_batches_replay_dropout_in_the_image_tower():
    """With dropout drawn anew in the second pass, gradients would belong to other embeddings."""
    train, _ = study()
    settings = replace(QUICK, micro_batch=7)
    model = model_of(0.0)
    model.image = Small(dropout=0.5)
    run = training.Run(model, train, None, settings, torch.device("cpu"))
    seen = []
    run.model.image.register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    run.model.train()
    batch = run._load((0, torch.arange(21)))
    run._step(batch, (0, 1, 0, 1))
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[0] == 0, seen[1] == 0)


def test_frozen_batch_norms_allow_micro_batches():
    """The statistics of a tower of `towers.load` stay, so parts see what a whole batch sees."""
    train, _ = study()
    tower = towers.load("imagenet-random", size_px=32)
    model = TwoTowers(tower, model_of().other, QUICK)
    once = replace(QUICK, epochs=1, train_blocks=1)
    whole, parts = (
        fit(model, train, None, replace(once, micro_batch=n), cache=False).model for n in (None, 7)
    )
    moved = 0.0
    for name, value in whole.state_dict().items():
        if value.dtype.is_floating_point:
            torch.testing.assert_close(parts.state_dict()[name], value, atol=2e-4, rtol=1e-3)
            moved += float((value - model.state_dict()[name]).abs().sum())
    assert moved > 0


def test_batch_norm_and_micro_batches_are_refused():
    model = model_of()
    model.image.layers.append(nn.BatchNorm1d(16))
    with pytest.raises(DataError, match="batch norm"):
        fit(model, *study(), replace(QUICK, micro_batch=7))


def test_temperature_stays_under_its_limit_or_where_it_was():
    train, _ = study()

    def temperatures(settings: Settings) -> pd.Series:
        fitted = fit(model_of(settings=settings), train, None, settings, cache=False)
        return fitted.history.loc[fitted.history["measure"] == "temperature", "value"]

    hot = replace(QUICK, temperature=0.005, max_scale=95.0)
    assert 1 / 95.001 < temperatures(hot).min() < 1 / 94
    assert temperatures(replace(hot, max_scale=None)).min() < 1 / 150
    fixed = replace(QUICK, learn_temperature=False)
    fitted = fit(model_of(settings=fixed), train, None, fixed, cache=False)
    assert fitted.model.log_scale.item() == pytest.approx(-math.log(0.07))


def test_stops_when_validation_no_longer_rises():
    train, validation = study(12)
    settings = replace(QUICK, epochs=60, patience=3, lr=1e-2)
    fitted = fit(model_of(), train, validation, settings, cache=False)
    last = fitted.history["epoch"].max()
    assert last == fitted.best_epoch + 3 < 60
    best = fitted.history.query("measure == 'recall' and epoch == @fitted.best_epoch")
    kept = recall(*contrast.embed_pairs(fitted.model, validation, "cpu"))
    np.testing.assert_allclose(kept["recall"], best["value"])
    end = fitted.history.query("measure == 'recall' and epoch == @last")["value"]
    assert kept["recall"].tolist() != end.tolist()  # the weights are not those of the end
    with pytest.raises(DataError, match="patience without validation"):
        fit(model_of(), train, None, settings)


def test_last_epoch_is_kept_where_asked_or_without_validation():
    train, validation = study(12)
    last = replace(QUICK, epochs=6, keep="last")
    watched = fit(model_of(), train, validation, last, cache=False)
    alone = fit(model_of(), train, None, replace(last, keep="best"), cache=False)
    assert watched.best_epoch == alone.best_epoch == 6
    same(watched.model, alone.model)


def test_frozen_tower_is_looked_through_once():
    train, validation = study()
    frozen = replace(QUICK, train_blocks=0)
    fast = model_of()
    fitted = fit(fast, train, validation, frozen, cache=False)
    assert fitted.model.image.seen == len(train) + len(validation)
    same(fitted.model.image, fast.image)
    # An augmentation that changes nothing to speak of sends every tile through, every time.
    run = replace(frozen, crop=1e-9)
    slow = model_of()
    slow.image.layers[0].weight.data = (
        slow.image.layers[0].weight.data.mean(1, True).expand(-1, 108)
    )
    fast = model_of()
    fast.image.load_state_dict(slow.image.state_dict())
    one, two = (fit(m, train, None, s, cache=False) for m, s in ((slow, run), (fast, frozen)))
    assert one.model.image.seen == 4 * len(train)
    assert two.model.image.seen == len(train)
    same(one.model, two.model, rtol=1e-4, atol=1e-5)


def test_frozen_tower_drops_nothing_out():
    train, _ = study()
    settings = replace(QUICK, train_blocks=0, augment=1.0)  # augmented: it looks in every step
    model = model_of(0.0)
    model.image = Small(dropout=0.5)
    one = fit(model, train, None, settings, cache=False)
    model.image.drop.p = 0.0
    two = fit(model, train, None, settings, cache=False)
    same(one.model, two.model)


def test_batches_of_one_slide_and_captions_and_features():
    train, validation = study()
    fit(model_of(), train, validation, replace(QUICK, same_slide=True, epochs=1))
    clip, tokenizer = load_clip("mini")
    words = ["nuclei", "fat", "fibres"]
    tokens = tokenizer([f"a tile with {words[i % 3]}" for i in range(len(train))]).numpy()
    captioned = Pairs(train.tiles, tokens, train.spots)
    model = TwoTowers(Small(), TextTower(clip), QUICK)
    fitted = fit(model, captioned, None, replace(QUICK, epochs=1), cache=False)
    assert different(fitted.model.other, model.other)
    given = nn.Identity()
    given.width = 10
    model = TwoTowers(Small(), given, QUICK)
    assert fit(model, train, validation, QUICK).model.other_head.weight.shape == (8, 10)


def test_bf16_is_close_to_fp32():
    train, validation = study()
    one = fit(model_of(), train, validation, QUICK, cache=False)
    two = fit(model_of(), train, validation, replace(QUICK, precision="bf16"), cache=False)
    assert different(one.model, two.model)
    loss = [f.history.query("measure == 'loss'")["value"] for f in (one, two)]
    np.testing.assert_allclose(*loss, rtol=0.03)


# --------------------------------------------------------------------------- cache and resume


def test_asked_again_it_is_read_back(monkeypatch, caplog):
    train, validation = study()
    first = fit(model_of(), train, validation, QUICK)
    monkeypatch.setattr(training.Run, "_step", None)  # nothing is trained any more
    caplog.set_level(logging.INFO)
    said = []
    again = fit(model_of(), train, validation, QUICK, on_epoch=said.append)
    same(first.model, again.model)
    assert not again.model.training
    pd.testing.assert_frame_equal(first.history, again.history)
    pd.testing.assert_frame_equal(said[0], again.history)
    assert (again.best_epoch, again.folder) == (first.best_epoch, first.folder)
    assert "is read from" in caplog.text
    names = {file.name for file in first.folder.iterdir()}
    assert names == {"model.safetensors", "history.csv", "settings.json"}


def test_a_kept_model_says_which_slides_it_has_seen():
    folder = fit(model_of(), *study(), QUICK).folder
    assert json.loads((folder / "settings.json").read_text())["slides"] == ["A1", "A2", "B1"]


def test_any_change_of_settings_data_or_start_is_another_model():
    train, validation = study()

    def key(model=None, train=train, validation=validation, settings=QUICK):
        return training._key(model or model_of(), train, validation, settings)

    tiles, other = train.tiles.copy(), train.other.copy()
    tiles[0, 0, 0, 0] ^= 1
    other[3, 3] += 1e-4
    renamed = genes.Panel("ten", (*PANEL.genes[:9], "X"), "by hand", ())
    quick = model_of()
    quick.other.layers[0].p = 0.9
    frozen = model_of()
    frozen.image.requires_grad_(False)
    normalised = model_of()
    normalised.image.register_buffer("mean", torch.ones(3), persistent=False)
    carded = model_of()
    carded.image.card = "another preprocessing"
    moved = model_of()
    moved.log_scale.data += 1e-3
    keys = [
        key(),
        key(settings=replace(QUICK, lr=6e-3)),
        key(settings=replace(QUICK, seed=1)),
        key(settings=replace(QUICK, micro_batch=3)),  # dropout is drawn part by part
        key(train=Pairs(tiles, train.other, train.spots, PANEL)),
        key(train=Pairs(train.tiles, other, train.spots, PANEL)),
        key(train=Pairs(train.tiles, train.other, train.spots, renamed)),
        key(train=train.of(range(len(train))[::-1])),
        key(validation=None),
        key(quick),
        key(frozen),
        key(normalised),
        key(carded),
        key(moved),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def environment(cache: Path) -> dict[str, str]:
    path = os.pathsep.join([str(HERE), str(HERE.parent / "src")])
    return {**os.environ, "STIMAGE_CACHE": str(cache), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as `environment` gives: with other numbers of them sums round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch, caplog):
    cache = tmp_path / "killed"
    command = [sys.executable, HERE / "killed.py"]
    done = subprocess.run(command, env=environment(cache), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [file.name for file in (cache / "models").rglob("*.*")] == ["checkpoint.pt"]
    train, validation = study()
    whole = fit(model_of(), train, validation, QUICK, device="cpu", cache=False)
    monkeypatch.setenv("STIMAGE_CACHE", str(cache))
    caplog.set_level(logging.INFO)
    steps, step = [], training.Run._step
    monkeypatch.setattr(training.Run, "_step", lambda *a: steps.append(1) or step(*a))
    resumed = fit(model_of(), train, validation, QUICK, device="cpu")
    assert "resumes after epoch 2" in caplog.text
    assert len(steps) == 2 * 2  # the third epoch and the fourth
    same(whole.model, resumed.model)
    pd.testing.assert_frame_equal(curve(whole.history), curve(resumed.history))


@pytest.fixture
def interrupted(monkeypatch) -> Path:
    """The checkpoint of a training that was interrupted after two epochs."""
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)

    def interrupt(history: pd.DataFrame) -> None:
        if history["epoch"].max() == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model_of(), *study(), QUICK, on_epoch=interrupt)
    (path,) = (Path(os.environ["STIMAGE_CACHE"]) / "models").rglob("checkpoint.pt")
    return path


def test_truncated_checkpoint(interrupted):
    interrupted.write_bytes(interrupted.read_bytes()[:-500])
    with pytest.raises(
        DataError, match=r"checkpoint\.pt: .*cannot be read.*delete the file"
    ) as error:
        fit(model_of(), *study(), QUICK)
    assert error.value.file == interrupted


def test_checkpoint_of_another_training(interrupted, monkeypatch):
    other = replace(QUICK, lr=1e-3)
    key = training._key(model_of(), *study(), other)
    target = interrupted.parents[1] / key / "checkpoint.pt"
    target.parent.mkdir()
    target.write_bytes(interrupted.read_bytes())
    with pytest.raises(DataError, match="written with different settings"):
        fit(model_of(), *study(), other)


def test_a_pickle_is_not_opened(interrupted):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(interrupted.parent / "exploded"),))

    torch.save({"key": Bomb()}, interrupted)
    with pytest.raises(DataError, match="cannot be read"):
        fit(model_of(), *study(), QUICK)
    assert not (interrupted.parent / "exploded").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "settings.json", "history.csv"])
def test_damaged_result(name):
    folder = fit(model_of(), *study(), QUICK).folder
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if name[0] != "h" else b"")
    with pytest.raises(DataError, match=r"damaged.*delete the folder"):
        fit(model_of(), *study(), QUICK)


def test_result_of_another_training():
    one = fit(model_of(), *study(), QUICK).folder
    other = fit(model_of(), *study(), replace(QUICK, lr=1e-3)).folder
    (other / "model.safetensors").write_bytes((one / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="from a different training"):
        fit(model_of(), *study(), replace(QUICK, lr=1e-3))


# --------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    """Each has half of every batch. Dropout is off: each process would draw its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, HERE / "two_processes.py", tmp_path]
    where = environment(tmp_path / "cache of two")
    done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache of two").rglob("model.safetensors"))) == 2  # not 4
    settings = replace(QUICK, batch_size=16, augment=1.0)
    one = fit(model_of(dropout=0.0), *study(), settings, device="cpu", cache=False)
    for micro in (None, 5):
        two = torch.load(tmp_path / f"{micro}.pt", weights_only=True)
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        histories = pd.read_csv(tmp_path / f"{micro}.csv"), one.history
        loss = [history.query("measure == 'loss'")["value"] for history in histories]
        np.testing.assert_allclose(*loss, rtol=1e-5)


# --------------------------------------------------------------------------- refusals


def test_leaks_into_training_are_refused():
    train, validation = study()
    both = Pairs(
        np.concatenate([train.tiles, validation.tiles[:2]]),
        np.concatenate([train.other, validation.other[:2]]),
        pd.concat([train.spots, validation.spots[:2]]),
        PANEL,
    )
    with pytest.raises(DataError, match="share the slide B1"):
        fit(model_of(), both, validation, QUICK)
    adjacent = validation.spots.assign(group="A")
    with pytest.raises(DataError, match=r"share the group A.*\['B1'\] in validation"):
        fit(model_of(), train, replace(validation, spots=adjacent), QUICK)
    seen = replace(PANEL, slides=("A1", "B1"))
    with pytest.raises(DataError, match=r"panel 'ten' was chosen with held-out slides: B1"):
        fit(model_of(), replace(train, panel=seen), replace(validation, panel=seen), QUICK)


def test_nothing_of_validation_reaches_the_weights():
    """Neither scaler nor weights change when the genes of validation are made huge."""
    train, validation = study()
    last = replace(QUICK, keep="last")
    clean = fit(model_of(), train, validation, last, cache=False)
    poison = replace(validation, other=validation.other * np.float32(1e6))
    poisoned = fit(model_of(), train, poison, last, cache=False)
    same(clean.model, poisoned.model)
    np.testing.assert_allclose(clean.model.other.mean, train.other.mean(0), rtol=1e-5)
    assert clean.history.equals(poisoned.history) is False  # it was looked at, though


def test_refusals():
    train, validation = study()
    with pytest.raises(DataError, match="no negatives"):
        fit(model_of(), train.of([0]), None, QUICK)
    with pytest.raises(DataError, match="10 validation pairs are too few"):
        fit(model_of(), train, validation.of(range(10)), QUICK)
    with pytest.raises(DataError, match="the model has dim 8, the settings have 64"):
        fit(model_of(), train, None, BOOK)
    stranger = TwoTowers(Small(), GeneTower(["x", *PANEL.genes[1:]], width=8), QUICK)
    with pytest.raises(DataError, match="different genes"):
        fit(stranger, train, None, QUICK)
    alone = replace(train, spots=train.spots.assign(slide=[f"s{i}" for i in range(len(train))]))
    with pytest.raises(DataError, match="no batch of two"):
        fit(model_of(), alone, None, replace(QUICK, same_slide=True))


def test_a_loss_that_is_nan():
    train, _ = study()
    model = model_of()
    model.image.layers[0].weight.data[0, 0] = torch.inf
    with pytest.raises(DataError, match=r"NaN or infinite loss: epoch 1, step 1 of 2.*lower lr"):
        fit(model, train, None, QUICK)
    assert not list(Path(os.environ["STIMAGE_CACHE"]).rglob("model.safetensors"))


@pytest.mark.parametrize("micro", [None, 8])
@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_names_the_knob(micro, error):
    class Greedy(Small):
        def forward(self, pixels):
            raise error

    model = model_of()
    model.image = Greedy()
    expected = rf"micro_batch={micro}, batch_size=24.*set micro_batch={(micro or 24) // 4}"
    with pytest.raises(DataError, match=expected):
        fit(model, *study(), replace(QUICK, micro_batch=micro))


def test_other_errors_of_torch_stay_what_they_are():
    model = model_of()
    model.image.layers[0] = nn.Linear(5, 16)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(model, *study(), QUICK)


# --------------------------------------------------------------------------- without these spots


def left_out(adatas: dict[str, ad.AnnData], test: str | Fold, **more: object) -> training.HeldOut:
    options = {"settings": QUICK, "n_genes": 10, "size": 6, "tower": Small(), **more}
    torch.manual_seed(1)
    return training.leave_out(adatas, test, **options)


def poisoned(adata: ad.AnnData, rows: np.ndarray) -> ad.AnnData:
    """Multiply the expression of some spots by 50."""
    adata, factor = adata.copy(), 1 + 49 * rows[:, None]
    adata.X = adata.X.multiply(factor).tocsr()
    adata.layers["counts"] = adata.layers["counts"].multiply(factor).tocsr()
    return adata


def test_every_donor_has_one_role(sections):
    held_out = left_out(sections, "Z", validation="Y")
    assert held_out.name == "Z"
    assert set(held_out.train.spots["slide"]) == {"X1", "X2"} == set(held_out.panel.slides)
    assert set(held_out.validation.spots["slide"]) == {"Y1"}
    assert set(held_out.test.spots["slide"]) == {"Z1"}
    assert set(held_out.panel.genes) <= set(sections["Z1"].var_names)  # so it can be tested there
    assert different(held_out.before, held_out.fitted.model)
    assert len(left_out(sections, "Z").train) == 90


def test_nothing_of_the_held_out_donor_reaches_training(sections):
    tower = Small()
    clean = left_out(sections, "Y", tower=tower, cache=False)
    changed = poisoned(sections["Y1"], np.ones(30))
    changed.layers["counts"] = changed.layers["counts"][:, ::-1]
    Image.new("RGB", (240, 300), "red").save(slides.image_path(changed))
    other = left_out({**sections, "Y1": changed}, "Y", tower=tower, cache=False)
    assert not np.array_equal(clean.test.tiles, other.test.tiles)
    assert clean.panel == other.panel
    same(clean.fitted.model, other.fitted.model)


def test_leaks_by_donor_are_refused(sections):
    everyone = genes.overlap_hvg_batch(sections, 10)
    with pytest.raises(DataError, match="chosen with held-out slides: Z1"):
        left_out(sections, "Z", panel=everyone)
    known = tuple(gene for gene in everyone.genes if gene in sections["Z1"].var_names)
    but_z = genes.Panel("but z", known, "by hand", ("X1", "X2", "Y1"))
    with pytest.raises(DataError, match="chosen with held-out slides: Y1"):
        left_out(sections, "Z", validation="Y", panel=but_z)
    with pytest.raises(DataError, match="both the test donor and the validation donor"):
        left_out(sections, "Z", validation="Z")
    with pytest.raises(DataError, match=r"no slide is of donor 'Q'.*'X', 'Y', 'Z'"):
        left_out(sections, "Q")
    with pytest.raises(DataError, match=r"no donor is left to train on.*\['Z'\]"):
        left_out({"Z1": sections["Z1"]}, "Z")
    with pytest.raises(DataError, match="view 'proteins' is unknown"):
        left_out(sections, "Z", view="proteins")
    near = {s: a.copy() for s, a in sections.items()}
    near["X2"].obs["donor"] = "W"  # labelled as a different donor, but of the same block
    with pytest.raises(DataError, match=r"share the group X: slides \['X1'\].*\['X2'\]"):
        left_out(near, "W")


def test_a_fold_of_one_donor_gives_the_model_of_that_donor(sections):
    spots, tower = slides.spot_table(sections), Small()
    fold = next(f for f in splits.left_out(spots, "donor").folds if f.name == "Y")
    by_fold = left_out(sections, fold, spots=spots, tower=tower)
    by_donor = left_out(sections, "Y", tower=tower)
    assert by_fold.fitted.folder == by_donor.fitted.folder
    np.testing.assert_array_equal(by_fold.test.other, by_donor.test.other)


def test_counts_of_spots_outside_the_fold_reach_no_weight(sections):
    spots, how = slides.spot_table(sections), {"cache": False, "tower": "colour", "size": 32}
    fold = splits.spatial_blocks(spots, 2, buffer_um=200.0).folds[0]
    slide = spots["slide"].iloc[fold.test[0]]
    trained = sections[slide].obs_names.isin(spots.index[fold.train])
    assert 0 < trained.sum() < len(trained)
    found = {}
    for name, rows in {"nothing": 0 * trained, "rest": ~trained, "trained": trained}.items():
        adatas = {**sections, slide: poisoned(sections[slide], rows)}
        found[name] = left_out(adatas, fold, spots=spots, **how)
    assert list(found["rest"].test.spots.index) == list(spots.index[fold.test])
    assert not np.array_equal(found["nothing"].test.other, found["trained"].test.other)
    same(found["nothing"].fitted.model, found["rest"].fitted.model)
    assert different(found["nothing"].fitted.model, found["trained"].fitted.model)


def test_folds_that_do_not_fit_are_refused(sections):
    spots = slides.spot_table(sections)
    leaky = Fold("leaky", np.arange(20), np.arange(10, 30))
    with pytest.raises(DataError, match="'leaky' trains on 10 spots of its test"):
        left_out(sections, leaky, spots=spots)
    fold = splits.left_out(spots, "donor").folds[0]
    with pytest.raises(DataError, match="give spots="):
        left_out(sections, fold)
    panel = genes.overlap_hvg_batch(sections, 10)
    with pytest.raises(DataError, match="chosen with held-out slides: X1, X2"):
        left_out(sections, fold, spots=spots, panel=panel)
    with pytest.raises(DataError, match=r"slide X1.*a spot of the fold is missing"):
        left_out({s: a for s, a in sections.items() if s != "X1"}, fold, spots=spots)


TINY = replace(contrast.CAPTION_SETTINGS, epochs=1, batch_size=8, dim=8)


@pytest.fixture
def secret(sections) -> dict[str, ad.AnnData]:
    """Labelled sections; only donor Z has a secret garden."""
    for adata in sections.values():
        garden = adata.obs["donor"].iloc[0] == "Z"
        adata.obs["label"] = "secret garden" if garden else "plain"
    return sections


def test_words_of_the_held_out_donor_never_reach_training(secret, monkeypatch):
    given = []

    def fit(model, train, validation, settings, **_):
        given.append(train)
        return training.Fitted(model, pd.DataFrame(), 0, None)

    monkeypatch.setattr(training, "fit", fit)
    held_out = training.leave_out(secret, "Z", view="captions", settings=TINY)
    assert set(given[0].spots["donor"]) == {"X", "Y"}
    assert not given[0].spots["caption"].str.contains("secret").any()
    words = load_clip("mini", pretrained=False)[1](["secret garden"])[0, 1:3].numpy()
    assert not np.isin(given[0].other, words).any()
    assert np.isin(held_out.test.other, words).any(axis=1).all()
    training.leave_out(secret, "X", view="captions", settings=TINY)
    assert given[1].spots["caption"].str.contains("secret").sum() == 30  # with Z in training


def test_captions_are_trained_on_and_read_back(secret):
    held_out = training.leave_out(secret, "Z", view="captions", settings=TINY)
    before, after = held_out.before.state_dict(), held_out.fitted.model.state_dict()
    assert not torch.equal(before["image_head.weight"], after["image_head.weight"])
    fixed = "other.token_embedding.weight"
    assert torch.equal(before[fixed], after[fixed])
    assert held_out.panel is None
    again = training.leave_out(secret, "Z", view="captions", settings=TINY)
    assert again.fitted.folder == held_out.fitted.folder
    same(again.fitted.model, held_out.fitted.model)
    image, text = contrast.embed_pairs(held_out.fitted.model, held_out.test)
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)
    assert image.shape == text.shape == (30, 8)
