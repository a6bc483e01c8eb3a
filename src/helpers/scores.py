"""Scores of predictions, with intervals that know how alike neighbouring spots are.

Spots of one piece of tissue succeed and fail together, so an interval that draws spots is far too
narrow. Here whole pieces, or whole donors, are drawn (the cluster bootstrap; Davison and Hinkley
1997, chapter 3.8). The models stay as fitted: what another training set would have given is not in
the interval. With few clusters, such as three donors, it is too narrow still, and `clusters` says
so.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from helpers.files import DataError

MEASURES = ("macro_f1", "balanced_accuracy")
"""Mean over the classes that occur in the truth: of F1, and of the share that is found."""


def confusion(
    truth: np.ndarray, predicted: np.ndarray, clusters: np.ndarray | None = None
) -> np.ndarray:
    """Count truth by prediction.

    Parameters
    ----------
    truth, predicted
        Labels ``(n,)``; classes are those of both, sorted.
    clusters
        Counts are kept apart by these ``(n,)``.

    Returns
    -------
    float ``(classes, classes)``, or ``(clusters, classes, classes)``.
    """
    classes, code = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    names, group = np.unique(
        np.zeros(len(truth)) if clusters is None else clusters, return_inverse=True
    )
    counts = np.zeros((len(names), len(classes), len(classes)))
    np.add.at(counts, (group, code[: len(truth)], code[len(truth) :]), 1)
    return counts[0] if clusters is None else counts


def measure(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return `MEASURES` of confusion matrices ``(..., classes, classes)``.

    They equal scikit-learn's ``f1_score(truth, predicted, labels=numpy.unique(truth),
    average="macro")`` and ``balanced_accuracy_score(truth, predicted)``.
    """
    hit, true, said = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    there = true > 0
    f1 = np.divide(2 * hit, true + said, out=np.zeros(hit.shape), where=there)
    found = np.divide(hit, true, out=np.zeros(hit.shape), where=there)
    return {
        name: each.sum(-1) / there.sum(-1) for name, each in zip(MEASURES, (f1, found), strict=True)
    }


