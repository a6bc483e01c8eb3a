"""tiles: cut in microns, in the order of the spots, cached whole and never stale."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from helpers import files, images, tiles
from helpers.files import DataError

SLIDE = "Some_Slide_1"


def picture(height=240, width=320, seed=0):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (2, 2, 0))
    return np.clip(smooth / smooth.std() * 50 + 150, 0, 255).astype(np.uint8)


def make(folder, xy, pixels=None, *, um_per_px=2.0, slide=SLIDE, kind="PNG"):
    """An AnnData as helpers.slides makes it, around an image named .png."""
    path = folder / f"{slide}.png"
    if pixels is not None:
        Image.fromarray(pixels).save(path, kind)
    xy = np.asarray(xy, float)
    names = pd.Index([f"{slide}_{i}x1" for i in range(len(xy))])
    adata = ad.AnnData(np.zeros((len(xy), 1), np.float32), obs=pd.DataFrame(index=names))
    adata.obsm["spatial"] = xy
    adata.uns["spatial"] = {
        slide: {"images": {}, "metadata": {"image_path": str(path)}, "um_per_px": um_per_px}
    }
    return adata


def reference(pixels, x, y, side, size, margin=200, mode="white"):
    """Pillow on an image that was enlarged by hand."""
    pad = ((margin, margin), (margin, margin), (0, 0))
    if mode == "white":
        large = np.pad(pixels, pad, constant_values=255)
    else:
        large = np.pad(pixels, pad, mode="reflect")
    left, top = x + margin - side / 2, y + margin - side / 2
    box = (left, top, left + side, top + side)
    image = Image.fromarray(large)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(int)


# --------------------------------------------------------------------------- pixels


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    x=st.floats(-20, 340),
    y=st.floats(-20, 260),
    side_um=st.floats(81, 300),
    size=st.sampled_from([16, 33, 96]),
    edge=st.sampled_from(["pad", "reflect"]),
)
def test_tile_equals_pillow_within_two_levels_also_over_the_border(
    tmp_path, x, y, side_um, size, edge
):
    pixels = picture()
    adata = make(tmp_path, [(x, y)], pixels)
    tile = tiles.cut(adata, side_um=side_um, size=size, edge=edge, cache=False).array[0]
    expected = reference(pixels, x, y, side_um / 2, size, mode="white" if edge == "pad" else edge)
    assert np.abs(tile - expected).max() <= 2


def test_same_tissue_at_other_resolution_gives_the_same_tile(tmp_path):
    fine = np.asarray(Image.fromarray(picture(200, 200)).resize((920, 920), Image.BICUBIC))
    coarse = np.asarray(Image.fromarray(fine).resize((200, 200), Image.BICUBIC))
    a = make(tmp_path, [(460, 400)], fine, um_per_px=1.0, slide="Fine_1")
    b = make(tmp_path, [(100, 400 / 4.6)], coarse, um_per_px=4.6, slide="Coarse_1")
    both = tiles.cut_study([a, b], side_um=300, size=48)
    assert np.abs(both.array[0].astype(int) - both.array[1]).mean() < 3
    assert both.settings["slides"]["Fine_1"]["side_px"] == 300
    assert both.settings["slides"]["Coarse_1"]["side_px"] == pytest.approx(300 / 4.6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_every_format_is_cut(tmp_path, kind):
    adata = make(tmp_path, [(100, 100)], picture(), kind=kind)
    path = tmp_path / f"{SLIDE}.png"
    expected = reference(np.asarray(Image.open(path)), 100, 100, 50, 32)
    assert np.abs(tiles.cut(adata, size=32).array[0] - expected).max() <= 2


def test_tiff_above_the_limit_is_cut_by_region(tmp_path, monkeypatch):
    adata = make(tmp_path, [(100, 100), (0, 0)])
    path = tmp_path / f"{SLIDE}.png"
    tifffile.imwrite(path, picture(1200, 1600), photometric="rgb", tile=(64, 64))
    whole = tiles.cut(adata, size=32, edge="reflect", cache=False).array
    monkeypatch.setattr(images, "MAX_PIXELS", 400_000)
    by_region = tiles.cut(adata, size=32, edge="reflect", cache=False).array
    assert np.array_equal(whole, by_region)


# --------------------------------------------------------------------------- rows


def test_rows_are_in_the_order_of_the_spots_of_every_slide(tmp_path):
    flat = [np.full((100, 100, 3), 40 * i, np.uint8) for i in (1, 2)]
    for pixels in flat:
        pixels[:, 50:] += 100
    a = make(tmp_path, [(75, 50), (25, 50), (75, 20)], flat[0], slide="A_1")
    b = make(tmp_path, [(25, 50), (75, 50)], flat[1], slide="B_1")
    result = tiles.cut_study({"A_1": a, "B_1": b}, side_um=20, size=8)
    assert result.array[:, 4, 4, 0].tolist() == [140, 40, 140, 80, 180]
    assert list(result.index.index) == [*a.obs_names, *b.obs_names]
    assert result.index["slide"].tolist() == ["A_1"] * 3 + ["B_1"] * 2
    assert result.index["row"].tolist() == [0, 1, 2, 3, 4]
    assert result.index[["x_px", "y_px"]].to_numpy().tolist()[3] == [25, 50]


def test_many_spots_keep_their_order_through_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "_BATCH", 2)
    pixels = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 200, 0).repeat(3, 2)
    x = np.random.default_rng(0).permutation(np.arange(10, 190))
    result = tiles.cut(make(tmp_path, np.c_[x, x], pixels), side_um=2, size=1)
    assert np.abs(result.array[:, 0, 0, 0].astype(int) - x).max() <= 1


def test_array_is_memory_mapped_uint8_and_cannot_be_spoilt(tmp_path):
    result = tiles.cut(make(tmp_path, [(100, 100)], picture()), size=40)
    assert isinstance(result.array, np.memmap)
    assert result.array.shape == (1, 40, 40, 3)
    assert result.array.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        result.array[0] = 0


def test_spot_ids_that_look_like_numbers_or_nothing_stay_text(tmp_path):
    adata = make(tmp_path, [(100, 100), (50, 50), (60, 60)], picture())
    adata.obs_names = ["007", "NA", "1e5"]
    tiles.cut(adata, size=8)
    assert list(tiles.cut(adata, size=8).index.index) == ["007", "NA", "1e5"]


@pytest.mark.parametrize("name", ["a\rb", "a\nb", "a\r\nb", 'a"b', "a,b", " a ", ""], ids=repr)
def test_any_spot_id_comes_back_from_the_cache(tmp_path, name):
    adata = make(tmp_path, [(100, 100), (50, 50)], picture())
    adata.obs_names = [name, "z"]
    assert list(tiles.cut(adata, size=8).index.index) == [name, "z"]


# --------------------------------------------------------------------------- edges


def test_index_says_which_share_of_the_tile_is_inside(tmp_path):
    adata = make(tmp_path, [(160, 120), (0, 120), (0, 0), (10, 120)], picture())
    assert tiles.cut(adata, side_um=80, size=8).index["inside"].tolist() == [1, 0.5, 0.25, 0.75]


def test_padding_is_white_and_reflection_is_tissue(tmp_path):
    adata = make(tmp_path, [(0, 120)], np.full((240, 320, 3), 90, np.uint8))
    assert (tiles.cut(adata, size=10, edge="pad").array[0, :, :4] == 255).all()
    assert (tiles.cut(adata, size=10, edge="reflect").array[0] == 90).all()


def test_drop_leaves_border_spots_out_and_keeps_the_others_order(tmp_path):
    adata = make(tmp_path, [(160, 120), (3, 120), (100, 100)], picture())
    result = tiles.cut(adata, size=8, edge="drop")
    assert list(result.index.index) == [adata.obs_names[0], adata.obs_names[2]]
    assert len(result.array) == 2


def test_error_names_the_first_border_spot(tmp_path):
    adata = make(tmp_path, [(160, 120), (3, 120)], picture())
    with pytest.raises(DataError, match=rf"slide {SLIDE}.*1 of 2 tiles.*{SLIDE}_1x1.*Fix:.*pad"):
        tiles.cut(adata, size=8, edge="error")


@pytest.mark.parametrize("edge", tiles.EDGES)
def test_tile_wholly_outside_is_refused_whatever_the_edge(tmp_path, edge):
    adata = make(tmp_path, [(160, 120), (400, 120)], picture())
    with pytest.raises(DataError, match=rf"slide {SLIDE}, file .*outside the image of 320 x 240"):
        tiles.cut(adata, side_um=50, size=8, edge=edge)


# --------------------------------------------------------------------------- cache


@pytest.fixture
def counted(monkeypatch):
    """Count how often an image is decoded."""
    calls, read = [], images.read
    monkeypatch.setattr(images, "read", lambda *a, **k: calls.append(1) or read(*a, **k))
    return calls


def test_second_call_decodes_nothing_and_gives_the_same(tmp_path, counted):
    adata = make(tmp_path, [(100, 100), (30.25, 60.1234567890123)], picture())
    first, second = tiles.cut(adata, size=24), tiles.cut(adata, size=24)
    assert len(counted) == 1
    assert np.array_equal(first.array, second.array)
    pd.testing.assert_frame_equal(first.index, second.index)
    assert first.settings == second.settings


def test_tiles_cached_under_the_old_name_of_the_background_are_found(tmp_path, counted):
    adata = make(tmp_path, [(100, 100)], picture())
    first = tiles.cut(adata, size=24)
    path = folder_of(first) / "settings.json"
    path.write_text(path.read_text().replace('"background"', '"glass"'))
    assert tiles.cut(adata, size=24).settings == first.settings
    assert len(counted) == 1


def folder_of(cut):
    """The folder of cached tiles."""
    return Path(cut.array.filename).parent


def test_one_decode_per_slide(tmp_path, counted):
    adata = make(tmp_path, [(100, 100)] * 50, picture())
    tiles.cut(adata, size=8)
    assert len(counted) == 1


def test_cached_and_fresh_tiles_agree(tmp_path):
    adata = make(tmp_path, [(100, 100), (2, 2)], picture())
    cached, fresh = tiles.cut(adata, size=24), tiles.cut(adata, size=24, cache=False)
    assert np.array_equal(cached.array, fresh.array)
    pd.testing.assert_frame_equal(cached.index, fresh.index)


def test_nothing_is_written_without_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))
    tiles.cut(make(tmp_path, [(100, 100)], picture()), size=8, cache=False)
    assert not (tmp_path / "cache").exists()


def test_changed_image_is_cut_again(tmp_path):
    adata = make(tmp_path, [(100, 100)], np.full((240, 320, 3), 50, np.uint8))
    tiles.cut(adata, size=8)
    make(tmp_path, [(100, 100)], np.full((240, 320, 3), 60, np.uint8))
    assert (tiles.cut(adata, size=8).array == 60).all()


def test_changed_coordinates_are_cut_again(tmp_path):
    pixels = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 200, 0).repeat(3, 2)
    first = tiles.cut(make(tmp_path, [(100, 100)], pixels), size=9, side_um=20)
    second = tiles.cut(make(tmp_path, [(101, 100)]), size=9, side_um=20)
    assert second.array[0, 4, 4, 0] - first.array[0, 4, 4, 0] == 1


@pytest.mark.parametrize(
    "change", [{"side_um": 50.0}, {"size": 25}, {"edge": "reflect"}], ids=lambda c: next(iter(c))
)
def test_changed_settings_are_cut_again(tmp_path, counted, change):
    adata = make(tmp_path, [(20, 100)], picture())
    base = {"side_um": 100.0, "size": 24, "edge": "pad"}
    tiles.cut(adata, **base)
    result = tiles.cut(adata, **{**base, **change})
    assert len(counted) == 2
    assert {k: result.settings[k] for k in base} == {**base, **change}


def test_changed_scale_is_cut_again(tmp_path, counted):
    adata = make(tmp_path, [(100, 100)], picture())
    tiles.cut(adata, size=8)
    adata.uns["spatial"][SLIDE]["um_per_px"] = 3.0
    tiles.cut(adata, size=8)
    assert len(counted) == 2


def test_changed_spot_ids_are_not_served_the_old_index(tmp_path):
    adata = make(tmp_path, [(100, 100)], picture())
    tiles.cut(adata, size=8)
    adata.obs_names = ["other"]
    assert list(tiles.cut(adata, size=8).index.index) == ["other"]


@pytest.mark.parametrize("name", ["tiles.npy", "index.csv", "settings.json"])
@pytest.mark.parametrize("damage", ["missing", "half"])
def test_damaged_cache_is_cut_again_with_a_warning(tmp_path, caplog, name, damage):
    adata = make(tmp_path, [(100, 100), (50, 50)], picture())
    good = np.array(tiles.cut(adata, size=16).array)
    (file,) = [f for f in (files.cache_dir() / "tiles").rglob(name) if _holds(f, adata)]
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    again = tiles.cut(adata, size=16)
    assert np.array_equal(again.array, good)
    assert "damaged" in caplog.text


def test_empty_array_in_the_cache_is_cut_again(tmp_path, monkeypatch):
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))
    adata = make(tmp_path, [(100, 100)], picture())
    good = np.array(tiles.cut(adata, size=16).array)
    next((tmp_path / "cache").rglob("tiles.npy")).write_bytes(b"")  # EOFError in numpy
    assert np.array_equal(tiles.cut(adata, size=16).array, good)


def test_tiles_lost_right_after_cutting_are_an_error_and_not_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "_load", lambda folder, shape: None)
    with pytest.raises(DataError, match="missing from the cache"):
        tiles.cut(make(tmp_path, [(100, 100)], picture()), size=8)


def _holds(file, adata):
    """Whether a cached folder is the one just written (tests share a cache)."""
    newest = max(file.parent.parent.iterdir(), key=lambda f: f.stat().st_mtime_ns)
    return file.parent == newest


KILLED = """
    import os, signal, sys
    sys.path[:0] = {path!r}
    import test_tiles
    from pathlib import Path
    from helpers import tiles

    adata = test_tiles.make(Path({folder!r}), [(100, 100), (50, 50)], test_tiles.picture())
    # when tiles are in the file, and there is no index yet
    tiles.pd.DataFrame.to_csv = lambda *a, **k: os.kill(os.getpid(), {signal})
    tiles.cut(adata, size=16)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_killed_while_writing_leaves_nothing_to_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))
    program = KILLED.format(path=sys.path, folder=str(tmp_path), signal=int(signal.SIGKILL))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    left = list((tmp_path / "cache/tiles").rglob("tiles.npy"))
    assert len(left) == 1  # half-written, in a temporary folder that is never read
    assert left[0].parent.parent.name.startswith(".")
    adata = make(tmp_path, [(100, 100), (50, 50)])
    result = tiles.cut(adata, size=16)
    assert np.abs(result.array[0] - reference(picture(), 100, 100, 50, 16)).max() <= 2


