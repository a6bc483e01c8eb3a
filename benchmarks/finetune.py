"""Fine-tune towers with genes, one donor held out at a time, into ``results/finetune.json``.

Run by hand: ``python benchmarks/finetune.py mob`` (STIMAGE_ROOT for the real studies), or a part of
it, such as ``--questions "how to tune"``. Models are kept in the cache, so a run that was cut off
goes on; the file is written after every question, and the rows of other questions and studies stay.

Panel, scalers, weights and the penalty of the probe (`helpers.probing.predict`) come from the
training donors. Settings are those of chapter 7, or, in the question ``how to tune``, chosen with
validation donors: each variant is trained without the test donor and without a validation donor,
and judged on the latter, in turn; the best is trained anew without the test donor, and only then
scored on it. Of a test donor, the choice uses nothing but the names of the genes it measured.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from data import commit, machine

import ladder
from helpers import contrast, files, genes, metrics, probing, splits, towers, training
from ladder import DONOR, HAND, Study

RESULTS = Path(__file__).resolve().parent.parent / "results" / "finetune.json"
QUESTIONS = ("main", "panel", "start from captions", "choice of panel", "how to tune")
TOWERS = ("mini", "imagenet")
SEEDS = (0, 1, 2)
PANELS = (
    ("overlap_hvg", 100),
    ("overlap_hvg_batch", 128),
    ("overlap_hvg_batch", 256),
    ("overlap_hvg_batch", 512),
    ("shared_hvg", 128),
    ("shared_hvg", 256),
    ("shared_hvg", 512),
)
"""What the panel of the book was chosen from, with the first donor out of sight."""
TUNED = "imagenet"
START = {
    "tower_lr": 0.5,
    "epochs": 10,
    "train_blocks": 2,
    "augment": contrast.BOOK.augment,
    "same_slide": False,
}
"""What the variants of ``how to tune`` change one at a time."""
VARIANTS = {
    "start": {},
    "rate .02": {"tower_lr": 0.02},
    "rate .1": {"tower_lr": 0.1},
    "rate 1": {"tower_lr": 1.0},
    "5 epochs": {"epochs": 5},
    "20 epochs": {"epochs": 20},
    "last 3 blocks": {"train_blocks": 3},
    "no augmentation": {"augment": 0.0},
    "batches of one slide": {"same_slide": True},
}
BEFORE = "before"
"""The tower as it is: a row to compare with, never the choice."""


# --------------------------------------------------------------------------- probes and recall


def donors_of(study: Study) -> list[str]:
    """Return the donors of a study in its order."""
    return list(dict.fromkeys(study.spots["donor"]))


def fold_of(study: Study, train: Iterable[str], test: Iterable[str], name: str) -> splits.Fold:
    """Return a fold of whole donors."""
    donor = study.spots["donor"]
    rows = (np.flatnonzero(donor.isin(list(which))) for which in (train, test))
    return splits.Fold(name, *rows)


def probe(study: Study, x: np.ndarray, fold: splits.Fold) -> pd.DataFrame | None:
    """Predict the labels of one fold; None where one of its sides has none."""
    known = study.spots["label"].notna().to_numpy()
    if not (known[fold.train].any() and known[fold.test].any()):
        return None
    return probing.predict(x, splits.Splits(DONOR, study.spots, (fold,)))


def macro_f1(predictions: pd.DataFrame) -> dict[str, float]:
    """Macro-F1 with its interval, and what stands in its place."""
    row = probing.score(predictions).iloc[0]
    return {k: row[k] for k in ("value", "low", "high", "note", "n", "classes", "clusters")}


def recalls(model: contrast.TwoTowers, pairs: contrast.Pairs) -> dict[str, float]:
    """How often pairs are found, mean of both directions."""
    found = {}
    table = metrics.recall(*contrast.embed_pairs(model, pairs))
    for k, part in table.groupby("k"):
        found[f"recall@{k}"] = float(part["recall"].mean())
        found[f"recall@{k} times chance"] = float(part["times_chance"].mean())
    return found


def scores(study: Study, fold: training.HeldOut, donor: str, seed: int) -> dict[str, float]:
    """Probe of the trained tower, of what it is compared with, and its recall."""
    whole = fold_of(study, set(donors_of(study)) - {donor}, [donor], donor)
    after = towers.embed(fold.fitted.model.image, study.tiles, cache=True)
    name, hand = fold.before.image.card.name, study.before("colour")
    views = {HAND: hand, "after": after, f"after + {HAND}": np.hstack([after, hand])}
    before = study.before(name, seed if name in towers.UNTRAINED else 0)
    views |= {BEFORE: before, f"{BEFORE} + {HAND}": np.hstack([before, hand])}
    if DONOR in study.whole:
        views["genes"] = study.expression(DONOR, donor)
    told = {name: probe(study, x, whole) for name, x in views.items()}
    found = {f"probe {n}": macro_f1(p)["value"] for n, p in told.items() if p is not None}
    if found:
        gain = probing.difference(told["after"], told[BEFORE]).iloc[0]
        found |= {f"after minus before {k}": gain[k] for k in ("value", "low", "high", "note")}
    return found | recalls(fold.fitted.model, fold.test)


# --------------------------------------------------------------------------- trainings


def runs(question: str, donors: list[str]) -> Iterator[tuple[str, str, dict]]:
    """Yield what is trained: tower, held-out donor, what differs from the book's settings."""
    if question == "main":
        for tower, donor, seed in itertools.product(TOWERS, donors, SEEDS):
            yield tower, donor, {"seed": seed}
    elif question == "panel":
        for name in ("hvg", "overlap_hvg"):
            yield "mini", donors[0], {"choose": name}
    elif question == "start from captions":
        for blocks in (0, 2, None):
            yield "mini", donors[0], {"blocks": blocks}
    elif question == "choice of panel":
        for (name, n), donor, seed in itertools.product(PANELS, donors[1:], (0, 1)):
            yield "colour", donor, {"choose": name, "n_genes": n, "seed": seed}


