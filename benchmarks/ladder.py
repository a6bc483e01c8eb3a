"""Score every kind of features on every rung of the ladder of splits, into ``results/ladder.json``.

``make results STUDY=mob`` (STIMAGE_ROOT for the real studies). Towers are fitted anew in every fold
and kept in the cache, so a run that was cut off goes on. Rows of other studies in the file stay.
The text of chapter 8 says what the rungs are, and shows these rows beside its own.
"""

import argparse
import datetime
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
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
PACKAGES = ("torch", "open-clip-torch", "scikit-learn", "scanpy", "numpy")
N_GENES = 256
BUFFER_UM = 400.0
SEEDS = (0, 1, 2)
FIXED = ("majority", "coordinates", "neighbours", "colour", "genes")
PRETRAINED = ("clip", "plip")
GAP = ("random spots", "left-out donor")
GAINS = ("colour", "before", "genes")
"""What the fine-tuned tower is compared with, on the same spots."""

logger = logging.getLogger(__name__)


class Study:
    """Slides, spots and splits of a study, as the chapters have them."""

    def __init__(self, name: str) -> None:
        self.name, self.side_um = name, catalog.study(name).side_um
        self.done = genes.prepare(name)
        self.spots = slides.spot_table(self.done)
        how = {"buffer_um": BUFFER_UM, "together": True}
        self.rungs = splits.ladder(self.spots, self.done, **how)
        self.n_genes = min(N_GENES, len(genes.shared_genes(self.done)))

    def tiles(self) -> np.ndarray:
        """Tiles in the order of the spots."""
        return tiles.of_spots(tiles.cut_study(self.done, side_um=self.side_um), self.spots)

    def of_genes(self, fold: splits.Fold) -> np.ndarray:
        """Expression of a panel chosen on the training spots of a fold, standardised by slide."""
        shared, trained = genes.shared_genes(self.done), self.spots.index[fold.train]
        parts = {s: a[a.obs_names.isin(trained), shared] for s, a in self.done.items()}
        parts = {slide: part for slide, part in parts.items() if part.n_obs}
        panel = genes.shared_hvg(parts, self.n_genes)
        cut = tiles.cut_study(self.done, side_um=self.side_um)
        pairs = contrast.pair(self.done, cut, panel, standardise=True)
        table = pd.DataFrame(pairs.other, pairs.spots.index)
        return table.loc[self.spots.index].to_numpy()

    def refitted(self, seed: int, fold: splits.Fold) -> np.ndarray:
        """Features of a tower trained within a fold, with the settings of chapter 7."""
        settings = replace(contrast.BOOK, keep="last", seed=seed)
        how = {"side_um": self.side_um, "n_genes": self.n_genes, "settings": settings}
        held_out = training.leave_out(self.done, fold, spots=self.spots, **how)
        return towers.embed(held_out.fitted.model.image, self.tiles(), cache=True)


def train_one(name: str, seed: int, rung: str, at: int) -> str:
    """Fit a tower within one fold, in a process of its own; the cache keeps it."""
    torch.set_num_threads(1)
    study = Study(name)
    fold = study.rungs[rung].folds[at]
    study.refitted(seed, fold)
    return f"{name}, seed {seed}, {rung}, {fold.name}"


def to_train(study: Study) -> Iterator[tuple[str, int, str, int]]:
    """Yield every tower that is needed; those of other seeds for left-out donors alone."""
    known = study.spots["label"].notna().to_numpy()
    for seed in SEEDS:
        for rung, split in study.rungs.items():
            if seed and rung != GAP[1]:
                continue
            for at, fold in enumerate(split.folds):
                if known[fold.train].any() and known[fold.test].any():
                    yield study.name, seed, rung, at