def test_failure_while_cutting_leaves_the_cache_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))
    data = np.random.default_rng(0).integers(0, 255, (240, 320, 3)).astype(np.uint8)
    adata = make(tmp_path, [(100, 100)], data, kind="JPEG")
    path = tmp_path / f"{SLIDE}.png"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=rf"slide {SLIDE}, file .*truncated"):
        tiles.cut(adata, size=16)
    assert list((tmp_path / "cache/tiles").iterdir()) == []


def test_full_disk_while_writing_is_said_and_leaves_the_cache_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))

    def full(file, header):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left.*STIMAGE_CACHE"):
        tiles.cut(make(tmp_path, [(100, 100)] * 500, picture()), size=16)
    assert list((tmp_path / "cache/tiles").iterdir()) == []


def test_unwritable_cache_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="cache cannot be written"):
        tiles.cut(make(tmp_path, [(100, 100)], picture()), size=8)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change",
    [
        *({"side_um": side} for side in (0, -1, np.nan, np.inf, None, "100")),
        *({"size": size} for size in (0, 96.5, np.nan, np.inf, None, "96")),
        {"edge": "wrap"},
    ],
    ids=str,
)
def test_senseless_settings_are_refused(tmp_path, change):
    with pytest.raises(DataError, match="cannot be cut"):
        tiles.cut(make(tmp_path, [(100, 100)], picture()), **change)


