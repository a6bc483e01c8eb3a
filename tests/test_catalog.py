"""Studies, official paths, the table of slides."""

import hashlib
import io

import pandas as pd
import pytest

from helpers import catalog
from helpers.files import DataError, sha256


def test_unknown_study_lists_the_known_ones():
    with pytest.raises(DataError, match="demo, mob, her2st, dlpfc"):
        catalog.study("mop")


@pytest.mark.parametrize("name", catalog.STUDIES)
def test_no_slide_stands_twice_in_a_study(name):
    slides = [s.slide for s in catalog.study(name).sections]
    assert len(slides) == len(set(slides))


def test_adjacent_sections_are_of_one_donor():
    for study in catalog.STUDIES.values():
        table = pd.DataFrame([vars(s) for s in study.sections])
        assert (table.groupby("group")["donor"].nunique() == 1).all()


def test_olfactory_bulb_tiles_are_twice_as_wide_as_the_others():
    sides = {name: study.side_um for name, study in catalog.STUDIES.items()}
    assert sides == {"demo": 100.0, "mob": 200.0, "her2st": 100.0, "dlpfc": 100.0}


def test_unknown_section():
    with pytest.raises(DataError, match="slide x: not in study 'mob'"):
        catalog.study("mob").section("x")


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("image", "Visium/image/S.png"),
        ("coord", "Visium/coord/S_coord.csv"),
        ("gene_exp", "Visium/gene_exp/S_count.csv"),
        ("annotation", "annotation/S_anno.csv"),
    ],
)
def test_official_layout(kind, path):
    assert str(catalog.relative_path("S", kind, "Visium")) == path


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "a\\b", "/etc/passwd", "a\0b"])
def test_names_that_leave_the_root_are_refused(name):
    with pytest.raises(DataError, match="outside the dataset's root"):
        catalog.relative_path(name, "image", "ST")


def test_unknown_technology():
    with pytest.raises(DataError, match="unknown technology 'Xenium'"):
        catalog.relative_path("S", "image", "Xenium")


def test_find_takes_the_local_file(tiny):
    assert catalog.find(tiny.slide, "image", root=tiny.root) == tiny.image


def test_stimage_root_is_used(tiny, monkeypatch):
    monkeypatch.setenv("STIMAGE_ROOT", str(tiny.root))
    assert catalog.find(tiny.slide, "coord") == tiny.coord


def test_root_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match=r"does not exist.*STIMAGE_ROOT"):
        catalog.local_root(tmp_path / "nowhere")


def test_offline_error_says_what_was_tried_and_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        catalog.find("S", "image", tech="ST", root=tmp_path)
    for part in ("slide S", "ST/image/S.png", str(tmp_path), "STIMAGE_ROOT", "internet"):
        assert part in str(caught.value)


# --------------------------------------------------------------------------- the table

ROW = {
    "slide": "S1",
    "species": "human",
    "tissue": "lymphnode",
    "pmid": "1,2",
    "title": "t",
    "abstract": "a",
    "keywords": None,
    "involve_cancer": True,
    "tech": "Visium",
    "spot_num": 10,
    "gene_num": 100,
}


@pytest.fixture
def write(tmp_path):
    """Write a metadata table of the given rows and return its root."""

    def _write(*rows, drop=()):
        path = tmp_path / catalog.METADATA
        path.parent.mkdir(exist_ok=True)
        pd.DataFrame(rows).drop(columns=list(drop)).to_csv(path, index=False, quoting=2)
        return tmp_path

    return _write


def test_labels_are_cleaned_and_the_originals_kept(write):
    table = catalog.metadata(write(ROW, ROW | {"slide": "S2", "species": "rattus norvegicus"}))
    assert table["tissue"].tolist() == ["lymph node"] * 2
    assert table["tissue_raw"].tolist() == ["lymphnode"] * 2
    assert table["species"].tolist() == ["human", "rat"]


def test_table_is_typed(write):
    types = catalog.metadata(write(ROW)).dtypes.astype(str)
    assert types[["spot_num", "involve_cancer", "tech", "species"]].tolist() == [
        "int64",
        "bool",
        "category",
        "category",
    ]


