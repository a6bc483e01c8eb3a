"""The page on readers' own slides: its scripts run, and what it quotes is what the helpers say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import made_own
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import genes, slides
from helpers.files import DataError

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book/own_slides.md").read_text(encoding="utf-8")


def check_results(folder: Path, colour_of_spots: str) -> None:
    """Look at what a script left: tiles, embeddings and a figure, spot by spot."""
    adata = ad.read_h5ad(folder / "slide.h5ad")
    assert np.load(folder / "tiles.npy").shape == (made_own.N_SPOTS, 96, 96, 3)
    index = pd.read_csv(folder / "tiles.csv", index_col="spot")
    assert list(index.index) == list(adata.obs_names)
    assert adata.obsm["image"].shape == (made_own.N_SPOTS, 49)
    dark = adata.obsm["image"][:, 0] < np.median(adata.obsm["image"][:, 0])
    values = adata.obs[colour_of_spots].astype(float)
    assert abs(np.corrcoef(values, dark)[0, 1]) > 0.9  # the upper half of the tissue is darker
    with Image.open(folder / "figure.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(10**6)) > 100


def test_from_a_space_ranger_folder_as_a_reader_runs_it(tmp_path: Path) -> None:
    outs = made_own.space_ranger(tmp_path / "outs")
    image = made_own.full_image(outs, tmp_path / "full.tif")
    script = [sys.executable, ROOT / "book/own_space_ranger.py", outs, tmp_path / "results"]
    command = [*script, "--image", image, "--clusters", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    check_results(tmp_path / "results", "cluster")


def test_from_h5ad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outs = made_own.space_ranger(tmp_path / "outs")
    file, image = made_own.h5ad(outs, tmp_path / "mine.h5ad")
    options = [file, image, tmp_path / "results", "--tech", "Visium"]
    monkeypatch.setattr(sys, "argv", ["own_h5ad.py", *map(str, options)])
    runpy.run_path(str(ROOT / "book/own_h5ad.py"), run_name="__main__")
    check_results(tmp_path / "results", "component")


def test_several_slides_are_read_as_the_page_says(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names = {"slides": slides, "folders": {"left": made_own.space_ranger(tmp_path / "outs")}}
    exec(code, names)
    assert set(names["loaded"]["left"].obs["slide"]) == {"left"}


# --------------------------------------------------------------------------- what can go wrong


class Mine:
    """A good slide in both forms, to be spoiled."""

    def __init__(self, folder: Path) -> None:
        self.outs = made_own.space_ranger(folder / "outs")
        self.full = made_own.full_image(self.outs, folder / "full.tif")
        self.file, self.thumbnail = made_own.h5ad(self.outs, folder / "mine.h5ad")

    def space_ranger(self, image: Path | None = None) -> ad.AnnData:
        return slides.read_space_ranger(self.outs, image_file=image or self.full)

    def h5ad(self, change: Callable[[ad.AnnData], object], **options: object) -> ad.AnnData:
        adata = ad.read_h5ad(self.file)
        changed = change(adata)
        (changed if isinstance(changed, ad.AnnData) else adata).write_h5ad(self.file)
        return slides.read_h5ad(self.file, image_file=self.thumbnail, **options)


def swapped(mine: Mine, height: int) -> None:
    """Places with y first, on a picture with tissue along its upper edge."""
    picture = np.full((height, 360, 3), 245, np.uint8)
    picture[20:90, 20:330] = 150, 60, 120
    Image.fromarray(picture).save(mine.thumbnail)
    x, y = np.linspace(25, 325, made_own.N_SPOTS), np.linspace(25, 85, made_own.N_SPOTS)
    mine.h5ad(lambda a: a.obsm.update(spatial=np.column_stack([y, x])))


def no_image(mine: Mine) -> None:
    mine.full.unlink()
    mine.space_ranger()


def another_format(mine: Mine) -> None:
    mine.full.write_bytes(b"ZISRAWFILE" + bytes(600))
    mine.space_ranger()


def ids(adata: ad.AnnData) -> None:
    adata.var_names = [f"ENSG0000000000{i}" for i in range(adata.n_vars)]


def panel_of_symbols(mine: Mine) -> None:
    symbols = mine.h5ad(lambda a: None)
    panel = genes.Panel("mine", tuple(symbols.var_names), "all of them", ("mine",))
    genes.select(mine.h5ad(ids), panel)


def other_barcodes(mine: Mine) -> None:
    path = mine.outs / "spatial/tissue_positions.csv"
    path.write_text(path.read_text().replace("ACGT", "TTTT"))
    mine.space_ranger()


SPOILED: dict[str, Callable[[Mine], object]] = {
    "the image is missing": no_image,
    "no full image given": lambda mine: slides.read_space_ranger(mine.outs),
    "not a PNG": another_format,
    "lie outside the image of ... x and y look swapped": lambda mine: swapped(mine, 150),
    "lie on tissue": lambda mine: swapped(mine, 360),
    "lie outside the image of ... same slide": lambda mine: mine.h5ad(
        lambda a: a.obsm.update(spatial=2 * a.obsm["spatial"])
    ),
    "too few spots": lambda mine: mine.h5ad(lambda a: a[:4].copy()),
    "unknown array": lambda mine: mine.h5ad(lambda a: None, tech="Xenium"),
    "normalised": lambda mine: mine.h5ad(lambda a: setattr(a, "X", a.X * 0.5)),
    'obsm["spatial"]': lambda mine: mine.h5ad(lambda a: a.obsm.pop("spatial")),
    "named by ids": lambda mine: mine.h5ad(ids),
    "genes of panel": panel_of_symbols,
    "spot ids are in both": other_barcodes,
}
QUOTED = re.findall(r"^\| `(.+?)` \|", PAGE.partition("## When something goes wrong")[2], re.M)


def pattern(quoted: str) -> str:
    """Return a regular expression for a quoted message, in which `...` is anything."""
    return ".*".join(re.escape(part.strip()) for part in quoted.split("..."))


@pytest.mark.parametrize("key", SPOILED, ids=lambda key: key[:30])
def test_a_message_on_the_page_is_the_one_raised(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (quoted,) = [q for q in QUOTED if re.search(pattern(key), q)]
    mine = Mine(tmp_path)
    caplog.clear()
    try:
        SPOILED[key](mine)
        said = caplog.text
    except DataError as error:
        said = str(error)
    assert re.search(pattern(quoted), said, re.S), said


def test_every_message_on_the_page_is_tried() -> None:
    assert len(QUOTED) == len(SPOILED)