@pytest.mark.parametrize("size", [8.0, np.int64(8), np.float32(8)], ids=repr)
def test_any_whole_number_is_a_size(tmp_path, size):
    adata = make(tmp_path, [(100, 100)], picture())
    assert tiles.cut(adata, size=size).array.shape == (1, 8, 8, 3)


def test_tile_larger_than_the_image_is_refused_before_it_takes_memory(tmp_path):
    with pytest.raises(DataError, match=rf"slide {SLIDE}.*500000000 px wide.*320 x 240"):
        tiles.cut(make(tmp_path, [(100, 100)], picture()), side_um=1e9)


def test_slide_of_the_spots_must_be_that_of_the_image(tmp_path):
    adata = make(tmp_path, [(100, 100)], picture())
    adata.obs["slide"] = "Other_1"
    with pytest.raises(DataError, match=rf"Other_1.*{SLIDE}.*one image per AnnData"):
        tiles.cut(adata)


def test_two_slides_in_one_anndata_are_sent_to_cut_study(tmp_path):
    pair = [make(tmp_path, [(100, 100)], picture(), slide=name) for name in ("A_1", "B_1")]
    both = ad.concat(pair, uns_merge="unique")
    with pytest.raises(DataError, match="Fix: pass cut_study a dict or list of one AnnData per"):
        tiles.cut(both)