def features(study: Study) -> Iterator[tuple[str, int, tuple[str, ...], object, object]]:
    """Yield name, seed, rungs, features and predictor of all that is scored."""
    every = tuple(study.rungs)
    nothing = np.zeros((len(study.spots), 1))
    yield "majority", 0, every, nothing, probing.majority
    yield "coordinates", 0, every, probing.coordinates(study.spots, degree=3), None
    yield "neighbours", 0, every, nothing, probing.spatial_neighbours
    yield "colour", 0, every, towers.embed(towers.load("colour"), study.tiles()), None
    yield "genes", 0, every, study.of_genes, None
    for seed in SEEDS:
        before = towers.embed(towers.load("mini", seed=seed), study.tiles())
        rungs = every if seed == 0 else tuple(r for r in every if r == GAP[1])
        yield "before", seed, rungs, before, None
        if rungs:
            yield "fine-tuned", seed, rungs, partial(study.refitted, seed), None
    for name in PRETRAINED:
        yield name, 0, every, partial(pretrained, study, name), None


def pretrained(study: Study, name: str, fold: splits.Fold) -> np.ndarray:
    """Features of a tower with the hub's weights."""
    return towers.embed(towers.load(name), study.tiles())


def score(study: Study) -> list[dict]:
    """Score everything: one row per rung, features, seed and measure; the gaps; and the gains."""
    rows, told = [], {}
    for name, seed, rungs, x, predictor in features(study):
        facts = {
            "study": study.name,
            "data": "simulated" if study.name == "demo" else "local copy",
            "features": name,
            "seed": seed,
        }
        said = {}
        try:
            if name in PRETRAINED:
                x = x(None)
            for rung in rungs:
                said[rung] = probing.predict(x, study.rungs[rung], predictor)
        except files.DataError as error:
            if name not in PRETRAINED:
                raise
            logger.warning("%s: %s", name, error)
            rows.append(facts | {"split": "every", "note": "not measured here: no weights"})
            continue
        for rung, predictions in said.items():
            over = "block"
            table = probing.score(predictions, over)
            rows += [
                facts | {"split": rung, "folds": predictions["fold"].nunique()} | row
                for row in table.to_dict("records")
            ]
        if set(GAP) <= set(said):
            table = probing.difference(said[GAP[0]], said[GAP[1]])
            name_of_gap = f"gap: {GAP[0]} - {GAP[1]}"
            rows += [facts | {"split": name_of_gap} | row for row in table.to_dict("records")]
        told[name] = told.get(name, {}) | said  # of several seeds, the last
        for other in GAINS if name == "fine-tuned" else ():
            pair = facts | {"features": f"{name} minus {other}"}
            for rung, predictions in said.items():
                table = probing.difference(predictions, told[other][rung])
                rows += [pair | {"split": rung} | row for row in table.to_dict("records")]
        print(name, seed, {r: rounded(probing.score(p)) for r, p in said.items()}, flush=True)
    return rows


def rounded(table: pd.DataFrame) -> list[float]:
    """Macro-F1 with its interval, to look at while it runs."""
    row = table.iloc[0]
    return [round(float(row[c]), 3) for c in ("value", "low", "high")]


def main() -> None:
    """Train what is not in the cache yet, score, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", default=["mob", "her2st"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="towers at a time")
    options = parser.parse_args()
    for name in options.studies:
        study = Study(name)
        os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # in each process
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            for done in pool.map(train_one, *zip(*to_train(study), strict=True)):
                print("fitted:", done, flush=True)
        rows = score(study)
        old = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
        kept = [row for row in old if row["study"] != name]
        rows = [{**row, "measured": datetime.date.today().isoformat()} for row in rows]
        report = {
            "what": "features on every rung of the ladder of splits; benchmarks/ladder.py",
            "measured": datetime.date.today().isoformat(),
            "commit": commit(),
            "machine": machine(),
            "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
            "settings": {"buffer_um": BUFFER_UM, "genes": N_GENES, "epochs": contrast.BOOK.epochs},
            "rows": kept + [clean(row) for row in rows],
        }
        with files.atomic(options.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")


def clean(row: dict) -> dict:
    """Round numbers, and leave out what is not there: JSON knows no NaN."""
    row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    return {k: v for k, v in row.items() if not (isinstance(v, float) and np.isnan(v))}


if __name__ == "__main__":
    main()
