"""The pages of the studies: what is here is drawn, what is not is said."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import study_pages
from helpers import catalog


def noise(seed: int = 0) -> study_pages.Thumbnail:
    pixels = np.random.default_rng(seed).integers(0, 255, (400, 380, 3), np.uint8)
    return study_pages.Thumbnail(pixels, 12.0, 2.5)


@pytest.fixture
def mob() -> catalog.Study:
    return catalog.study("mob")


def test_a_slide_is_made_small_and_keeps_its_scale(tiny):
    section = catalog.study("demo").section(tiny.slide)
    made = study_pages.thumbnail(section, tiny.root)
    assert made.full_um_per_px == pytest.approx(100 / 20)  # a spot of 100 um is 20 px wide
    assert made.um_per_px == pytest.approx(made.full_um_per_px * 420 / made.pixels.shape[1])
    assert max(made.pixels.shape) == study_pages.SIDE


def test_a_slide_that_is_not_here_is_not_fetched(tiny, mob):
    section = catalog.study("demo").section(tiny.slide)
    tiny.image.unlink()
    assert study_pages.thumbnail(section, tiny.root) is None
    assert study_pages.thumbnail(mob.sections[0], None) is None


@pytest.mark.parametrize("count", [1, 4, 12])
def test_the_picture_fits_a_page_and_is_the_same_twice(tmp_path, count):
    study = catalog.study("dlpfc")
    found = {s.slide: noise(i) for i, s in enumerate(study.sections[:count])}
    study_pages.draw(study, found, tmp_path / "a.jpg")
    study_pages.draw(study, found, tmp_path / "b.jpg")
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()
    assert Image.open(tmp_path / "a.jpg").width == 700


def test_the_page_says_what_is_here_and_what_is_not(mob):
    some = {mob.sections[0].slide: noise()}
    assert "no picture here" in study_pages.pictures(mob, {})
    assert "```{figure} figures/study-mob.jpg" in study_pages.pictures(mob, some)
    assert "3 more were not" in study_pages.pictures(mob, some)
    table = study_pages.slide_table(mob, some)
    assert "| `Rep4` | A | none | yes | 2.50 |" in table
    assert "| `Rep11` | E | `Rep12` | yes | not here |" in table


def test_the_facts_are_those_of_the_catalogue(mob):
    table = study_pages.facts_table(mob)
    for fact in ("mouse, olfactory bulb", "Granule cell layer", mob.licence, "| donors | 3 |"):
        assert fact in table
    assert "| simulated |" in study_pages.facts_table(catalog.study("demo"))


def test_every_substitution_of_a_study_page_is_made(tmp_path, monkeypatch):
    import re

    import yaml

    root = Path(study_pages.__file__).resolve().parent.parent
    shutil.copy(root / "_config.yml", tmp_path)
    monkeypatch.setattr(study_pages, "roots", lambda built: dict.fromkeys(catalog.STUDIES))
    study_pages.stage(tmp_path, "demo")
    config = yaml.safe_load((tmp_path / "_config.yml").read_text(encoding="utf-8"))
    for name in catalog.STUDIES:
        text = (root / f"book/study_{name}.md").read_text(encoding="utf-8")
        used = set(re.findall(r"\{\{ (\w+) \}\}", text))
        assert used == {f"{name}_{part}" for part in ("facts", "slides", "pictures")}
        assert used <= set(config["parse"]["myst_substitutions"])
