"""Readers' own slides: Space Ranger folders and h5ad files."""

import json

import anndata as ad
import h5py
import made_own
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from helpers import genes, slides
from helpers.files import DataError


@pytest.fixture
def outs(tmp_path):
    """A Space Ranger folder of 36 spots, as version 2 writes it."""
    return made_own.space_ranger(tmp_path / "Mine")


def test_space_ranger_with_the_full_image_counts_its_px(outs, tmp_path):
    full = made_own.full_image(outs, tmp_path / "full.tif")
    adata = slides.read_space_ranger(outs, image_file=full)
    assert adata.obsm["spatial"][1].tolist() == [160.0, 100.0]
    assert slides.um_per_px(adata) == pytest.approx(1.0)


def test_space_ranger_without_it_counts_px_of_the_small_image(outs):
    adata = slides.read_space_ranger(outs)
    assert adata.obsm["spatial"][1].tolist() == [80.0, 50.0]
    assert slides.um_per_px(adata) == pytest.approx(2.0)


def test_space_ranger_reads_the_headerless_list_of_version_1(outs):
    path = outs / "spatial/tissue_positions.csv"
    table = pd.read_csv(path)
    path.unlink()
    table.to_csv(outs / "spatial/tissue_positions_list.csv", header=False, index=False)
    assert slides.read_space_ranger(outs).n_obs == 36


def test_space_ranger_counts_keep_their_spots(outs):
    adata = slides.read_space_ranger(outs)
    with h5py.File(outs / "filtered_feature_bc_matrix.h5") as file:
        total = file["matrix/data"][()].sum()
    assert adata.X.sum() == total
    assert adata.obs_names[0] == "Mine_ACGT0000-1"


def test_space_ranger_repeated_symbols_are_added_up_and_logged(outs, caplog):
    adata = slides.read_space_ranger(outs)
    with h5py.File(outs / "filtered_feature_bc_matrix.h5") as file:
        group = file["matrix"]
        parts = (group[name][()] for name in ("data", "indices", "indptr"))
        truth = sparse.csc_matrix(tuple(parts), shape=group["shape"][()]).toarray()
    assert list(adata.var_names) == ["Ga", "Gb", "Gc", "Gd"]
    assert adata.X[:, 3].toarray().ravel().tolist() == (truth[3] + truth[4]).tolist()
    assert "1 gene symbols come more than once (Gd)" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "filtered_feature_bc_matrix.h5",
        "spatial/scalefactors_json.json",
        "spatial/tissue_hires_image.png",
        "spatial/tissue_positions.csv",
    ],
)
def test_space_ranger_file_missing(outs, name):
    (outs / name).unlink()
    with pytest.raises(DataError, match=r"slide Mine, file \S*(outs|Mine)\S*: "):
        slides.read_space_ranger(outs)


def test_space_ranger_list_with_a_header_is_read_by_name(outs):
    path = outs / "spatial/tissue_positions.csv"
    path.rename(outs / "spatial/tissue_positions_list.csv")
    assert slides.read_space_ranger(outs).n_obs == 36


def test_space_ranger_without_a_spot_on_tissue(outs):
    path = outs / "spatial/tissue_positions.csv"
    pd.read_csv(path).assign(in_tissue=0).to_csv(path, index=False)
    with pytest.raises(DataError, match=r"slide Mine, file .*only 0 spot ids"):
        slides.read_space_ranger(outs)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tissue_hires_scalef": "x"}'])
def test_space_ranger_scale_factors_that_are_none(outs, text):
    path = outs / "spatial/scalefactors_json.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"slide Mine, file .*{path.name}: not Space Ranger"):
        slides.read_space_ranger(outs)


def test_space_ranger_position_missing(outs):
    path = outs / "spatial/tissue_positions.csv"
    table = pd.read_csv(path)
    table.loc[3, "pxl_row_in_fullres"] = np.nan
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"tissue_positions.csv: .*position is missing"):
        slides.read_space_ranger(outs)


def test_space_ranger_matrix_cut_off(outs):
    path = outs / "filtered_feature_bc_matrix.h5"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="not a 10x count matrix"):
        slides.read_space_ranger(outs)


@pytest.fixture
def h5ad(outs, tmp_path):
    """The same slide as h5ad, with its image."""
    return made_own.h5ad(outs, tmp_path / "mine.h5ad")


