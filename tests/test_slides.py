"""One slide from disk to AnnData: what it holds, and what it refuses."""

import json
import logging

import anndata as ad
import h5py
import made_own
import numpy as np
import pandas as pd
import pytest
from made_spots import SCALES, SLIDES, UM_PER_PX, spots
from PIL import Image
from scipy import sparse

from helpers import catalog, genes, slides
from helpers.files import DataError


def load(tiny):
    return slides.load(tiny.slide, root=tiny.root)


def rewrite(path, change):
    table = pd.read_csv(path, index_col=0)
    change(table).to_csv(path)


# --------------------------------------------------------------------------- what a slide holds


def test_counts_follow_their_spots_though_the_files_order_them_differently(tiny):
    adata = load(tiny)
    truth = pd.read_csv(tiny.counts, index_col=0)
    got = pd.DataFrame(adata.X.toarray(), adata.obs_names, adata.var_names)
    pd.testing.assert_frame_equal(got, truth.loc[adata.obs_names].astype(np.float32))


def test_x_is_csr_float32(tiny):
    adata = load(tiny)
    assert sparse.isspmatrix_csr(adata.X) or isinstance(adata.X, sparse.csr_array)
    assert adata.X.dtype == np.float32


def test_spatial_is_x_then_y(tiny):
    adata = load(tiny)
    first = f"{tiny.slide}_2x1"
    assert adata[first].obsm["spatial"].tolist() == [[80.0, 50.0]]


def test_undetermined_and_missing_labels_are_none(tiny):
    label = load(tiny).obs["label"]
    assert label.isna().sum() == 3
    assert "undetermined" not in label.cat.categories


def test_labels_keep_the_order_of_the_study(tiny):
    rewrite(tiny.annotation, lambda t: t.iloc[::-1])
    assert list(load(tiny).obs["label"].cat.categories) == ["Layer 1", "Layer 2", "Layer 3"]


def test_array_coordinates_come_from_the_ids(tiny):
    assert load(tiny).obs.loc[f"{tiny.slide}_3x5", ["array_x", "array_y"]].tolist() == [3, 5]


def test_donor_and_group_come_from_the_study(tiny):
    assert load(tiny).obs[["donor", "group", "study"]].iloc[0].tolist() == ["A", "A", "demo"]


def test_squidpy_draws_the_slide_as_it_is(tiny):
    import matplotlib.pyplot as plt
    import squidpy as sq

    sq.pl.spatial_scatter(load(tiny), color="label")
    assert plt.gcf().axes[0].images
    plt.close("all")


def test_without_image_the_scale_is_known(tiny):
    adata = slides.load(tiny.slide, root=tiny.root, image=False)
    assert adata.uns["spatial"][tiny.slide]["images"] == {}
    assert slides.um_per_px(adata) == pytest.approx(5.0)


def test_ids_are_text_even_when_they_look_like_numbers(tiny):
    for path in (tiny.coord, tiny.counts, tiny.annotation):
        text = path.read_text().replace(f"{tiny.slide}_", "00").replace("x", "")
        path.write_text(text.replace("yais", "yaxis").replace("ais", "axis", 1))
    coord = tiny.coord.read_text().splitlines()
    tiny.coord.write_text("\n".join([",yaxis,xaxis,r", *coord[1:]]) + "\n")
    assert load(tiny).obs_names[0] == "0011"


def test_a_pen_mark_on_the_glass_does_not_hide_the_tissue(tiny):
    picture = np.array(Image.open(tiny.image))
    picture[2:12, 40:380] = (20, 40, 160)
    Image.fromarray(picture).save(tiny.image)
    assert load(tiny).n_obs == 30


def test_a_black_border_does_not_hide_the_tissue(tiny):
    picture = np.array(Image.open(tiny.image))
    picture[:20] = (4, 0, 2)
    Image.fromarray(picture).save(tiny.image)
    assert load(tiny).n_obs == 30


def test_an_image_without_colour_is_loaded_with_a_warning(tiny, caplog):
    Image.open(tiny.image).convert("L").save(tiny.image)
    assert load(tiny).n_obs == 30
    assert "has no colour; spot positions were not checked" in caplog.text


# --------------------------------------------------------------------------- microns


def grid(pitch, n=12, hexagonal=False):
    y, x = np.mgrid[:n, :n].astype(float)
    if hexagonal:
        x, y = x + 0.5 * (y % 2), y * np.sqrt(3) / 2
    return pitch * np.c_[x.ravel(), y.ravel()]


def test_st_scale_is_100_um_a_spot():
    assert slides.estimate_um_per_px(grid(40), "ST", 10.0) == pytest.approx(5.0)


def test_visium_scale_is_100_um_a_pitch_whatever_the_radius():
    xy = grid(137.0, hexagonal=True)
    assert slides.estimate_um_per_px(xy, "Visium", 44.0) == pytest.approx(100 / 137)


def test_visium_hd_scale_is_8_um_a_bin():
    assert slides.estimate_um_per_px(grid(29.0), "VisiumHD") == pytest.approx(8 / 29)


