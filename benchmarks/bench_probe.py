"""Time the probe's sweep over penalties against the published one, on the same splits."""

import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import f1_score

from helpers.probing import logistic_path

ALPHAS = (1.0, 0.1, 0.01, 0.001, 0.0001)  # those of Chen et al. 2024

Fit = Callable[[np.ndarray, np.ndarray, int], Iterable[ClassifierMixin]]


def published(x: np.ndarray, y: np.ndarray, seed: int) -> Iterable[ClassifierMixin]:
    """Fit one model per penalty as Chen et al. 2024 do: SGD, one class against the rest."""
    look = {"loss": "log_loss", "class_weight": "balanced", "max_iter": 10_000}
    return [SGDClassifier(alpha=a, random_state=seed, **look).fit(x, y) for a in ALPHAS]


WAYS: dict[str, Fit] = {
    "published: SGD, max_iter 10,000": published,
    "book: L-BFGS, warm starts": lambda x, y, _: logistic_path(x, y, ALPHAS, tol=6e-3).values(),
    "book, closer to the optimum": lambda x, y, _: logistic_path(x, y, ALPHAS, tol=1e-3).values(),
}


def sweep(x: np.ndarray, y: np.ndarray, fit: Fit, seed: int) -> tuple[float, float]:
    """Split 80 / 10 / 10 at random; return the macro-F1 of the test and the penalty chosen."""
    order = np.random.default_rng(seed).permutation(len(y))
    train, valid, test = np.split(order, [int(0.8 * len(y)), int(0.9 * len(y))])
    found = []
    for alpha, model in zip(ALPHAS, fit(x[train], y[train], seed), strict=True):
        chosen, judged = (
            f1_score(y[rows], model.predict(x[rows]), average="macro") for rows in (valid, test)
        )
        found.append((chosen, judged, alpha))
    _, score, alpha = max(found, key=lambda one: one[0])
    return score, alpha


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


def run(n: int = 30_000, d: int = 512, seeds: int = 5, repeats: int = 3) -> list[dict]:
    """Run both ways in turns; ratios are of neighbouring runs, so a busy hour cancels."""
    x, code = features(n, d)
    y = np.array([f"layer {c}" for c in code])
    times, scores = {way: [] for way in WAYS}, {}
    for repeat in range(repeats):
        for way in list(WAYS)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            scores[way] = [sweep(x, y, WAYS[way], seed) for seed in range(seeds)]
            times[way].append(time.perf_counter() - start)
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
                "macro_f1": statistics.mean(score for score, _ in scores[way]),
                "macro_f1 by seed": [score for score, _ in scores[way]],
                "alphas": [alpha for _, alpha in scores[way]],
                "runs": repeats,
            }
        )
    return found
