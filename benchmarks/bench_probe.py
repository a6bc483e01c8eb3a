"""Time the probe's sweep over penalties against the published one, on the same splits."""

import statistics
import time
from functools import partial

import numpy as np
import pandas as pd

from helpers.probing import ALPHAS, logistic_path, paper_protocol, sgd_path

WAYS = {
    "published: SGD, max_iter 10,000": sgd_path,
    "book: L-BFGS, warm starts": partial(logistic_path, tol=6e-3),
    "book, closer to the optimum": logistic_path,
}


def features(n: int, d: int, classes: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make features like those of a tower: correlated, classes that overlap and are unequal.

    Returns
    -------
    float32 ``(n, d)`` of about unit length, and the class of each row, int ``(n,)``.
    """
    rng = np.random.default_rng(seed)
    share = np.linspace(1, 3, classes)
    code = rng.choice(classes, n, p=share / share.sum())
    factors = min(64, d)
    centres = rng.normal(0, 0.27, (classes, factors))
    hidden = centres[code] + rng.normal(size=(n, factors)) * np.linspace(1.5, 0.5, factors)
    x = hidden @ rng.normal(size=(factors, d)) + 2 * rng.normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1).mean()).astype(np.float32), code


def table_of(code: np.ndarray) -> pd.DataFrame:
    """Put the rows on one slide: the probe wants to know who the spots are."""
    labels = pd.Series(code).map(lambda c: f"layer {c}")
    facts = {"slide": "made", "donor": "made", "group": "made", "y_px": 0.0}
    return pd.DataFrame({"label": labels, "x_px": np.arange(len(code))}).assign(**facts)


def run(n: int = 30_000, d: int = 512, seeds: int = 5, repeats: int = 3) -> list[dict]:
    """Run both ways in turns; ratios are of neighbouring runs, so a busy hour cancels."""
    x, code = features(n, d)
    spots = table_of(code)
    times, scores = {way: [] for way in WAYS}, {}
    for repeat in range(repeats):
        for way in list(WAYS)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            rows = paper_protocol(x, spots, path=WAYS[way], seeds=range(seeds))
            times[way].append(time.perf_counter() - start)
            scores[way] = rows[(rows["part"] == "test") & (rows["measure"] == "macro_f1")]
    base = times[next(iter(WAYS))]
    found = []
    for way, seconds in times.items():
        ratios = [b / s for b, s in zip(base, seconds, strict=True)]
        found.append(
            {
                "what": "probe sweep",
                "case": f"{n:,} x {d}, 7 classes, {seeds} seeds x {len(ALPHAS)} penalties, made up",
                "way": way,
                "seconds": statistics.median(seconds),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "macro_f1": float(scores[way]["value"].mean()),
                "macro_f1 by seed": scores[way]["value"].tolist(),
                "alphas": scores[way]["alpha"].tolist(),
                "runs": repeats,
            }
        )
    return found
