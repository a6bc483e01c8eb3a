"""What a linear probe is: what it may learn from, what it says, and how its penalty is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.files import DataError
from helpers.scores import confusion, measure
from helpers.splits import Splits

logger = logging.getLogger(__name__)

ALPHAS = (1.0, 0.1, 0.01, 0.001, 0.0001)
"""Penalties of Chen et al. 2024: ``alpha / 2 * |w|^2`` is added to the mean loss of a spot."""
PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
"""What `logistic` chooses from: standardised features of another donor want more restraint."""

TOLERANCE = 1e-3
"""Largest slope of the mean loss at which a fit ends: scores stay, and a third of the time goes."""


@dataclass(frozen=True)
class Known:
    """What a predictor may learn from: labelled spots of the training part.

    Attributes
    ----------
    x
        Features ``(n, d)``.
    y
        Labels ``(n,)``.
    spots
        Who and where they are.
    within
        Splits them further in the manner of the fold; see `Splits.within`.
    """

    x: np.ndarray
    y: np.ndarray
    spots: pd.DataFrame
    within: Callable[[pd.DataFrame], Splits]


@dataclass(frozen=True)
class Guess:
    """What a predictor says.

    Attributes
    ----------
    classes
        The labels it knows, sorted ``(k,)``.
    probability
        Of each class, ``(n, k)``. The largest one decides; the first of equals.
    setting
        What it chose, such as a penalty; NaN where there is no choice.
    """

    classes: np.ndarray
    probability: np.ndarray
    setting: float = np.nan


def logistic(
    known: Known, x: np.ndarray, spots: pd.DataFrame, *, alphas: Sequence[float] = PENALTIES
) -> Guess:
    """Fit a logistic regression on standardised features, with balanced classes.

    Scaler and weights come from training. The penalty does too: training is split again as the fold
    was (`Splits.within`), and the penalty with the best macro-F1 over all its spots is taken; the
    strongest of equals. Where training is too small to be split, the middle one is, with a line in
    the log.

    Parameters
    ----------
    known, x, spots
        As every predictor takes them.
    alphas
        Penalties to choose from; one of them alone is not chosen but taken.
    """
    alpha = alphas[0] if len(alphas) == 1 else _choose(known, alphas)
    *_, (_, model) = lbfgs_path(known.x, known.y, [a for a in alphas if a >= alpha])
    return Guess(model.classes_, model.predict_proba(x), alpha)


def _choose(known: Known, alphas: Sequence[float]) -> float:
    truth, guessed = [], {alpha: [] for alpha in sorted(alphas, reverse=True)}
    for train, test in _inner(known):
        if len(set(known.y[train])) > 1:
            truth.append(known.y[test])
            for alpha, model in lbfgs_path(known.x[train], known.y[train], alphas):
                guessed[alpha].append(model.predict(known.x[test]))
    if not truth:
        middle = sorted(alphas)[len(alphas) // 2]
        logger.warning("training cannot be split to choose a penalty: it is %g, the middle", middle)
        return middle
    truth = np.concatenate(truth)
    return max(guessed, key=lambda alpha: _macro_f1(truth, np.concatenate(guessed[alpha])))


def _inner(known: Known) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        return list(known.within(known.spots).split(known.x))
    except DataError:
        if "x_um" not in known.spots:  # the reader can mend that
            raise
        return []  # a piece of tissue too small to be cut


def _macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(measure(confusion(truth, predicted))["macro_f1"])


def lbfgs_path(
    x: np.ndarray, y: np.ndarray, alphas: Sequence[float], seed: int = 0, tol: float = TOLERANCE
) -> Iterator[tuple[float, ClassifierMixin]]:
    """Yield one multinomial model per penalty, the strongest first.

    Each starts from the weights of the one before (Friedman et al. 2010,
    doi:10.18637/jss.v033.i01), so use a model before you ask for the next. Nothing is drawn at
    random; `seed` is there to match `sgd_path`.

    Parameters
    ----------
    x, y
        Features ``(n, d)``, standardised here, and labels ``(n,)``.
    alphas
        Penalties; scikit-learn's `C` is ``1 / (n * alpha)``.
    tol
        Largest slope at which a fit ends. 0.006 is enough for a sweep over large data: half the
        time, about the same scores (``results/evaluate.json``); weights are still moving a little.
    """
    scaler = StandardScaler().fit(x)
    scaled = scaler.transform(x)
    model = LogisticRegression(class_weight="balanced", warm_start=True, tol=tol, max_iter=1000)
    for alpha in sorted(alphas, reverse=True):
        model.set_params(C=1 / (alpha * len(x))).fit(scaled, y)
        yield alpha, make_pipeline(scaler, model)


def sgd_path(
    x: np.ndarray, y: np.ndarray, alphas: Sequence[float], seed: int = 0
) -> Iterator[tuple[float, ClassifierMixin]]:
    """Yield one model per penalty as Chen et al. 2024 fit it: SGD, one class against the rest."""
    for alpha in sorted(alphas, reverse=True):
        model = SGDClassifier(
            loss="log_loss",
            penalty="l2",
            alpha=alpha,
            class_weight="balanced",
            max_iter=10_000,
            random_state=seed,
        )
        yield alpha, model.fit(x, y)
