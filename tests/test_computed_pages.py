"""The computed pages: numbers name their source, slides are drawn only if they are here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

import computed_pages
from helpers import catalog, slides
from helpers.files import DataError

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("facts", "slides", "pictures")


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
    monkeypatch.setattr(computed_pages, "roots", lambda built: dict.fromkeys(catalog.STUDIES))
    monkeypatch.setattr(catalog, "metadata_path", nowhere)
    shutil.copy(ROOT / "_config.yml", tmp_path)
    (tmp_path / "book" / "figures").mkdir(parents=True)
    return tmp_path


def substitutions(folder: Path) -> dict[str, str]:
    config = yaml.safe_load((folder / "_config.yml").read_text(encoding="utf-8"))
    return config["parse"]["myst_substitutions"]


def test_facts_of_a_small_table(table):
    found = computed_pages.totals_of(table)
    assert (found["slides"], found["spots"]) == (4, 2000)
    assert found["technologies"]["Visium"] == {"slides": 2, "spots": 600, "median": 300.0}
    assert found["tissues"] == {"brain": 2, "lymph node": 2}
    assert found["tissue_labels_raw"] == 3
    assert found["genes"]["between_15000_and_30000"] == 2
    assert sum(found["genes"]["slides"]) == 4
    bytes_of_floats = 4 * (100 * 1000 + 200 * 20_000 + 400 * 30_000 + 1300 * 40_000)
    assert found["dense_gb"] == round(bytes_of_floats / 1e9, 1)


def test_the_stored_facts_survive_json(table):
    found = computed_pages.totals_of(table)
    assert json.loads(json.dumps(found)) == found


def test_words_share_and_commas(table):
    found = computed_pages.dataset_values(computed_pages.totals_of(table))
    assert found["n_spots"] == "2,000"
    assert found["hd_share"] == "65%"
    assert "| Visium HD | 1 | 1,300 | 65% | 1,300 |" in found["technology_table"]


@pytest.mark.real
def test_the_stored_totals_are_those_of_the_official_table(real_root, monkeypatch):
    monkeypatch.setenv("STIMAGE_ROOT", str(real_root))
    found = computed_pages.official_totals()
    stored = json.loads(computed_pages.STORED.read_text(encoding="utf-8"))
    assert (stored["facts"], stored["table_sha256"]) == found
    assert (found[0]["slides"], found[0]["spots"]) == (1149, 4293195)


@pytest.mark.real
def test_no_slide_is_named_in_the_stored_totals(real_root):
    text = computed_pages.STORED.read_text(encoding="utf-8")
    assert [name for name in catalog.metadata(real_root)["slide"] if name in text] == []


@pytest.mark.real
def test_a_page_made_from_the_table_says_so(staged, real_root, monkeypatch):
    monkeypatch.setattr(catalog, "metadata_path", lambda root=None: real_root / catalog.METADATA)
    computed_pages.stage(staged, "mob")
    assert "computed from the official table of slides while" in substitutions(staged)["source"]


def test_a_page_made_without_the_table_says_so(staged):
    computed_pages.stage(staged, "mob")
    found = substitutions(staged)
    assert "was not available" in found["source"]
    assert "results/catalogue.json" in found["source"]
    assert (found["n_slides"], found["n_spots"]) == ("1,149", "4,293,195")


def test_another_table_is_not_taken_for_the_official_one(tmp_path, monkeypatch):
    (tmp_path / "meta.csv").write_text("slide\nDemo\n")
    monkeypatch.setattr(catalog, "metadata_path", lambda root=None: tmp_path / "meta.csv")
    with pytest.raises(DataError, match=r"meta\.csv: not the official table .* Fix: replace it"):
        computed_pages.official_totals()


def test_the_study_is_counted(staged):
    computed_pages.stage(staged, "mob")
    found = substitutions(staged)
    assert (found["study_slides"], found["study_donors"], found["study_spots"]) == ("4", "3", "12")
    assert found["study_prefix"] == "`Mouse_OlfactoryBulb_Stahl_07012016_ST_`"
    assert "| `Rep4` | A | 3 | 2 | 2 | 2.75 |" in found["study_table"]


def test_a_slide_without_annotation_has_no_count_of_labels(monkeypatch):
    def load(slide: str, *, study: str, image: bool) -> ad.AnnData:
        adata = ad.AnnData(np.ones((3, 2), np.float32))
        adata.obs["label"] = [np.nan] * 3
        adata.uns["spatial"] = {slide: {"um_per_px": 1.0}}
        return adata

    monkeypatch.setattr(slides, "load", load)
    values = computed_pages.built_values(catalog.study("her2st"))
    assert "| `B4` | B | 3 | 2 | none | 1.00 |" in values["study_table"]


def test_the_rest_of_the_config_stays(staged):
    before = yaml.safe_load((staged / "_config.yml").read_text(encoding="utf-8"))
    computed_pages.stage(staged, "mob")
    after = yaml.safe_load((staged / "_config.yml").read_text(encoding="utf-8"))
    del after["parse"]["myst_substitutions"]
    assert after == before


def test_figures_are_the_same_twice(table, tmp_path):
    numbers = computed_pages.totals_of(table)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        computed_pages.draw_dataset(numbers, tmp_path / name)
    names = ["dataset-genes.svg", "dataset-technologies.svg", "dataset-tissues.svg"]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_every_substitution_of_a_page_is_computed(staged):
    computed_pages.stage(staged, "mob")
    used = {
        name
        for path in (ROOT / "book").glob("*.md")
        for name in re.findall(r"\{\{ (\w+) \}\}", path.read_text(encoding="utf-8"))
    }
    assert used >= {f"{name}_{part}" for name in catalog.STUDIES for part in PARTS}
    assert used <= set(substitutions(staged))


# --- the page of each study ---------------------------------------------------------------------


def noise(seed: int = 0) -> computed_pages.Thumbnail:
    pixels = np.random.default_rng(seed).integers(0, 255, (400, 380, 3), np.uint8)
    return computed_pages.Thumbnail(pixels, 12.0, 2.5)


@pytest.fixture
def mob() -> catalog.Study:
    return catalog.study("mob")


def test_a_slide_is_made_small_and_keeps_its_scale(tiny):
    section = catalog.study("demo").section(tiny.slide)
    made = computed_pages.thumbnail(section, tiny.root)
    assert made.full_um_per_px == pytest.approx(100 / 20)  # a spot of 100 um is 20 px wide
    assert made.um_per_px == pytest.approx(made.full_um_per_px * 420 / made.pixels.shape[1])
    assert max(made.pixels.shape) == computed_pages.SIDE


def test_a_slide_that_is_not_here_is_not_fetched(tiny, mob):
    section = catalog.study("demo").section(tiny.slide)
    tiny.image.unlink()
    assert computed_pages.thumbnail(section, tiny.root) is None
    assert computed_pages.thumbnail(mob.sections[0], None) is None


@pytest.mark.parametrize("count", [1, 4, 12])
def test_the_picture_fits_a_page_and_is_the_same_twice(tmp_path, count):
    study = catalog.study("dlpfc")
    found = {s.slide: noise(i) for i, s in enumerate(study.sections[:count])}
    computed_pages.draw_study(study, found, tmp_path / "a.jpg")
    computed_pages.draw_study(study, found, tmp_path / "b.jpg")
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()
    assert Image.open(tmp_path / "a.jpg").width == 700


def test_the_page_says_what_is_here_and_what_is_not(mob):
    some = {mob.sections[0].slide: noise()}
    assert "no picture here" in computed_pages.figure_of(mob, {})
    assert "```{figure} figures/study-mob.jpg" in computed_pages.figure_of(mob, some)
    assert "3 more were not" in computed_pages.figure_of(mob, some)
    table = computed_pages.slides_table(mob, some)
    assert "| `Rep4` | A | none | yes | 2.50 |" in table
    assert "| `Rep11` | E | `Rep12` | yes | not here |" in table


def test_the_facts_are_those_of_the_catalogue(mob):
    table = computed_pages.facts_table(mob)
    for fact in ("mouse, olfactory bulb", "Granule cell layer", mob.licence, "| donors | 3 |"):
        assert fact in table
    assert "| simulated |" in computed_pages.facts_table(catalog.study("demo"))