def train(study: Study, adatas: dict, tower: str, donor: str, how: dict) -> training.HeldOut:
    """Train without one donor."""
    settings = contrast.settings_for(tower, how.get("seed", 0))
    options = {"tower": tower, "settings": settings, "side_um": study.side_um}
    options["n_genes"] = how.get("n_genes", study.n_genes)
    if tower == "colour":  # nothing to train in it: enough to compare panels, and takes seconds
        settings = replace(contrast.BOOK, epochs=10, augment=0.0, keep="last")
        options["settings"] = replace(settings, seed=how["seed"])
        return training.leave_out(adatas, donor, panel=getattr(genes, how["choose"]), **options)
    if how.get("choose") == "hvg":
        shared = genes.shared_genes(adatas)
        first = next(s for s, a in adatas.items() if str(a.obs["donor"].iloc[0]) != donor)
        options["panel"] = genes.hvg(adatas[first][:, shared].copy(), 128)
    elif how.get("choose") == "overlap_hvg":
        options |= {"panel": genes.overlap_hvg, "n_genes": 100}
    if "blocks" in how:
        captioned = training.leave_out(adatas, donor, view="captions", side_um=study.side_um)
        options["tower"] = captioned.fitted.model.image
        few = {"train_blocks": how["blocks"], "epochs": settings.epochs // 3}
        options["settings"] = replace(settings, **few)
    return training.leave_out(adatas, donor, **options)


def rows_of(study: Study, question: str) -> Iterator[dict]:
    """Train and score everything that belongs to one question."""
    donors = donors_of(study)
    for tower, donor, how in runs(question, donors):
        known = study.done
        if question == "choice of panel":  # the first donor is neither trained nor tested on
            away = set(study.spots.loc[study.spots["donor"] == donors[0], "slide"])
            known = {slide: adata for slide, adata in known.items() if slide not in away}
            if sum(str(a.obs["donor"].iloc[0]) != donor for a in known.values()) < 2:
                continue  # one slide left: there is no shared panel to choose
        begin, seed = time.perf_counter(), how.get("seed", 0)
        fold = train(study, known, tower, donor, how)
        plain = tower == "colour"
        found = recalls(fold.fitted.model, fold.test) if plain else scores(study, fold, donor, seed)
        named = {"tower": tower, "held_out": donor, "seed": 0, **how}
        facts = {"panel": fold.panel.name, "epochs": int(fold.fitted.history["epoch"].max())}
        variant = " ".join(f"{k}={v}" for k, v in how.items() if k != "seed")
        facts |= {"train": len(fold.train), "test": len(fold.test), "variant": variant}
        print(study.name, question, named, round(time.perf_counter() - begin), "s", flush=True)
        yield {"question": question} | named | facts | found


# --------------------------------------------------------------------------- how to tune


def settings_of(variant: str, seed: int = 0) -> contrast.Settings:
    """Return the settings of a variant."""
    return replace(contrast.settings_for(TUNED, seed), **START | VARIANTS[variant])


def tuned(study: Study, variant: str, train: frozenset[str]) -> training.HeldOut:
    """Train a variant on some donors and nothing else."""
    rest = set(donors_of(study)) - train
    fold = fold_of(study, train, rest, f"trained on {', '.join(sorted(train))}")
    how = {"side_um": study.side_um, "n_genes": study.n_genes, "settings": settings_of(variant)}
    return training.leave_out(study.done, fold, spots=study.spots, tower=TUNED, **how)


Judged = tuple[pd.DataFrame, float]
"""Predictions for one donor, and recall@10 as a multiple of chance."""


def judge(study: Study, variant: str, train: frozenset[str], on: Iterable[str]) -> dict:
    """Train a variant on some donors; judge it on others, one by one.

    Returns
    -------
    dict
        By donor and features (``""``, ``"hand-made"`` beside them): `Judged`.
    """
    held = None if variant == BEFORE else tuned(study, variant, train)
    image = study.before(TUNED)
    if held is not None:
        image = towers.embed(held.fitted.model.image, study.tiles, cache=True)
    found = {}
    for donor in on:
        fold, recall = fold_of(study, train, [donor], donor), float("nan")
        if held is not None:
            rows = (held.test.spots["donor"] == donor).to_numpy()
            some = {k: getattr(held.test, k)[rows] for k in ("tiles", "other", "spots")}
            some = recalls(held.fitted.model, replace(held.test, **some))
            recall = some[f"recall@{metrics.KS[-1]} times chance"]
        for beside, x in (("", image), (HAND, np.hstack([image, study.before("colour")]))):
            found[donor, beside] = (probe(study, x, fold), recall)
    return found


def judge_one(variant: str, train: frozenset[str], on: tuple[str, ...]) -> dict:
    """`judge`, in a process of the pool."""
    return judge(ladder._study, variant, train, on)


def chosen(rows: list[dict]) -> str:
    """Return the variant with the best score on the validation donors; the first of equals."""
    trained = [row for row in rows if row["variant"] != BEFORE]
    return max(trained, key=lambda row: row["value"])["variant"]


def tuning(pool: ProcessPoolExecutor, study: Study) -> list[dict]:
    """Choose the settings without each donor in turn; score the choice on this donor."""
    labelled = study.spots.dropna(subset="label")["donor"].unique()
    donors = [d for d in donors_of(study) if d in labelled]
    if len(donors) < 3:
        print(f"{study.name}: choosing takes three donors with labels, there are {len(donors)}")
        return []
    everyone, names = frozenset(donors_of(study)), [BEFORE, *VARIANTS]
    jobs = {
        (variant, pair): pool.submit(judge_one, variant, everyone - set(pair), pair)
        for pair in itertools.combinations(donors, 2)
        for variant in names
    }
    told = {}  # by variant, test donor and validation donor
    for (variant, pair), job in jobs.items():
        result = job.result()
        for test, validation in (pair, pair[::-1]):
            told[variant, test, validation] = result[validation, ""]
        print(study.name, "judged", variant, "without", *pair, flush=True)
    rows, final = [], []
    for test in donors:
        others = [d for d in donors if d != test]
        mine = []
        for variant in names:
            parts = [told[variant, test, validation] for validation in others]
            mine.append(tuning_row(test, others, variant, parts))
        best = chosen(mine)
        rows += [row | {"chosen": row["variant"] == best} for row in mine]
        final.append((test, best))
    jobs = {
        (test, variant): pool.submit(judge_one, variant, everyone - {test}, (test,))
        for test, best in final
        for variant in (BEFORE, best)
    }
    done = {which: job.result() for which, job in jobs.items()}
    for test, best in final:
        for variant in (BEFORE, best):
            parts = [done[test, variant][test, ""]]
            rows.append(tuning_row(test, [test], variant, parts) | {"chosen": variant == best})
            print(study.name, rows[-1], flush=True)
    return rows + gains(donors, final, done)


def tuning_row(test: str, on: list[str], variant: str, parts: list[Judged]) -> dict:
    """Score a variant over the donors it was judged on, each by a model that never saw it."""
    row = {"question": "how to tune", "tower": TUNED, "held_out": test, "seed": 0}
    row |= {"judged_on": ", ".join(on), "variant": variant}
    row |= START | VARIANTS[variant] if variant != BEFORE else {}
    row |= macro_f1(pd.concat([table for table, _ in parts], ignore_index=True))
    if len(on) > 1:
        alone = (macro_f1(table)["value"] for table, _ in parts)
        row["donors"] = dict(zip(on, alone, strict=True))
    return row | {"recall@10 times chance": float(np.mean([recall for _, recall in parts]))}


def gains(donors: list[str], final: list[tuple[str, str]], done: dict) -> list[dict]:
    """Rows of what the choices gained over the tower as it is, all test donors together."""
    rows = []
    for beside in ("", HAND):
        parts = {
            name: pd.concat([done[test, v][test, beside][0] for test, v in which])
            for name, which in (("after", final), (BEFORE, [(test, BEFORE) for test, _ in final]))
        }
        gain = probing.difference(parts["after"], parts[BEFORE]).iloc[0]
        row = {"question": "how to tune", "tower": TUNED, "held_out": "each", "seed": 0}
        row |= {"judged_on": ", ".join(donors), "variant": "chosen minus before"}
        row["variant"] += f", both + {HAND}" * bool(beside)
        wanted = ("value", "low", "high", "first", "second", "note", "n", "classes", "clusters")
        rows.append(row | {k: gain[k] for k in wanted})
    return rows


# --------------------------------------------------------------------------- the file


def write(out: Path, study: Study, question: str, rows: list[dict]) -> None:
    """Put the rows of one question into the file; those of other questions and studies stay."""
    old = json.loads(out.read_text())["rows"] if out.exists() else []
    data = "simulated" if study.name == "demo" else "local copy"
    facts = {"study": study.name, "data": data, "side_um": study.side_um}
    stamp = ladder.stamp()
    report = {
        "what": "towers fine-tuned with genes, donors held out; benchmarks/finetune.py",
        "measured": stamp["measured"],
        "commit": commit(),
        "machine": machine(),
        "packages": {name: importlib.metadata.version(name) for name in ladder.PACKAGES},
        "rows": kept(old, study.name, question)
        + [ladder.clean(facts | row | stamp) for row in rows],
    }
    with files.atomic(out) as temporary:
        temporary.write_text(ladder.compact(report))


def kept(old: Iterable[dict], study: str, question: str) -> list[dict]:
    """Return the rows of other questions and studies; those of older versions of the file go."""
    return [
        row
        for row in old
        if "tower" in row and (row["study"], row["question"]) != (study, question)
    ]


def main() -> None:
    """Train what is not in the cache yet, and write what was found after every question."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", default=["demo", "mob"])
    parser.add_argument("--questions", nargs="+", default=QUESTIONS, choices=QUESTIONS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="of how to tune")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # in each process of the pool
    for name in options.studies:
        study = Study(name)
        for question in options.questions:
            if question == "how to tune":
                start = {"mp_context": get_context("spawn"), "initializer": ladder.begin}
                with ProcessPoolExecutor(options.jobs, initargs=(name,), **start) as pool:
                    rows = tuning(pool, study)
            else:
                rows = list(rows_of(study, question))
            write(options.out, study, question, rows)


if __name__ == "__main__":
    main()
