"""Fine-tune the mini with genes, one donor held out at a time, into ``results/finetune.json``.

Run by hand: ``python benchmarks/finetune.py demo mob`` (STIMAGE_ROOT for the real studies). Models
are kept in the cache, so a run that was cut off goes on. Every score is on a donor of which
training saw nothing: panel, scalers and weights come from the others, and epochs were fixed before.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from data import commit, machine
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import catalog, contrast, files, genes, metrics, towers, training

RESULTS = Path(__file__).resolve().parent.parent / "results" / "finetune.json"
PACKAGES = ("torch", "open-clip-torch", "scikit-learn", "numpy")
EPOCHS = {"demo": contrast.BOOK.epochs, "mob": 2 * contrast.BOOK.epochs}
"""Twice as many for two thirds of the spots; fixed with animal A, before the others were seen."""
QUESTIONS = ("main", "panel", "start from captions", "choice of panel")
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
PENALTY = {"colour": 1.0}
"""C of the probe where it is not 0.01; 49 numbers need less restraint than 192."""


def probe(train: np.ndarray, test: np.ndarray, pairs: tuple, c: float) -> float:
    """Macro-F1 of a balanced logistic regression, from training donors to the one held out."""
    known = [p.spots["label"].notna().to_numpy() for p in pairs]
    label = [p.spots["label"][k].astype(str) for p, k in zip(pairs, known, strict=True)]
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=3000)
    )
    model.fit(train[known[0]], label[0])
    return float(f1_score(label[1], model.predict(test[known[1]]), average="macro"))


def scores(fold: training.HeldOut, after_only: bool = False) -> dict[str, float]:
    """Probe of every tower on the held-out donor, and how often its pairs are found."""
    pairs = fold.train, fold.test
    shown = {"after": fold.fitted.model.image}
    if not after_only:
        shown = {"colour": towers.load("colour"), "before": fold.before.image, **shown}
    found = {}
    for name, tower in shown.items():
        views = [towers.embed(tower, p.tiles) for p in pairs]
        found[f"probe {name}"] = probe(*views, pairs, PENALTY.get(name, 0.01))
    if not after_only:
        found["probe genes"] = probe(*(p.other for p in pairs), pairs, 0.01)
        labels = [p.spots["label"].dropna().astype(str) for p in pairs]
        dummy = DummyClassifier(strategy="most_frequent").fit(
            np.zeros((len(labels[0]), 1)), labels[0]
        )
        said = dummy.predict(np.zeros((len(labels[1]), 1)))
        found["probe majority"] = float(f1_score(labels[1], said, average="macro"))
    return found | recalls(fold)


def recalls(fold: training.HeldOut) -> dict[str, float]:
    """How often pairs of the held-out donor are found, mean of both directions."""
    found = {}
    table = metrics.recall(*contrast.embed_pairs(fold.fitted.model, fold.test))
    for k, part in table.groupby("k"):
        found[f"recall@{k}"] = float(part["recall"].mean())
        found[f"recall@{k} times chance"] = float(part["times_chance"].mean())
    return found


def runs(study: str, donors: list[str]) -> Iterator[tuple[str, str, dict]]:
    """Yield what is trained: question, held-out donor, what differs from the book's settings."""
    for seed in (0, 1, 2):
        yield "main", donors[0], {"seed": seed}
    for donor in donors[1:]:
        yield "main", donor, {}
    for name in ("hvg", "overlap_hvg"):
        yield "panel", donors[0], {"choose": name}
    for blocks in (0, 2, None):
        yield "start from captions", donors[0], {"blocks": blocks}
    for name, n in PANELS:
        for donor in donors[1:]:
            for seed in (0, 1):
                yield "choice of panel", donor, {"choose": name, "n_genes": n, "seed": seed}


def train(adatas: dict, study: str, donor: str, how: dict) -> training.HeldOut:
    """Train one fold."""
    settings = replace(contrast.BOOK, epochs=EPOCHS[study], seed=how.get("seed", 0))
    options = {"settings": settings, "side_um": catalog.study(study).side_um}
    if "n_genes" in how:  # a frozen tower is enough to compare panels, and takes seconds
        settings = replace(settings, epochs=10, augment=0.0)
        options |= {"tower": "colour", "settings": settings, "n_genes": how["n_genes"]}
        return training.leave_out(adatas, donor, panel=getattr(genes, how["choose"]), **options)
    if how.get("choose") == "hvg":
        shared = genes.shared_genes(adatas)
        first = next(s for s, a in adatas.items() if str(a.obs["donor"].iloc[0]) != donor)
        options["panel"] = genes.hvg(adatas[first][:, shared].copy(), 128)
    elif how.get("choose") == "overlap_hvg":
        options |= {"panel": genes.overlap_hvg, "n_genes": 100}
    if "blocks" in how:
        start = training.leave_out(
            adatas, donor, view="captions", side_um=catalog.study(study).side_um
        ).fitted.model.image
        options |= {
            "tower": start,
            "settings": replace(settings, train_blocks=how["blocks"], epochs=settings.epochs // 3),
        }
    return training.leave_out(adatas, donor, **options)


def main() -> None:
    """Train what is not in the cache yet, and write what was found after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", default=["demo", "mob"])
    parser.add_argument("--questions", nargs="+", default=QUESTIONS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for study in options.studies:
        adatas = genes.prepare(study)
        donors = list(dict.fromkeys(str(a.obs["donor"].iloc[0]) for a in adatas.values()))
        for question, donor, how in runs(study, donors):
            if question not in options.questions:
                continue
            known = adatas
            if question == "choice of panel":  # the first donor is neither trained nor tested on
                known = {
                    s: a for s, a in adatas.items() if str(a.obs["donor"].iloc[0]) != donors[0]
                }
                if sum(str(a.obs["donor"].iloc[0]) != donor for a in known.values()) < 2:
                    continue  # one slide left: there is no shared panel to choose
            begin = time.perf_counter()
            fold = train(known, study, donor, how)
            found = recalls(fold) if "n_genes" in how else scores(fold, "blocks" in how)
            history = fold.fitted.history
            rows.append(
                {
                    "study": study,
                    "data": "simulated" if study == "demo" else "local copy",
                    "question": question,
                    "held_out": donor,
                    **{"seed": 0, **how},
                    "panel": fold.panel.name,
                    "side_um": catalog.study(study).side_um,
                    "epochs": int(history["epoch"].max()),
                    "train": len(fold.train),
                    "test": len(fold.test),
                    **{k: round(v, 4) for k, v in found.items()},
                }
            )
            print(round(time.perf_counter() - begin), rows[-1], flush=True)
            report = {
                "what": "the mini fine-tuned with genes, donors held out; benchmarks/finetune.py",
                "measured": datetime.date.today().isoformat(),
                "commit": commit(),
                "machine": machine(),
                "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
                "rows": rows,
            }
            with files.atomic(options.out) as temporary:
                temporary.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