def test_h5ad_has_the_books_columns(h5ad):
    adata = slides.read_h5ad(h5ad[0], image_file=h5ad[1])
    assert {"slide", "donor", "group", "study", "label"} <= set(adata.obs)
    assert slides.um_per_px(adata) == pytest.approx(2.0)


def test_h5ad_takes_raw_counts_from_a_layer(h5ad):
    adata = ad.read_h5ad(h5ad[0])
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.5
    adata.write_h5ad(h5ad[0])
    again = slides.read_h5ad(h5ad[0], image_file=h5ad[1])
    assert again.X.sum() == adata.layers["counts"].sum()
    assert genes.normalise(again).n_obs == again.n_obs


def test_h5ad_normalised_counts_are_refused(h5ad):
    adata = ad.read_h5ad(h5ad[0])
    adata.X = adata.X * 0.3
    adata.write_h5ad(h5ad[0])
    with pytest.raises(DataError, match="normalised"):
        slides.read_h5ad(h5ad[0], image_file=h5ad[1])


def test_h5ad_nan_counts_are_refused(h5ad):
    adata = ad.read_h5ad(h5ad[0])
    adata.X.data[0] = np.nan
    adata.write_h5ad(h5ad[0])
    with pytest.raises(DataError, match="whole numbers"):
        slides.read_h5ad(h5ad[0], image_file=h5ad[1])


@pytest.mark.parametrize("scale", [-1.0, 0.0, np.nan])
def test_h5ad_with_a_senseless_scale(h5ad, scale):
    with pytest.raises(DataError, match=r"slide mine.* is no scale"):
        slides.read_h5ad(h5ad[0], image_file=h5ad[1], um_per_px=scale)


def test_h5ad_of_an_unknown_array(h5ad):
    with pytest.raises(DataError, match="unknown array 'visium'"):
        slides.read_h5ad(h5ad[0], image_file=h5ad[1], tech="visium")


def test_h5ad_without_coordinates(h5ad):
    adata = ad.read_h5ad(h5ad[0])
    del adata.obsm["spatial"]
    adata.write_h5ad(h5ad[0])
    with pytest.raises(DataError, match="spatial"):
        slides.read_h5ad(h5ad[0], image_file=h5ad[1])


def test_h5ad_symbols_come_from_a_column_and_repeated_ones_are_added_up(h5ad, caplog):
    adata = ad.read_h5ad(h5ad[0])
    adata.var["symbol"] = ["Ga", "Gb", "Gb", "Gd"]
    adata.var_names = [f"ENSMUSG0000000000{i}" for i in range(4)]
    adata.write_h5ad(h5ad[0])
    assert slides.read_h5ad(h5ad[0], image_file=h5ad[1]).n_vars == 4
    assert "named by ids (ENSMUSG00000000000)" in caplog.text
    caplog.clear()
    again = slides.read_h5ad(h5ad[0], image_file=h5ad[1], symbols="symbol")
    assert list(again.var_names) == ["Ga", "Gb", "Gd"]
    assert again.X.sum() == adata.X.sum()
    assert "named by ids" not in caplog.text


def test_h5ad_without_the_column_of_symbols(h5ad):
    with pytest.raises(DataError, match=r"slide mine.* var has no column 'symbol'"):
        slides.read_h5ad(h5ad[0], image_file=h5ad[1], symbols="symbol")


def test_h5ad_cut_off(h5ad):
    h5ad[0].write_bytes(h5ad[0].read_bytes()[:3000])
    with pytest.raises(DataError, match="not an h5ad"):
        slides.read_h5ad(h5ad[0], image_file=h5ad[1])


def test_visium_hd_bins_come_from_parquet_with_their_own_scale(outs):
    path = outs / "spatial/tissue_positions.csv"
    pd.read_csv(path).to_parquet(path.with_suffix(".parquet"))
    path.unlink()
    (outs / "spatial/scalefactors_json.json").write_text(
        json.dumps({"bin_size_um": 16, "microns_per_pixel": 0.4, "tissue_hires_scalef": 0.5})
    )
    adata = slides.read_space_ranger(outs)
    assert slides.um_per_px(adata) == pytest.approx(0.8)
    assert slides.spot_side_px(adata) == pytest.approx(16 / 0.8)
    assert adata.uns["spatial"]["Mine"]["metadata"]["tech"] == "VisiumHD"
