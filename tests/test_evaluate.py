"""The whole way from spots to a difference, the same in every process."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_spots import SCALES, spots, telling

from helpers import metrics, probing, splits

HERE = Path(__file__).parent


def whole() -> str:
    """Everything that sorts, draws or hashes, as text."""
    table = spots().assign(label=lambda t: t["label"].astype("category"))
    x, rungs = telling(table), splits.ladder(table, SCALES, together=True)
    quick = partial(probing.logistic, alphas=(1.0, 0.1))
    found = [probing.predict(x, rungs[name], quick) for name in ("random spots", "left-out donor")]
    tables = [
        *found,
        probing.difference(*found, over="donor"),
        probing.paper_protocol(x, table, seeds=[0], alphas=[0.01, 0.1]),
        metrics.mixing(x, table["donor"], table["label"]),
        pd.DataFrame(metrics.kmeans(x, 4)),
    ]
    names = [fold.name for rung in rungs.values() for fold in rung.folds]
    return "\n".join([*names, *(one.to_csv() for one in tables)])


def test_another_process_finds_the_same():
    """The order of sets and hashes has no say (the published splits differ in each process)."""
    path = [str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": other, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", "from test_evaluate import whole; print(whole())"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == whole().strip()
    assert len(done.stdout) > 10_000


def test_a_leak_through_neighbours_is_named_in_numbers():
    """Features that know only where a spot lies on its own slide: near others they seem to see."""
    table = spots()
    rng = np.random.default_rng(0)
    table["label"] = np.concatenate(
        [
            np.roll(part.to_numpy(), 27 * i)
            for i, (_, part) in enumerate(table.groupby("slide")["label"])
        ]
    )  # each slide has its layers at another height
    slide = np.unique(table["slide"], return_inverse=True)[1]
    place = np.eye(54)[slide * 9 + (table["y_px"] / 100).astype(int)]
    x = place + 0.01 * rng.normal(size=place.shape)
    rungs = splits.ladder(table, SCALES, together=True)
    quick = partial(probing.logistic, alphas=(0.1, 0.001))
    random = probing.predict(x, rungs["random spots"], quick)
    donor = probing.predict(x, rungs["left-out donor"], quick)
    assert probing.score(random)["value"][1] > 0.9
    gap = probing.difference(random, donor, over="block").iloc[1]
    assert gap["low"] > 0.3
    assert gap["second"] == pytest.approx(1 / 3, abs=0.15)