def test_slide_without_place_is_refused():
    adata = ad.AnnData(np.zeros((1, 1), np.float32))
    with pytest.raises(
        DataError, match=r"lacks its image, scale or spot positions.*helpers\.slides"
    ):
        tiles.cut(adata)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan])
def test_senseless_scale_is_refused(tmp_path, scale):
    adata = make(tmp_path, [(100, 100)], picture(), um_per_px=scale)
    with pytest.raises(DataError, match=rf"slide {SLIDE}.*um_per_px"):
        tiles.cut(adata)


def test_coordinates_that_are_no_numbers_are_refused(tmp_path):
    with pytest.raises(DataError, match=rf"slide {SLIDE}.*not numbers"):
        tiles.cut(make(tmp_path, [(np.nan, 100)], picture()))


def test_missing_image_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"slide {SLIDE}, file .*{SLIDE}\.png.*missing"):
        tiles.cut(make(tmp_path, [(100, 100)]))


def test_no_spot_is_refused(tmp_path):
    with pytest.raises(DataError, match="no spot"):
        tiles.cut(make(tmp_path, np.empty((0, 2)), picture()))


def test_spot_ids_that_repeat_over_slides_are_refused(tmp_path):
    adata = make(tmp_path, [(100, 100)], picture())
    with pytest.raises(DataError, match="duplicate spot id"):
        tiles.cut_study([adata, adata.copy()])


