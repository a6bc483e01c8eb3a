"""Score every kind of features on every rung of the ladder of splits, into ``results/ladder.json``.

``make results STUDY=mob`` measures the whole ladder (STIMAGE_ROOT for the real studies), and
``make results STUDY=mob TOWER=timm:resnet18.a1_in1k`` one more tower, which is any name that
`helpers.towers.load` takes. ``--rungs``, ``--seeds``, ``--towers`` and ``--no-refit`` measure a
part; a row of the file is replaced by a new one of the same name, and all others stay. The file is
written after every tower, and trained towers are kept in the cache, so a run that was cut off goes
on. `ABOUT` says what the rows have in common.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from data import commit, machine

from helpers import (
    catalog,
    contrast,
    files,
    genes,
    probing,
    slides,
    splits,
    tiles,
    towers,
    training,
)

RESULTS = Path(__file__).resolve().parent.parent / "results" / "ladder.json"
PACKAGES = ("torch", "timm", "open-clip-torch", "scikit-learn", "scanpy", "numpy")
N_GENES = 256
BUFFER_UM = 400.0
SEEDS = (0, 1, 2)
NONE = "none"
TOWERS = (NONE, "mini", "imagenet-random", "imagenet", "clip", "plip")
REFITTED = ("mini", "imagenet")
"""Towers that are also trained with genes within every fold, unless it is said otherwise."""
ABSENT = ("clip", "plip")
"""Towers of which a row says so where their weights cannot be had."""
RANDOM, DONOR = "random spots", "left-out donor"
HAND = "hand-made"
SCALED = "scaled by slide"
ABOUT = (
    "Every fold of a study trains the probe on the same number of labelled spots (n_train), drawn "
    "at random from its training part. A panel of genes, and a tower that is trained within a fold "
    "('after'), use all spots of this training part, labelled or not.",
    "The penalty of the probe is chosen inside training by donor (probing.logistic); 'fixed' has "
    "value, low and high at each penalty; 'chosen' has the choice of each fold.",
    "Intervals are over pieces of tissue, eight per group of adjacent sections; 'donors' has the "
    "score of each donor alone.",
    "Features are standardised over a fold's training spots; the variant 'scaled by slide' first "
    "standardises all of them within each slide, and is measured on the strictest split.",
    "Seed 0 is measured on every split, the others on the strictest split alone: left-out donor, "
    "or spatial blocks where one donor has labels. Thinning is the same for every seed.",
)
KEY = ("study", "what", "features", "seed", "variant", "split", "measure")
"""What names a row."""

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------- what is scored


@dataclass(frozen=True)
class Kind:
    """A kind of features.

    Attributes
    ----------
    step
        ``"before"`` or ``"after"`` training with genes; or what it is, where there is no tower.
    tower, seed
        Name of the tower, and seed of its weights or of its training.
    joined
        With the hand-made features beside it.
    """

    step: str
    tower: str = ""
    seed: int = 0
    joined: bool = False

    @property
    def name(self) -> str:
        """What a row calls it."""
        return f"{self.tower} {self.step}".strip() + f" + {HAND}" * self.joined


PLAIN = tuple(
    Kind(step)
    for step in (
        *("majority", "coordinates", "neighbours", "mean RGB"),
        *("colour numbers", "texture numbers", HAND, "genes"),
    )
)
UNSCALED = ("majority", "coordinates", "neighbours")
"""They use no features, or places, which have their scale already."""


def kinds(tower: str, seeds: Iterable[int], refit: bool) -> list[Kind]:
    """Return all kinds of features of a tower; a seed other than 0 only where it changes them."""
    if tower == NONE:
        return list(PLAIN)
    pretrained, found = tower not in towers.UNTRAINED, []
    for seed in seeds:
        steps = ["before"] * (seed == 0 or not pretrained) + ["after"] * refit
        for step in steps:
            found.append(Kind(step, tower, seed))
            if pretrained:
                found.append(Kind(step, tower, seed, joined=True))
    return found


def pairs(tower: str) -> list[tuple[str, str]]:
    """Return which features are compared with which, on the same spots."""
    before, after = f"{tower} before", f"{tower} after"
    found = [
        (after, before),
        (before, HAND),
        (after, HAND),
        (f"{before} + {HAND}", HAND),
        (f"{after} + {HAND}", HAND),
        (f"{after} + {HAND}", f"{before} + {HAND}"),
    ]
    return found + [(before, "imagenet-random before")] * (tower == "imagenet")


# --------------------------------------------------------------------------- a study


def thinned(
    rungs: Mapping[str, splits.Splits], seed: int = 0
) -> tuple[dict[str, splits.Splits], int]:
    """Leave the same number of labelled spots in the training part of every fold.

    Parameters
    ----------
    rungs
        From `helpers.splits.ladder`. Folds without labels on both sides are left out.
    seed
        Of the draw; each fold has a draw of its own.

    Returns
    -------
    dict
        The splits, with the names of the folds unchanged.
    int
        Labelled spots in each training part.
    """
    known = next(iter(rungs.values())).spots["label"].notna().to_numpy()
    usable = {
        name: [f for f in split.folds if known[f.train].any() and known[f.test].any()]
        for name, split in rungs.items()
    }
    n = min(int(known[fold.train].sum()) for folds in usable.values() for fold in folds)
    made = {}
    for i, (name, folds) in enumerate(usable.items()):
        few = []
        for j, fold in enumerate(folds):
            rows = fold.train[known[fold.train]]
            drawn = np.random.default_rng([seed, i, j]).choice(rows, n, replace=False)
            few.append(splits.Fold(fold.name, np.sort(drawn), fold.test))
        made[name] = splits.Splits(name, rungs[name].spots, tuple(few))
    return made, n


def distinct(rungs: Mapping[str, splits.Splits]) -> dict[str, splits.Splits]:
    """Leave out a split whose folds are those of a stricter one: sections where donors have one."""

    def tested(split: splits.Splits) -> list[bytes]:
        return sorted(fold.test.tobytes() for fold in split.folds)

    names = list(rungs)
    return {
        name: rungs[name]
        for i, name in enumerate(names)
        if all(tested(rungs[name]) != tested(rungs[other]) for other in names[i + 1 :])
    }


class Study:
    """Slides, spots and splits of a study, as the chapters have them."""

    def __init__(self, name: str) -> None:
        self.name, self.side_um = name, catalog.study(name).side_um
        self.done = genes.prepare(name)
        self.spots = slides.spot_table(self.done)
        how = {"buffer_um": BUFFER_UM, "together": True}
        self.whole = distinct(splits.ladder(self.spots, self.done, **how))
        self.rungs, self.n_train = thinned(self.whole)
        self.strict = DONOR if DONOR in self.rungs else list(self.rungs)[-1]
        self.n_genes = min(N_GENES, len(genes.shared_genes(self.done)))
        self.cut = tiles.cut_study(self.done, side_um=self.side_um)
        self.tiles = tiles.of_spots(self.cut, self.spots)

    def whole_fold(self, rung: str, name: str) -> splits.Fold:
        """Return a fold as it was before it was thinned."""
        return next(fold for fold in self.whole[rung].folds if fold.name == name)

    @functools.cache  # noqa: B019 - one study lives as long as its process
    def before(self, tower: str, seed: int = 0) -> np.ndarray:
        """Features of a tower as it is."""
        return towers.embed(towers.load(tower, seed=seed), self.tiles, cache=True)

    @functools.cache  # noqa: B019
    def after(self, tower: str, seed: int, rung: str, fold: str) -> np.ndarray:
        """Features of a tower trained within a whole fold, with the settings of chapter 7."""
        settings = contrast.settings_for(tower, seed)
        how = {"side_um": self.side_um, "n_genes": self.n_genes, "settings": settings}
        whole = self.whole_fold(rung, fold)
        held_out = training.leave_out(self.done, whole, spots=self.spots, tower=tower, **how)
        return towers.embed(held_out.fitted.model.image, self.tiles, cache=True)

    @functools.cache  # noqa: B019
    def expression(self, rung: str, fold: str) -> np.ndarray:
        """Expression of a panel chosen on the training spots of a whole fold."""
        trained = self.spots.index[self.whole_fold(rung, fold).train]
        shared = genes.shared_genes(self.done)
        parts = {s: a[a.obs_names.isin(trained), shared] for s, a in self.done.items()}
        parts = {slide: part for slide, part in parts.items() if part.n_obs}
        found = contrast.pair(self.done, self.cut, genes.shared_hvg(parts, self.n_genes))
        table = pd.DataFrame(found.other, found.spots.index)
        return table.loc[self.spots.index].to_numpy()

    def features(self, kind: Kind, rung: str) -> probing.Features:
        """Return features of a kind; a function of the fold where they depend on it."""
        if kind.step == "genes":
            return lambda fold: self.expression(rung, fold.name)
        if kind.step in ("majority", "neighbours"):
            return np.zeros((len(self.spots), 1))
        if kind.step == "coordinates":
            return probing.coordinates(self.spots, degree=3)
        hand = self.before("colour")
        if not kind.tower:
            parts = {"mean RGB": slice(0, 3), HAND: slice(None)}
            parts |= {f"{name} numbers": part for name, part in towers.HAND_MADE.items()}
            return hand[:, parts[kind.step]]

        def beside(x: np.ndarray) -> np.ndarray:
            return np.hstack([x, hand]) if kind.joined else x

        if kind.step == "before":
            return beside(self.before(kind.tower, kind.seed))
        return lambda fold: beside(self.after(kind.tower, kind.seed, rung, fold.name))

    def rungs_of(self, kind: Kind, wanted: Iterable[str]) -> list[str]:
        """Return the splits on which a kind is scored."""
        return [r for r in self.rungs if r in wanted and (kind.seed == 0 or r == self.strict)]


# --------------------------------------------------------------------------- predictions


@dataclass(frozen=True)
class Told:
    """Predictions with the penalty that was chosen, and with each fixed penalty."""

    chosen: pd.DataFrame
    fixed: dict[float, pd.DataFrame] = field(default_factory=dict)


Of = dict[tuple[str, str], Told]
"""Predictions by variant and split."""
PREDICTORS = {"majority": probing.majority, "neighbours": probing.spatial_neighbours}


def predict(study: Study, kind: Kind, rungs: Iterable[str]) -> Of:
    """Predict from one kind of features on the splits wanted, and scaled by slide on the last."""
    told: Of = {}
    predictor = PREDICTORS.get(kind.step)
    for rung in study.rungs_of(kind, rungs):
        x, split, fixed = study.features(kind, rung), study.rungs[rung], {}
        if kind.step not in UNSCALED and kind.seed == 0 and rung in (RANDOM, study.strict):
            fixed = probing.predict_at(x, split)
        told["", rung] = Told(probing.predict(x, split, predictor), fixed)
        if kind.step not in UNSCALED and rung == DONOR:
            told[SCALED, rung] = Told(
                probing.predict(probing.scale_by_slide(x, study.spots), split)
            )
    return told


# --------------------------------------------------------------------------- rows


Scores = Callable[..., pd.DataFrame]


def rows_of(facts: dict, what: str, measured: Scores, *told: Told, **more: object) -> list[dict]:
    """Make a row per measure of one score or difference; macro-F1 at the fixed penalties too."""
    table = measured(*(one.chosen for one in told)).to_dict("records")
    rows = [facts | {"what": what} | more | row for row in table]
    alphas = [a for a in told[0].fixed if all(a in one.fixed for one in told)]
    at = {f"{a:g}": measured(*(one.fixed[a] for one in told)).iloc[0] for a in alphas}
    if at:
        rows[0]["fixed"] = {a: [row["value"], row["low"], row["high"]] for a, row in at.items()}
    return rows


def score_rows(study: Study, facts: dict, kind: Kind, told: Of) -> list[dict]:
    """Rows of one kind of features: its scores, and the gap between careless and strict."""
    rows, facts = [], facts | {"features": kind.name, "tower": kind.tower, "seed": kind.seed}
    if kind.step == "after":
        facts["training"] = in_words(contrast.settings_for(kind.tower, kind.seed))
    for (variant, rung), one in told.items():
        new = rows_of(facts, "score", probing.score, one, variant=variant, split=rung)
        by_fold = one.chosen.groupby("fold", sort=False)["setting"].first()
        if by_fold.notna().all():
            new[0]["chosen"] = [f"{alpha:g}" for alpha in by_fold]
        if rung == DONOR:
            each = probing.score(one.chosen, each="donor").groupby("measure", sort=False)
            for row, (_, part) in zip(new, each, strict=True):
                row["donors"] = dict(zip(part["donor"], part["value"], strict=True))
        rows += [row | {"folds": len(by_fold)} for row in new]
    if {("", RANDOM), ("", study.strict)} <= told.keys() and study.strict != RANDOM:
        both, split = (told["", RANDOM], told["", study.strict]), gap(study)
        rows += rows_of(facts, "gap", probing.difference, *both, variant="", split=split)
    return rows


def in_words(settings: contrast.Settings) -> str:
    """Say what differs between the ways towers are trained here."""
    blocks = "all" if settings.train_blocks is None else f"last {settings.train_blocks}"
    rate = f"tower at {settings.tower_lr:g} of the rate"
    return f"{settings.epochs} epochs, {blocks} blocks, {rate}"


def gap(study: Study) -> str:
    """Name the difference between the most careless and the strictest split."""
    return f"gap: {RANDOM} - {study.strict}"


def difference_rows(study: Study, facts: dict, tower: str, told: dict[Kind, Of]) -> list[dict]:
    """Rows of what a tower gains or loses against others, split by split, and of their gaps."""
    rows = []
    by_name = {(kind.name, kind.seed): of for kind, of in told.items()}
    for one, two in pairs(tower):
        for seed in sorted({kind.seed for kind in told}):
            first = by_name.get((one, seed))
            second = by_name.get((two, seed), by_name.get((two, 0)))
            if first is None or second is None:
                continue
            here = facts | {"features": f"{one} minus {two}", "tower": tower, "seed": seed}
            measured = probing.difference
            for variant, rung in (at for at in first if at in second):
                both = (first[variant, rung], second[variant, rung])
                more = {"variant": variant, "split": rung}
                rows += rows_of(here, "difference", measured, *both, **more)
            ends = ("", RANDOM), ("", study.strict)
            if study.strict != RANDOM and all(e in of for e in ends for of in (first, second)):
                four = (*(first[e] for e in ends), *(second[e] for e in ends))
                more = {"variant": "", "split": gap(study)}
                rows += rows_of(here, "difference of gaps", of_gaps, *four, **more)
    return rows


def of_gaps(a: pd.DataFrame, b: pd.DataFrame, c: pd.DataFrame, d: pd.DataFrame) -> pd.DataFrame:
    """Return the difference of two gaps."""
    return probing.difference((a, b), (c, d))


# --------------------------------------------------------------------------- the file


def clean(value: object) -> object:
    """Round numbers; leave out what is not there, and make it null in a list."""
    if isinstance(value, dict):
        pairs = ((k, clean(v)) for k, v in value.items())
        return {k: v for k, v in pairs if (v is not None and v != "") or k == "variant"}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 4) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def merged(old: Iterable[dict], new: Iterable[dict]) -> list[dict]:
    """Put new rows in the place of old ones of the same name; keep the others, in their order.

    That a tower was not measured is said only where no row of it has a value. Rows of older
    versions of the file, which do not say what they are, go.
    """
    rows = {tuple(r.get(k) for k in KEY): r for r in (*old, *new) if "what" in r}
    there = {(r["study"], r.get("tower")) for r in rows.values() if "value" in r}
    return [r for r in rows.values() if "value" in r or (r["study"], r.get("tower")) not in there]


def compact(report: dict) -> str:
    """Return a report as JSON with one line per row."""
    head = json.dumps({k: v for k, v in report.items() if k != "rows"}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in report["rows"])
    return f'{head.removesuffix("}").rstrip()},\n "rows": [\n  {lines}\n ]\n}}\n'


def stamp() -> dict[str, str]:
    """Return when, from which commit and on what a row is measured, in few words."""
    whole, facts = commit(), machine()
    return {
        "measured": datetime.date.today().isoformat(),
        "commit": whole[:12] + "-changed" * whole.endswith("-changed"),
        "machine": f"{facts['cores']} cores, {facts['processor']}",
    }


def write(out: Path, rows: list[dict]) -> None:
    """Put rows into the file."""
    old = json.loads(out.read_text())["rows"] if out.exists() else []
    when = stamp()
    report = {
        "what": "features on every rung of the ladder of splits; benchmarks/ladder.py",
        "measured": when["measured"],
        "commit": commit(),
        "machine": machine(),
        "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
        "settings": {"buffer_um": BUFFER_UM, "genes": N_GENES, "about": ABOUT},
        "rows": merged(old, [clean(row | when) for row in rows]),
    }
    with files.atomic(out) as temporary:
        temporary.write_text(compact(report))


# --------------------------------------------------------------------------- the work


_study: Study | None = None  # of a process of the pool


def begin(name: str) -> None:
    """Load the study, once in each process."""
    global _study
    torch.set_num_threads(1)
    _study = Study(name)


def train_one(tower: str, seed: int, rung: str, fold: str) -> str:
    """Train a tower within one fold; the cache keeps it and its features."""
    _study.after(tower, seed, rung, fold)
    _study.after.cache_clear()
    return f"trained {tower}, seed {seed}, {rung}, {fold}"


def predict_one(kind: Kind, rungs: tuple[str, ...]) -> Of:
    """Predict from one kind of features."""
    return predict(_study, kind, rungs)


def to_train(study: Study, wanted: list[Kind], rungs: Iterable[str]) -> Iterator[tuple]:
    """Yield every training that is needed, once."""
    for kind in dict.fromkeys(Kind(k.step, k.tower, k.seed) for k in wanted if k.step == "after"):
        for rung in study.rungs_of(kind, rungs):
            for fold in study.rungs[rung].folds:
                yield kind.tower, kind.seed, rung, fold.name


def measure(pool: ProcessPoolExecutor, study: Study, options: argparse.Namespace) -> None:
    """Measure a study, tower by tower, and write its rows."""
    data = "simulated" if study.name == "demo" else "local copy"
    facts = {"study": study.name, "data": data, "n_train": study.n_train}
    rungs = tuple(options.rungs or study.rungs)
    told: dict[Kind, Of] = {}
    if NONE not in options.towers:  # what every tower is compared with
        told[Kind(HAND)] = predict(study, Kind(HAND), rungs)
    for tower in options.towers:
        refit = options.refit if options.refit is not None else tower in REFITTED
        wanted = kinds(tower, options.seeds, refit)
        try:
            if tower != NONE:
                study.before(tower)
        except files.DataError as error:
            if tower not in ABSENT:
                raise
            logger.warning("%s: %s", tower, error)
            gone = {"features": f"{tower} before", "tower": tower, "seed": 0, "what": "score"}
            gone |= {"variant": "", "split": "every", "note": "not measured here: no weights"}
            write(options.out, [{"study": study.name, "data": data} | gone])
            continue
        jobs = [pool.submit(train_one, *which) for which in to_train(study, wanted, rungs)]
        for job in jobs:
            print(study.name, job.result(), flush=True)
        rows, jobs = [], {kind: pool.submit(predict_one, kind, rungs) for kind in wanted}
        for kind, job in jobs.items():
            told[kind] = job.result()
            new = score_rows(study, facts, kind, told[kind])
            print(study.name, kind.name, kind.seed, *map(short, new[::2]), flush=True)
            rows += new
        rows += difference_rows(study, facts, tower, told)
        write(options.out, rows)


def short(row: dict) -> str:
    """Return one score, to look at while it runs."""
    what = f"{row['split']}{' ' * bool(row['variant'])}{row['variant']}"
    return f"| {what}: {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def main() -> None:
    """Train what is not in the cache yet, score, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", default=["mob", "her2st"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument(
        "--towers", nargs="+", default=TOWERS, metavar="NAME",
        help=f"names for towers.load; {NONE!r}: all that needs no tower",
    )  # fmt: skip
    parser.add_argument("--rungs", nargs="+", metavar="SPLIT", help=f"such as {RANDOM!r}")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument(
        "--refit", action=argparse.BooleanOptionalAction,
        help=f"train towers with genes within every fold; when not said: {', '.join(REFITTED)}",
    )  # fmt: skip
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # in each process
    try:
        for tower in options.towers:
            if tower != NONE:
                towers.card(tower)
        for name in options.studies:
            study = Study(name)
            if unknown := set(options.rungs or ()) - set(study.rungs):
                parser.error(f"{name} has no {sorted(unknown)}, only {list(study.rungs)}")
            how = {"mp_context": get_context("spawn"), "initializer": begin, "initargs": (name,)}
            with ProcessPoolExecutor(options.jobs, **how) as pool:
                measure(pool, study, options)
    except files.DataError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