def score(
    predictions: pd.DataFrame,
    over: str = "block",
    *,
    each: str | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predictions, with a bootstrap interval over pieces of tissue or donors.

    Parameters
    ----------
    predictions
        From `helpers.probes.predict`.
    over
        What is drawn: ``"block"``, for other places on these donors; ``"donor"``, for other donors
        (``"group"``, ``"slide"``, ``"study"`` too).
    each
        A column, such as ``"fold"`` or ``"donor"``, to score apart; None: all together.
    n_boot, level, seed
        Resamples, coverage of the interval, and the seed they are drawn with.

    Returns
    -------
    DataFrame
        One row per measurement: `each` if given, `measure`, `value`, `low`, `high` (NaN with a
        single cluster), `n` (spots), `classes` (in the truth), `over`, `clusters`.
    """
    _check(predictions, over, each)
    if each is not None:
        some = predictions.groupby(each, sort=False)
        tables = {name: score(p, over, n_boot=n_boot, level=level, seed=seed) for name, p in some}
        return pd.concat(tables, names=[each]).reset_index(level=0).reset_index(drop=True)
    counts = _counts(predictions, over)
    draws = _draws(len(counts), n_boot, seed)
    value, drawn = measure(counts.sum(0)), measure(np.tensordot(draws, counts, 1))
    return _rows(value, drawn, predictions, over, len(counts), level)


def difference(
    first: pd.DataFrame,
    second: pd.DataFrame,
    over: str = "block",
    *,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Score `first` minus `second` on the spots both predicted, with the interval of that.

    Both are drawn together, cluster by cluster, so what they have in common cancels.

    Parameters
    ----------
    first, second
        From `helpers.probes.predict`, such as of random spots and of left-out donors.
    over, n_boot, level, seed
        As for `score`.

    Returns
    -------
    DataFrame
        As `score`, and `first` and `second`, the two scores themselves.

    Raises
    ------
    DataError
        When the two share no spot, or name another truth for one.
    """
    for table in (first, second):
        _check(table, over, None)
        if table.duplicated(["slide", "spot"]).any():
            raise DataError("a spot is predicted twice", fix="give the predictions of one split")
    both = first.merge(second[["slide", "spot", "truth", "predicted"]], on=["slide", "spot"],
                       suffixes=("", "_second"))  # fmt: skip
    if both.empty:
        raise DataError("the two have no spot in common", fix="predict the same spots with both")
    if (both["truth"] != both["truth_second"]).any():
        raise DataError("the two name another truth for the same spot", fix="use the same labels")
    counts = [_counts(both, over, column) for column in ("predicted", "predicted_second")]
    draws = _draws(len(counts[0]), n_boot, seed)
    value = [measure(c.sum(0)) for c in counts]
    drawn = [measure(np.tensordot(draws, c, 1)) for c in counts]
    gap, drawn_gap = ({m: a[m] - b[m] for m in MEASURES} for a, b in (value, drawn))
    rows = _rows(gap, drawn_gap, both, over, len(counts[0]), level)
    for name, one in zip(("first", "second"), value, strict=True):
        rows[name] = [float(one[m]) for m in MEASURES]
    return rows


def calibration(predictions: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """Compare how sure predictions are with how often they are right, in bins of equal width.

    Returns
    -------
    DataFrame
        One row per bin that is not empty: `low`, `high`, `n`, `confidence` (mean), `accuracy`, and
        `gap`, accuracy minus confidence: below 0 where it is too sure.
    """
    sure = predictions["confidence"].to_numpy(float)
    if not (np.isfinite(sure) & (sure >= 0) & (sure <= 1 + 1e-6)).all():
        raise DataError("a confidence is no probability", fix="use a predictor that gives them")
    edges = np.linspace(0, 1, bins + 1)
    at = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    right = (predictions["truth"] == predictions["predicted"]).to_numpy(float)
    table = pd.DataFrame({"bin": at, "confidence": sure, "accuracy": right}).groupby("bin")
    means, n = table.mean(), table.size()
    return pd.DataFrame(
        {
            "low": edges[means.index],
            "high": edges[means.index + 1],
            "n": n.to_numpy(),
            **{c: means[c].to_numpy() for c in ("confidence", "accuracy")},
            "gap": (means["accuracy"] - means["confidence"]).to_numpy(),
        }
    )


def calibration_error(predictions: pd.DataFrame, bins: int = 10) -> float:
    """Return the expected calibration error: the mean size of the gap over spots.

    After Guo et al. 2017 (arXiv 1706.04599), with the bins of `calibration`. 0 is perfect.
    """
    table = calibration(predictions, bins)
    return float((table["gap"].abs() * table["n"]).sum() / table["n"].sum())


def _check(predictions: pd.DataFrame, *columns: str | None) -> None:
    wanted = ["truth", "predicted", *(c for c in columns if c)]
    if lacking := [c for c in wanted if c not in predictions]:
        raise DataError(f"the predictions have no column {lacking}", fix="make them with predict")
    if predictions.empty:
        raise DataError("there are no predictions")


def _counts(table: pd.DataFrame, over: str, predicted: str = "predicted") -> np.ndarray:
    return confusion(*(table[c].astype(str).to_numpy() for c in ("truth", predicted, over)))


def _draws(clusters: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each cluster is in each resample, ``(n_boot, clusters)``."""
    share = np.full(clusters, 1 / clusters)
    return np.random.default_rng(seed).multinomial(clusters, share, n_boot).astype(float)


def _rows(
    value: dict, drawn: dict, table: pd.DataFrame, over: str, clusters: int, level: float
) -> pd.DataFrame:
    ends = [(1 - level) / 2, (1 + level) / 2]
    rows = []
    for name in MEASURES:
        low, high = np.quantile(drawn[name], ends) if clusters > 1 else (np.nan, np.nan)
        rows.append((name, float(value[name]), low, high))
    facts = {"n": len(table), "classes": table["truth"].nunique(), "over": over}
    frame = pd.DataFrame(rows, columns=["measure", "value", "low", "high"])
    return frame.assign(**facts, clusters=clusters)
