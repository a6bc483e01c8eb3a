"""One slide from disk to AnnData: what it holds, and what it refuses."""

import logging

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

from helpers import catalog, slides
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
    assert "has no colour" in caplog.text


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


def test_visium_hd_scale_follows_the_bin():
    assert slides.estimate_um_per_px(grid(29.0), "VisiumHD", bin_um=16) == pytest.approx(16 / 29)


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
    refuses(tiny, "6 spots have no number", tiny.coord)


def test_duplicate_spot_ids_in_coordinates(tiny):
    rewrite(tiny.coord, lambda t: pd.concat([t, t.iloc[:1]]))
    refuses(tiny, "stands twice", tiny.coord)


def test_duplicate_spot_ids_in_annotation(tiny):
    rewrite(tiny.annotation, lambda t: pd.concat([t, t.iloc[:1]]))
    refuses(tiny, "stands twice", tiny.annotation)


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