# --------------------------------------------------------------------------- quality


def test_focus_is_the_variance_of_the_laplacian():
    array = np.stack([picture(40, 50, seed) for seed in range(3)])
    grey = array @ np.array([0.299, 0.587, 0.114])
    expected = [ndimage.laplace(g)[1:-1, 1:-1].var() for g in grey]
    assert tiles.focus(array) == pytest.approx(expected, rel=1e-6)


def test_blur_lowers_focus():
    sharp = picture(60, 60)
    blurred = ndimage.gaussian_filter(sharp, (2, 2, 0))
    values = tiles.focus(np.stack([sharp, blurred]))
    assert values[1] < values[0] / 2


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 2, 2, 3), (0, 8, 8, 3)])
def test_focus_of_uniform_tiny_or_no_tiles_is_zero(shape):
    assert tiles.focus(np.full(shape, 7, np.uint8)).tolist() == [0] * shape[0]


def test_tissue_is_what_is_darker_than_the_background():
    array = np.full((3, 10, 10, 3), 255, np.uint8)
    array[1, :, :5] = (200, 120, 170)
    array[2] = (200, 120, 170)
    assert tiles.tissue_fraction(array).tolist() == [0, 0.5, 1]


def test_tissue_follows_optical_density_against_the_background_given():
    rng = np.random.default_rng(0)
    array = rng.integers(1, 256, (5, 20, 20, 3)).astype(np.uint8)
    background = np.array([220.0, 208.0, 223.0])
    density = -np.log10(array / background).mean(-1)
    expected = (density > tiles.TISSUE_OD).mean((1, 2))
    assert tiles.tissue_fraction(array, background) == pytest.approx(expected, abs=0.003)