def test_a_radius_that_contradicts_the_pitch_is_logged(caplog):
    slides.estimate_um_per_px(grid(40), "ST", 20.0)
    assert "not a standard ST array" in caplog.text


def test_no_scale_without_spots_or_radius():
    with pytest.raises(DataError, match="too few spots"):
        slides.estimate_um_per_px(grid(40)[:1], "Visium")


def test_no_scale_when_all_spots_coincide():
    with pytest.raises(DataError, match="too few spots"):
        slides.estimate_um_per_px(np.ones((30, 2)), "Visium")


# --------------------------------------------------------------------------- what it refuses


def refuses(tiny, match, file):
    with pytest.raises(DataError, match=match) as caught:
        load(tiny)
    assert tiny.slide in str(caught.value)
    assert file.name in str(caught.value)


@pytest.mark.parametrize("kind", ["image", "coord", "counts"])
def test_missing_file(tiny, kind, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = getattr(tiny, kind)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} of .* is not in .*Fix: ") as caught:
        load(tiny)
    assert tiny.slide in str(caught.value)


def test_swapped_axes_that_leave_the_image(tiny):
    rewrite(tiny.coord, lambda t: t.assign(xaxis=t["xaxis"] + 180).rename(
        columns={"xaxis": "yaxis", "yaxis": "xaxis"}))  # fmt: skip
    refuses(tiny, "outside the image.*swapped", tiny.image)


def test_swapped_axes_that_stay_inside_the_image(tiny):
    picture = np.full((420, 420, 3), 245, np.uint8)
    picture[30:290, 20:140] = (200, 120, 170)
    Image.fromarray(picture).save(tiny.image)
    coord = pd.read_csv(tiny.coord, index_col=0)
    coord["xaxis"] = 30 + (coord["xaxis"] - 40) / 2
    coord.rename(columns={"xaxis": "yaxis", "yaxis": "xaxis"}).to_csv(tiny.coord)
    refuses(tiny, "lie on tissue.*swap x and y", tiny.image)


def test_coordinates_outside_the_image(tiny):
    rewrite(tiny.coord, lambda t: t.assign(xaxis=t["xaxis"] + 400))
    refuses(tiny, "30 of 30 spots lie outside the image of 420 x 300 px", tiny.image)


def test_spots_on_glass(tiny):
    picture = np.full((300, 420, 3), 245, np.uint8)
    picture[:, 300:] = (200, 120, 170)
    Image.fromarray(picture).save(tiny.image)
    refuses(tiny, "0% of the spots lie on tissue", tiny.image)


@pytest.mark.parametrize("column", ["xaxis", "yaxis", "r"])
def test_coordinate_column_missing(tiny, column):
    rewrite(tiny.coord, lambda t: t.drop(columns=column))
    refuses(tiny, f"'{column}'.* missing", tiny.coord)


def test_coordinate_not_a_number(tiny):
    rewrite(tiny.coord, lambda t: t.assign(xaxis=t["xaxis"].where(t["xaxis"] > 50)))
    refuses(tiny, "not a number.* for 6 spots", tiny.coord)


def test_duplicate_spot_ids_in_coordinates(tiny):
    rewrite(tiny.coord, lambda t: pd.concat([t, t.iloc[:1]]))
    refuses(tiny, "duplicate spot id", tiny.coord)


def test_duplicate_spot_ids_in_annotation(tiny):
    rewrite(tiny.annotation, lambda t: pd.concat([t, t.iloc[:1]]))
    refuses(tiny, "duplicate spot id", tiny.annotation)


def test_empty_coordinates(tiny):
    rewrite(tiny.coord, lambda t: t.iloc[:0])
    refuses(tiny, "empty", tiny.coord)


def test_ids_of_another_slide(tiny):
    rewrite(tiny.counts, lambda t: t.set_axis([f"other_{i}" for i in t.index]))
    refuses(tiny, "only 0 spot ids are in both", tiny.counts)


def test_a_few_ids_too_many_are_dropped_with_a_logged_count(tiny, caplog):
    rewrite(tiny.counts, lambda t: t.iloc[3:])
    with caplog.at_level(logging.WARNING):
        adata = load(tiny)
    assert adata.n_obs == 27
    assert "30 spots with coordinates, 27 with counts; the 27 with both are kept" in caplog.text


def test_annotation_of_another_slide(tiny):
    rewrite(tiny.annotation, lambda t: t.set_axis([f"other_{i}" for i in t.index]))
    refuses(tiny, "only 0 of 28 annotated spots are on the slide", tiny.annotation)


def test_annotation_that_is_a_web_page(tiny):
    tiny.annotation.write_text("<!DOCTYPE html>\n<html>\n<p>a, b, c</p>\n</html>")
    refuses(tiny, "not a table|missing", tiny.annotation)


def test_empty_annotation(tiny):
    tiny.annotation.write_text("")
    refuses(tiny, "not a table", tiny.annotation)


