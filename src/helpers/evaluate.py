"""Everything that judges features: splits, probes, scores, clusters, mixing, retrieval.

The parts are ``places -> splits -> scores -> linear -> probes -> clusters -> spaces``; a chapter
imports this module. One table in (who the spots are), one array in (their features), tidy tables
out, one row per measurement.
"""

from helpers.clusters import (
    agreement,
    kmeans,
    leiden,
    paired,
    same_footing,
    separation,
    spatial_leiden,
)
from helpers.linear import ALPHAS, PENALTIES, Guess, Known, lbfgs_path, logistic, sgd_path
from helpers.places import blocks, describe
from helpers.probes import coordinates, majority, neighbours, paper, predict
from helpers.scores import MEASURES, calibration, calibration_error, difference, score
from helpers.spaces import mixing, neighbour_overlap, procrustes
from helpers.splits import (
    Fold,
    Splits,
    ladder,
    left_out,
    random_spots,
    spatial_blocks,
)

__all__ = [  # noqa: F822, recall comes when asked for
    "ALPHAS", "MEASURES", "PENALTIES", "Fold", "Guess", "Known", "Splits", "agreement", "blocks",
    "calibration", "calibration_error", "coordinates", "describe", "difference", "kmeans", "ladder",
    "lbfgs_path", "left_out", "leiden", "logistic", "majority", "mixing", "neighbour_overlap",
    "neighbours", "paired", "paper", "predict", "procrustes", "random_spots", "recall",
    "same_footing", "score", "separation", "sgd_path", "spatial_blocks", "spatial_leiden",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import `recall` when it is asked for: torch takes seconds, and most of this needs none."""
    if name == "recall":
        from helpers.model import recall

        return recall
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