def test_a_lilac_background_is_not_taken_for_tissue_when_cutting(tmp_path):
    pixels = np.full((240, 320, 3), (220, 208, 223), np.uint8)
    pixels[80:160, 100:200] = (150, 120, 170)
    adata = make(tmp_path, [(40, 40), (150, 120)], pixels)
    assert tiles.cut(adata, side_um=60, size=16).index["tissue"].tolist() == [0, 1]


def test_white_painted_around_the_tissue_is_not_taken_for_its_background(tmp_path):
    pixels = np.full((240, 320, 3), 255, np.uint8)
    pixels[20:200, 20:300] = (225, 210, 228)  # background that the mask left
    pixels[80:160, 100:200] = (150, 120, 170)
    adata = make(tmp_path, [(60, 60), (150, 120)], pixels)
    assert tiles.cut(adata, side_um=60, size=16).index["tissue"].tolist() == [0, 1]


def test_background_of_a_white_slide_is_white(tmp_path):
    pixels = np.full((240, 320, 3), 255, np.uint8)
    result = tiles.cut(make(tmp_path, [(60, 60)], pixels), size=16)
    assert result.settings["slides"][SLIDE]["background"] == [255, 255, 255]
    assert result.index["tissue"].tolist() == [0]


def test_index_agrees_with_the_measures_of_the_array(tmp_path):
    result = tiles.cut(make(tmp_path, [(100, 100), (200, 90)], picture()), size=32)
    background = result.settings["slides"][SLIDE]["background"]
    assert result.index["focus"].tolist() == tiles.focus(result.array).tolist()
    assert (
        result.index["tissue"].tolist() == tiles.tissue_fraction(result.array, background).tolist()
    )


# --------------------------------------------------------------------------- resampling


def pillow(picture, box, size):
    """The reference: Pillow's resampling of a box with fractional corners."""
    image = Image.fromarray(picture)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def ours(picture, x, y, side, size):
    first_x, weights_x = tiles.taps(x, side, size)
    first_y, weights_y = tiles.taps(y, side, size)
    x0, y0 = int(first_x[0]), int(first_y[0])
    x1 = int(first_x[-1]) + weights_x.shape[1]
    y1 = int(first_y[-1]) + weights_y.shape[1]
    assert 0 <= x0 < x1 <= picture.shape[1]
    assert 0 <= y0 < y1 <= picture.shape[0]
    out = np.empty((size, size, 3), np.uint8)
    tiles.resample(picture[y0:y1, x0:x1], first_x - x0, weights_x, first_y - y0, weights_y, out)
    return out


NOISE = np.random.default_rng(0).integers(0, 256, (700, 700, 3)).astype(np.uint8)