@pytest.mark.parametrize("kind", ["coord", "counts"])
def test_table_cut_off_at_the_end_of_a_row(tiny, kind):
    path = getattr(tiny, kind)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:16]))
    refuses(tiny, r"only 15 spot ids are in both .*may be cut off", tiny.counts)


def test_image_that_is_a_web_page(tiny):
    tiny.image.write_text("<!DOCTYPE html><html><body>404</body></html>")
    refuses(tiny, "web page", tiny.image)


def test_truncated_image(tiny):
    tiny.image.write_bytes(tiny.image.read_bytes()[:2000])
    refuses(tiny, "cut off|truncated|damaged|incomplete", tiny.image)


def test_negative_counts(tiny):
    rewrite(tiny.counts, lambda t: t - 5)
    refuses(tiny, "negative", tiny.counts)


def test_several_slides_need_a_name(tiny):
    adata = load(tiny)
    adata.uns["spatial"]["second"] = {}
    with pytest.raises(DataError, match="holds 2 slides"):
        slides.um_per_px(adata)


# --------------------------------------------------------------------------- your own slides


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
    with pytest.raises(DataError, match=r"slide mine.* is not a valid scale"):
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


# --------------------------------------------------------------------------- the table of spots


def as_slide(slide: str, table: pd.DataFrame) -> ad.AnnData:
    table = table[table["slide"] == slide]
    adata = ad.AnnData(np.zeros((len(table), 1)), obs=table.drop(columns=["x_px", "y_px"]))
    adata.obsm["spatial"] = table[["x_px", "y_px"]].to_numpy()
    adata.uns["spatial"] = {slide: {"um_per_px": UM_PER_PX}}
    return adata


def test_a_table_and_slides_tell_the_same():
    table = spots()
    adatas = {slide: as_slide(slide, table) for slide in SLIDES}
    expected = slides.spot_table(table, SCALES)
    for other in (
        slides.spot_table(adatas),
        slides.spot_table(table, adatas),
        slides.spot_table(expected),
    ):
        pd.testing.assert_frame_equal(other, expected, check_dtype=False)
    one = slides.spot_table(adatas["B1"])
    pd.testing.assert_frame_equal(one, expected[expected["slide"] == "B1"], check_dtype=False)


def test_microns_are_px_times_the_scale_of_the_slide():
    scales = {slide: float(i + 1) for i, slide in enumerate(SLIDES)}
    table = slides.spot_table(spots(), scales)
    factor = table["slide"].map(scales)
    np.testing.assert_allclose(table["y_um"], table["y_px"] * factor)
    np.testing.assert_allclose(table["x_um"], table["x_px"] * factor)


def test_a_slide_without_labels_may_come():
    adata = as_slide("A1", spots())
    del adata.obs["label"]
    assert slides.spot_table(adata)["label"].isna().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="donor"), r"lacks \['donor'\]"),
        (lambda t: t.drop(columns="x_px"), r"lacks \['x_px'\]"),
        (lambda t: t.assign(donor=[None, *t["donor"][1:]]), "spot A1_0x0 has no donor"),
        (lambda t: t.assign(donor=["Z", *t["donor"][1:]]), "slide A1.*more than one donor"),
        (
            lambda t: t.assign(x_px=[np.nan, *t["x_px"][1:]]),
            "slide A1: spot A1_0x0 has no coordinates",
        ),
        (lambda t: pd.concat([t, t.iloc[:1]]), "duplicate spot id A1_0x0"),
        (lambda t: t.iloc[:0], "no spots"),
    ],
)
def test_a_broken_table_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        slides.spot_table(change(spots()))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"A1": 2.0}, "slide A2: no um per px is known"),
        ({**SCALES, "B1": 0.0}, "slide B1: 0.0 um per px is not a valid scale"),
    ],
)
def test_a_scale_that_is_missing_or_zero_is_refused(scales, message):
    with pytest.raises(DataError, match=message):
        slides.spot_table(spots(), scales)


# --------------------------------------------------------------------------- real slides


@pytest.mark.parametrize(
    ("study", "scales"),
    [("mob", [2.76] * 4), ("her2st", [3.19, 3.19, 0.69, 0.69, 0.69, 0.69])],
)
def test_real_slides_have_the_known_scale(real_root, study, scales):
    loaded = slides.load_study(study, root=real_root)
    got = [slides.um_per_px(a) for a in loaded.values()]
    np.testing.assert_allclose(got, scales, rtol=0.01)


def test_real_spots_lie_on_tissue_and_less_so_when_swapped(real_root):
    for slide, adata in slides.load_study("mob", root=real_root).items():
        known = adata.uns["spatial"][slide]
        mask = slides.tissue_mask(known["images"]["hires"])
        xy = adata.obsm["spatial"] * known["scalefactors"]["tissue_hires_scalef"]
        assert slides._share_on(mask, xy) > slides._share_on(mask, xy[:, ::-1]) + 0.1


def test_olfactory_bulb_has_its_five_layers(real_root):
    for adata in slides.load_study("mob", root=real_root, image=False).values():
        assert list(adata.obs["label"].cat.categories) == list(catalog.study("mob").labels)