def test_table_with_a_slide_twice(write):
    with pytest.raises(DataError, match=r"file .*row 2 .*duplicate"):
        catalog.metadata(write(ROW, ROW))


def test_table_without_a_column(write):
    with pytest.raises(DataError, match="spot_num"):
        catalog.metadata(write(ROW, drop=["spot_num"]))


@pytest.mark.parametrize(
    "cell", [{"spot_num": 1.5}, {"spot_num": "many"}, {"gene_num": None}, {"involve_cancer": "no"}]
)
def test_table_with_a_value_of_the_wrong_type(write, cell):
    with pytest.raises(DataError, match=r"file .*not the table of slides"):
        catalog.metadata(write(ROW | cell))


def test_table_with_a_row_without_slide_name(write):
    with pytest.raises(DataError, match="row 2 of the table has no slide name"):
        catalog.metadata(write(ROW, ROW | {"slide": None}))


def test_empty_table(write):
    root = write(ROW)
    (root / catalog.METADATA).write_text("")
    with pytest.raises(DataError, match=r"file .*csv: not the table of slides"):
        catalog.metadata(root)


def test_technology_of_a_slide_outside_the_books_studies(write):
    assert catalog.technology("S1", root=write(ROW)) == "Visium"


def test_slide_that_is_not_in_the_table(write):
    with pytest.raises(DataError, match="slide S9: this slide is not in"):
        catalog.technology("S9", root=write(ROW))


def test_summary_counts_slides_and_spots(write):
    table = catalog.metadata(write(ROW, ROW | {"slide": "S2", "tech": "ST", "spot_num": 30}))
    assert catalog.summary(table).to_dict("index") == {
        "ST": {"slides": 1, "spots": 30, "share": 0.75, "median": 30},
        "Visium": {"slides": 1, "spots": 10, "share": 0.25, "median": 10},
        "all": {"slides": 2, "spots": 40, "share": 1.0, "median": 20},
    }


def test_official_table_has_1149_slides_and_4293195_spots(real_root):
    summary = catalog.summary(catalog.metadata(real_root))
    assert summary.loc["all", ["slides", "spots"]].tolist() == [1149, 4293195]


def test_official_table_is_the_pinned_one(real_root):
    assert sha256(catalog.metadata_path(real_root)) == catalog.METADATA_SHA256


# --------------------------------------------------------------------------- Splotch's layers

SPLOTCH = "\t20.1_24.9\t16_9\t5_5\nOlfactory nerve layer\t0\t1\t0\nGranular Cell Layer\t1\t0\t0\n"
MOB = "Mouse_OlfactoryBulb_Stahl_07012016_ST_Rep8"


def test_splotch_labels_join_on_rounded_array_coordinates():
    labels = catalog.splotch_labels(SPLOTCH, "S")
    assert labels.to_dict() == {
        "S_20x25": "Granule cell layer",
        "S_16x9": "Olfactory nerve layer",
    }


def test_splotch_file_is_fetched_once_and_written_in_the_official_layout(monkeypatch):
    calls = []
    monkeypatch.setitem(catalog.SPLOTCH_SHA256, 8, hashlib.sha256(SPLOTCH.encode()).hexdigest())
    monkeypatch.setattr(
        "urllib.request.urlopen",
        lambda url, timeout: calls.append(url) or io.BytesIO(SPLOTCH.encode()),
    )
    for _ in range(2):
        path = catalog.find(MOB, "annotation")
    assert pd.read_csv(path, index_col=0)["V2"].to_dict()[f"{MOB}_16x9"] == "Olfactory nerve layer"
    assert len(calls) == 1
    path.unlink()


@pytest.mark.parametrize("replicate", ["99", "X"])
def test_replicate_without_layers(replicate):
    with pytest.raises(DataError, match="no layers are published"):
        catalog.find(MOB[:-1] + replicate, "annotation", tech="ST")


def test_splotch_file_that_changed_is_refused(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"other"))
    with pytest.raises(DataError, match=f"slide {MOB}: .*do not match their pinned hash"):
        catalog.find(MOB, "annotation")