@settings(deadline=None, max_examples=60)
@given(
    x=st.floats(200, 300),
    y=st.floats(200, 300),
    side=st.floats(1.5, 200),
    size=st.integers(1, 256),
)
def test_within_two_grey_levels_of_pillow_on_the_hardest_picture(x, y, side, size):
    # Noise from 0 to 255 overshoots at every px; tissue is far smoother.
    if side / size > 40:
        return  # the kernel would reach beyond the picture
    result = ours(NOISE, x, y, side, size).astype(int)
    reference = pillow(NOISE, (x, y, x + side, y + side), size)
    assert np.abs(result - reference).max() <= 2


def test_nearly_every_pixel_is_pillows_exactly():
    reference = pillow(NOISE, (210.25, 220.75, 330.25, 340.75), 224)
    assert (ours(NOISE, 210.25, 220.75, 120.0, 224) == reference).mean() > 0.999


def test_whole_pixels_at_full_size_come_back_unchanged():
    assert np.array_equal(ours(NOISE, 100, 50, 96, 96), NOISE[50:146, 100:196])


def test_shrinking_a_checkerboard_gives_grey_and_no_moire():
    board = np.indices((400, 400)).sum(0) % 2 * 255
    board = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    small = ours(board, 100, 100, 203.7, 50)
    assert np.abs(small.astype(int) - 127).max() <= 4


def test_a_shift_of_half_a_pixel_is_seen():
    ramp = np.repeat(np.arange(0, 250, 10, dtype=np.uint8)[None, :, None], 25, 0)
    ramp = np.ascontiguousarray(np.repeat(ramp, 3, 2))
    whole, half = ours(ramp, 8, 8, 8, 8), ours(ramp, 8.5, 8, 8, 8)
    assert (half.astype(int) - whole == 5).all()


@pytest.mark.parametrize("side", [3.3, 96.0, 500.5])
def test_weights_sum_to_one(side):
    first, weights = tiles.taps(12.34, side, 96)
    assert np.allclose(weights.sum(1), 1, atol=1e-6)
    assert (np.diff(first) >= 0).all()


# --------------------------------------------------------------------------- by spot


def test_tiles_of_spots_are_in_the_order_of_the_table(tmp_path):
    cut = tiles.cut(make(tmp_path, [(100, 100), (50, 50), (200, 90)], picture()), size=8)
    spots = cut.index.iloc[[2, 0]]
    assert np.array_equal(tiles.of_spots(cut, spots), cut.array[[2, 0]])


def test_a_spot_without_a_tile_is_named(tmp_path):
    cut = tiles.cut(make(tmp_path, [(100, 100), (50, 50)], picture()), size=8)
    spots = cut.index.rename(index={f"{SLIDE}_1x1": "lost"})
    with pytest.raises(DataError, match=rf"slide {SLIDE}: spot lost has no tile"):
        tiles.of_spots(cut, spots)


# --------------------------------------------------------------------------- real


@pytest.mark.real
@pytest.mark.parametrize(
    ("slide", "r"),
    [
        ("Mouse_OlfactoryBulb_Stahl_07012016_ST_Rep4", 18.156),
        ("Human_Breast_Andersson_10142021_ST_C2", 72.66),
    ],
)
def test_real_tiles_equal_pillow_within_two_levels(real_root, slide, r, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    table = pd.read_csv(real_root / f"ST/coord/{slide}_coord.csv", index_col=0).iloc[::20]
    path = real_root / f"ST/image/{slide}.png"
    adata = make(real_root, table[["xaxis", "yaxis"]], um_per_px=50 / r, slide=slide)
    adata.uns["spatial"][slide]["metadata"]["image_path"] = str(path)
    result = tiles.cut(adata, size=224, cache=False)
    pixels = images.read(path)
    for tile, (x, y) in zip(result.array, adata.obsm["spatial"], strict=True):
        left, top = int(x - 2 * r), int(y - 2 * r)
        part = pixels[top : int(y + 2 * r), left : int(x + 2 * r)]
        expected = reference(part, x - left, y - top, 2 * r, 224, margin=0)
        assert np.abs(tile - expected).max() <= 2
