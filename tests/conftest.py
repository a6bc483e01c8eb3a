"""Fixtures every test may use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pandas as pd
import pytest
from PIL import Image

if TYPE_CHECKING:
    from browser import Browser

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ROOT.parent / "shared" / "data" / "STimage-1K4M"
REAL_ROOT = Path(os.environ.get("STIMAGE_ROOT") or BESIDE)  # read before tests clear it


def missing(what: str) -> NoReturn:
    """Skip a test for want of something; fail it in CI, where a green job means it ran."""
    (pytest.fail if os.environ.get("STIMAGE_CI") else pytest.skip)(what)


def until(found: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """Ask again and again until the answer is true, and return it; a busy machine is slow."""
    latest = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < latest, f"waited {seconds} s in vain for {what}"
        time.sleep(0.05)
    return answer


@pytest.fixture(scope="session")
def real_root() -> Path:
    """A folder with real slides: ``STIMAGE_ROOT``, else the copy beside the checkout."""
    if not (REAL_ROOT / "ST").is_dir():
        pytest.skip("real slides not here")
    return REAL_ROOT


@pytest.fixture(scope="session")
def run_of_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every chapter on `demo`, as `make book` does, and return the folder of the results.

    The tests of the notebooks and those of the pages look at this one run. Chapters that have run
    before and have not changed are copied. At the end of each chapter, its checks are asked about
    wrong answers (tests/wrong_answers/judge.py).
    """
    out = tmp_path_factory.mktemp("run") / "notebooks"
    command = [sys.executable, ROOT / "tools/run_notebooks.py", "--study", "demo", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Make a git checkout of its own that holds what this one tracks, as it is now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")

    def make() -> Path:
        root = tmp_path_factory.mktemp("checkout")
        for name in filter(None, listed.stdout.split("\0")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        me = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        for command in (["init", "-q"], ["add", "-A", "-f"], [*me, "commit", "-q", "-m", "all"]):
            subprocess.run(["git", *command], cwd=root, check=True)
        return root

    return make


@pytest.fixture(scope="module")  # while one is open, no test elsewhere can run asyncio
def chromium() -> Iterator[Browser]:
    """A headless Chromium."""
    from browser import browser, executable

    if executable() is None:
        missing("no Chromium on this machine: nothing was looked at in a browser")
    with browser() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Every test run has a cache of its own and sees no dataset but the one it names."""
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("STIMAGE_ROOT", raising=False)


@dataclass
class Tiny:
    """A slide of 30 spots and 4 genes in the official layout, to be broken by a test."""

    root: Path
    slide: str

    @property
    def image(self) -> Path:
        return self.root / f"ST/image/{self.slide}.png"

    @property
    def coord(self) -> Path:
        return self.root / f"ST/coord/{self.slide}_coord.csv"

    @property
    def counts(self) -> Path:
        return self.root / f"ST/gene_exp/{self.slide}_count.csv"

    @property
    def annotation(self) -> Path:
        return self.root / f"annotation/{self.slide}_anno.csv"


@pytest.fixture
def tiny(tmp_path) -> Tiny:
    """Write the slide: a pink block left of the middle of a wide white image, spots on the block.

    It takes the name of a demo slide, so that the book's catalogue knows its technology.
    """
    made = Tiny(tmp_path / "root", "Demo_Layers_Simulated_ST_A1")
    for path in (made.image, made.coord, made.counts, made.annotation):
        path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    picture = np.full((300, 420, 3), 245, np.uint8)
    picture[30:290, 20:240] = (200, 120, 170) + rng.integers(-20, 20, (260, 220, 3))
    Image.fromarray(picture).save(made.image)
    grid = [(x, y) for y in range(6) for x in range(5)]
    ids = [f"{made.slide}_{x + 1}x{y + 1}" for x, y in grid]
    coord = pd.DataFrame(
        {
            "yaxis": [50.0 + 40 * y for _, y in grid],
            "xaxis": [40.0 + 40 * x for x, _ in grid],
            "r": 10.0,
        },
        index=ids,
    )
    coord.to_csv(made.coord)
    counts = pd.DataFrame(rng.poisson(2, (30, 4)), index=ids, columns=["Ga", "Gb", "Gc", "Gd"])
    counts.iloc[::-1].to_csv(made.counts)  # in another order than the coordinates
    labels = pd.Series([f"Layer {1 + y // 2}" for _, y in grid], index=ids, name="V2")
    labels.iloc[3] = "undetermined"
    labels.iloc[:-2].to_csv(made.annotation)
    return made


@pytest.fixture
def sections(tmp_path) -> dict:
    """Three donors, one with two adjacent sections; each slide has a picture of its own."""
    from anndata import AnnData
    from scipy import sparse

    from helpers import genes, slides

    rng, adatas = np.random.default_rng(0), {}
    grid = np.array([(40.0 + 40 * x, 50.0 + 40 * y) for y in range(6) for x in range(5)])
    donors = {"X1": "X", "X2": "X", "Y1": "Y", "Z1": "Z"}
    for name, donor in donors.items():
        path = tmp_path / f"{name}.png"
        Image.fromarray(rng.integers(60, 220, (300, 240, 3), np.uint8)).save(path)
        symbols = [f"G{i}" for i in range(25)][: 25 if donor != "Z" else 20]
        counts = rng.negative_binomial(2, 0.1, (30, len(symbols))).astype(np.float32)
        obs = pd.DataFrame(index=[f"{name}_{i}" for i in range(30)])
        obs["slide"], obs["donor"], obs["group"] = name, donor, donor
        adata = AnnData(sparse.csr_matrix(counts), obs, pd.DataFrame(index=symbols))
        adata.obsm["spatial"] = grid
        slides.attach_image(adata, name, path, "ST", radius_px=10.0, image=False)
        adatas[name] = genes.normalise(adata)
    return adatas
