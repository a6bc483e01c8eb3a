"""The numbers of the dataset page: computed, from a source that the page names."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml

import dataset_page
from helpers import catalog, slides
from helpers.files import DataError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def table() -> pd.DataFrame:
    """Four slides of three technologies, as `catalog.metadata` returns them."""
    made = pd.DataFrame(
        {
            "slide": ["a", "b", "c", "d"],
            "species": ["human", "mouse", "human", "rat"],
            "tissue": ["brain", "lymph node", "brain", "lymph node"],
            "tissue_raw": ["brain", "lymphnode", "brain", "lymph node"],
            "tech": ["ST", "Visium", "Visium", "VisiumHD"],
            "involve_cancer": [True, False, False, False],
            "spot_num": [100, 200, 400, 1300],
            "gene_num": [1000, 20_000, 30_000, 40_000],
        }
    )
    made["tech"] = pd.Categorical(made["tech"], categories=catalog.TECHNOLOGIES)
    return made


@pytest.fixture
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A staged book whose study `mob` loads at once, and whose table of slides cannot be had."""

    def load(slide: str, *, study: str, image: bool) -> ad.AnnData:
        assert (study, image) == ("mob", False)
        adata = ad.AnnData(np.ones((3, 2), np.float32))
        adata.obs["label"] = ["Granule cell layer", np.nan, "Mitral cell layer"]
        adata.uns["spatial"] = {slide: {"um_per_px": 2.75}}
        return adata

    def nowhere(root: Path | None = None) -> Path:
        raise DataError("not here")

    monkeypatch.setattr(slides, "load", load)
    monkeypatch.setattr(catalog, "metadata_path", nowhere)
    shutil.copy(ROOT / "_config.yml", tmp_path)
    (tmp_path / "book" / "figures").mkdir(parents=True)
    return tmp_path


def substitutions(folder: Path) -> dict[str, str]:
    config = yaml.safe_load((folder / "_config.yml").read_text(encoding="utf-8"))
    return config["parse"]["myst_substitutions"]


def test_facts_of_a_small_table(table):
    found = dataset_page.facts(table)
    assert (found["slides"], found["spots"]) == (4, 2000)
    assert found["technologies"]["Visium"] == {"slides": 2, "spots": 600, "median": 300.0}
    assert found["tissues"] == {"brain": 2, "lymph node": 2}
    assert found["tissue_labels_raw"] == 3
    assert found["genes"]["between_15000_and_30000"] == 2
    assert sum(found["genes"]["slides"]) == 4
    bytes_of_floats = 4 * (100 * 1000 + 200 * 20_000 + 400 * 30_000 + 1300 * 40_000)
    assert found["dense_gb"] == round(bytes_of_floats / 1e9, 1)


def test_the_stored_facts_survive_json(table):
    found = dataset_page.facts(table)
    assert json.loads(json.dumps(found)) == found


def test_words_share_and_commas(table):
    found = dataset_page.words(dataset_page.facts(table))
    assert found["n_spots"] == "2,000"
    assert found["hd_share"] == "65%"
    assert "| Visium HD | 1 | 1,300 | 65% | 1,300 |" in found["technology_table"]


@pytest.mark.real
def test_the_stored_totals_are_those_of_the_official_table(real_root, monkeypatch):
    monkeypatch.setenv("STIMAGE_ROOT", str(real_root))
    found = dataset_page.official()
    assert found is not None
    stored = json.loads(dataset_page.STORED.read_text(encoding="utf-8"))
    assert (stored["facts"], stored["table_sha256"]) == found
    assert (found[0]["slides"], found[0]["spots"]) == (1149, 4293195)


@pytest.mark.real
def test_no_slide_is_named_in_the_stored_totals(real_root):
    text = dataset_page.STORED.read_text(encoding="utf-8")
    assert [name for name in catalog.metadata(real_root)["slide"] if name in text] == []


@pytest.mark.real
def test_a_page_made_from_the_table_says_so(staged, real_root, monkeypatch):
    monkeypatch.setattr(catalog, "metadata_path", lambda root=None: real_root / catalog.METADATA)
    dataset_page.stage(staged, "mob")
    assert "computed from the official table of slides while" in substitutions(staged)["source"]


def test_a_page_made_without_the_table_says_so(staged):
    dataset_page.stage(staged, "mob")
    found = substitutions(staged)
    assert "was not available" in found["source"]
    assert "results/catalogue.json" in found["source"]
    assert (found["n_slides"], found["n_spots"]) == ("1,149", "4,293,195")


def test_another_table_is_not_taken_for_the_official_one(tmp_path, monkeypatch, caplog):
    (tmp_path / "meta.csv").write_text("slide\nDemo\n")
    monkeypatch.setattr(catalog, "metadata_path", lambda root=None: tmp_path / "meta.csv")
    with caplog.at_level(logging.WARNING):
        assert dataset_page.official() is None
    assert "not the official table" in caplog.text


def test_the_study_is_counted(staged):
    dataset_page.stage(staged, "mob")
    found = substitutions(staged)
    assert (found["study_slides"], found["study_donors"], found["study_spots"]) == ("4", "3", "12")
    assert found["study_prefix"] == "`Mouse_OlfactoryBulb_Stahl_07012016_ST_`"
    assert "| `Rep4` | A | 3 | 2 | 2 | 2.75 |" in found["study_table"]


def test_a_slide_without_annotation_has_no_count_of_labels(staged, monkeypatch):
    study = catalog.study("her2st")
    loaded = {s.slide: ad.AnnData(np.ones((3, 2), np.float32)) for s in study.sections}
    for slide, adata in loaded.items():
        adata.obs["label"] = [np.nan] * 3
        adata.uns["spatial"] = {slide: {"um_per_px": 1.0}}
    assert "| `B4` | B | 3 | 2 | none | 1.00 |" in dataset_page.study_table(study, loaded)


def test_the_rest_of_the_config_stays(staged):
    before = yaml.safe_load((staged / "_config.yml").read_text(encoding="utf-8"))
    dataset_page.stage(staged, "mob")
    after = yaml.safe_load((staged / "_config.yml").read_text(encoding="utf-8"))
    del after["parse"]["myst_substitutions"]
    assert after == before


def test_figures_are_the_same_twice(table, tmp_path):
    numbers = dataset_page.facts(table)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        dataset_page.draw(numbers, tmp_path / name)
    names = ["dataset-genes.svg", "dataset-technologies.svg", "dataset-tissues.svg"]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_every_substitution_of_a_page_is_computed(staged):
    import re

    dataset_page.stage(staged, "mob")
    used = {
        name
        for path in (ROOT / "book").glob("*.md")
        if not path.name.startswith("study_")  # those are tools/study_pages.py's
        for name in re.findall(r"\{\{ (\w+) \}\}", path.read_text(encoding="utf-8"))
    }
    assert used
    assert used <= set(substitutions(staged))
