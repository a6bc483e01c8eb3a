"""images: pixels by their bytes, equal to Pillow's, and a clear word for every bad file."""

import contextlib
import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import images
from helpers.files import DataError

SLIDE = "Some_Slide_1"


def picture(height=60, width=90, channels=3, seed=0):
    """A smooth coloured picture with some noise (JPEG likes it, and every pixel differs)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c)) * np.cos(y / (7 + c)) * 100 + 128 for c in range(channels)]
    noisy = np.stack(waves, -1) + rng.normal(0, 8, (height, width, channels))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def put(tmp_path):
    """Write bytes (or a Pillow image) under the official name and return the path."""

    def write(data, kind=None, **options):
        path = tmp_path / f"{SLIDE}.png"
        path.write_bytes(data if kind is None else encoded(data, kind, **options))
        return path

    return write


# --------------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_format_comes_from_the_bytes_though_all_are_named_png(put, kind):
    path = put(Image.fromarray(picture()), kind)
    assert images.info(path) == images.ImageInfo(kind, 90, 60)
    assert np.array_equal(images.read(path), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90, "subsampling": "4:4:4"},
        {"quality": 60, "subsampling": "4:2:0"},
        {"quality": 80, "subsampling": "4:2:2"},
        {"progressive": True},
        {"keep_rgb": True},
    ],
    ids=str,
)
def test_jpeg_equals_pillow_to_the_bit(put, options):
    path = put(Image.fromarray(picture(301, 203)), "JPEG", **options)
    assert np.array_equal(images.read(path), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "L"), ("JPEG", "L"), ("TIFF", "L"), ("PNG", "P"), ("PNG", "1")]
)
def test_grey_and_palette_become_rgb_as_in_pillow(put, kind, mode):
    path = put(Image.fromarray(picture()).convert(mode), kind)
    assert np.array_equal(images.read(path), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("TIFF", "RGBA")])
def test_transparent_pixels_become_white(put, kind, mode):
    image = Image.fromarray(picture(channels=4)).convert(mode)
    alpha = np.full((60, 90), 255, np.uint8)
    alpha[:30] = 0
    image.putalpha(Image.fromarray(alpha))
    pixels = images.read(put(image, kind))
    assert (pixels[:30] == 255).all()
    assert np.array_equal(pixels[30:], np.asarray(image.convert("RGB"))[30:])


def test_half_transparent_black_becomes_middle_grey(put):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.abs(images.read(put(image, "PNG")).astype(int) - 127).max() <= 1


def test_transparent_palette_entry_becomes_white(put):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    pixels = images.read(put(image, "PNG", transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [40, 50, 60]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(put, kind):
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    pixels = images.read(put(Image.fromarray(values), kind))
    assert pixels[..., 0].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_sixteen_bit_colour_tiff_keeps_its_upper_eight(tmp_path):
    path = tmp_path / "a.png"
    tifffile.imwrite(path, picture().astype(np.uint16) * 257, photometric="rgb")
    assert np.array_equal(images.read(path), picture())


def test_floating_point_tiff_is_refused(tmp_path):
    path = tmp_path / "a.png"
    tifffile.imwrite(path, np.zeros((8, 8), np.float32))
    with pytest.raises(DataError, match=r"unsupported.*float32.*Fix: save it as RGB"):
        images.read(path)


def test_tiff_of_five_channels_is_refused_as_no_picture(tmp_path):
    path = tmp_path / "a.png"
    tifffile.imwrite(path, picture(channels=5), photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match=r"unsupported kind of image \(5 channel"):
        images.read(path)


@pytest.mark.parametrize(
    ("kind", "mode"), [("TIFF", "P"), ("TIFF", "1"), ("TIFF", "CMYK"), ("JPEG", "CMYK")]
)
def test_palettes_and_inks_are_refused(put, kind, mode):
    with pytest.raises(DataError, match=r"unsupported.*Fix: save it as RGB"):
        images.read(put(Image.fromarray(picture()).convert(mode), kind))


def test_exif_orientation_is_not_applied_because_coordinates_count_stored_pixels(put):
    image = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by a quarter when showing"
    path = put(image, "JPEG", exif=exif, quality=95)
    assert images.read(path).shape == (60, 90, 3)
    assert (images.info(path).width, images.info(path).height) == (90, 60)


# --------------------------------------------------------------------------- smaller, and by region


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("max_side", [1, 33, 100, 250])
def test_max_side_bounds_the_longer_side_and_keeps_the_shape(put, kind, max_side):
    path = put(Image.fromarray(picture(240, 400)), kind)
    height, width = images.read(path, max_side=max_side).shape[:2]
    assert width == max_side
    assert height == max(1, round(240 * max_side / 400))


@pytest.mark.parametrize("max_side", [0, -5, 0.5, np.nan])
def test_max_side_below_one_is_refused(put, max_side):
    with pytest.raises(DataError, match=f"slide {SLIDE}.*cannot be shrunk to"):
        images.read(put(Image.fromarray(picture()), "PNG"), max_side=max_side, slide=SLIDE)


def test_max_side_never_enlarges(put):
    assert images.read(put(Image.fromarray(picture()), "JPEG"), max_side=1000).shape == (60, 90, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_shrunk_image_looks_like_pillows(put, kind):
    image = Image.fromarray(picture(600, 900)).resize((900, 600), Image.Resampling.BOX)
    path = put(image, kind)
    ours = images.read(path, max_side=150).astype(int)
    theirs = np.asarray(
        Image.open(path).convert("RGB").resize((150, 100), Image.Resampling.BICUBIC)
    )
    assert np.abs(ours - theirs).mean() < 4


@pytest.mark.parametrize("tile", [None, (32, 48)], ids=["strips", "tiles"])
@pytest.mark.parametrize("compression", [None, "deflate", "lzw"])
def test_tiff_region_equals_the_slice(tmp_path, tile, compression):
    path, pixels = tmp_path / "a.png", picture(131, 177)
    tifffile.imwrite(path, pixels, tile=tile, compression=compression, photometric="rgb")
    assert np.array_equal(images.read_region(path, (17, 30, 150, 131)), pixels[30:131, 17:150])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_region_of_other_formats_equals_the_slice(put, kind):
    path = put(Image.fromarray(picture()), kind)
    assert np.array_equal(images.read_region(path, (5, 6, 50, 60)), images.read(path)[6:60, 5:50])


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 91, 5), (5, 5, 5, 9), (0, 9, 5, 3)], ids=str)
def test_region_outside_the_image_is_refused(put, box):
    with pytest.raises(DataError, match=f"slide {SLIDE}.*not inside the image of 90 x 60"):
        images.read_region(put(Image.fromarray(picture()), "PNG"), box, slide=SLIDE)


def test_tiff_shrinks_from_its_pyramid(tmp_path):
    path = tmp_path / "a.png"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            np.full((512, 512, 3), 10, np.uint8), photometric="rgb", tile=(64, 64), subifds=1
        )
        tiff.write(
            np.full((256, 256, 3), 200, np.uint8), photometric="rgb", tile=(64, 64), subfiletype=1
        )
    assert images.read(path, max_side=200).mean() == 200  # the level was marked by its colour
    assert images.read(path, max_side=400).mean() == 10


# --------------------------------------------------------------------------- the limit


def bomb(width, height):
    """A valid PNG header that claims a size, with nothing behind it."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"")
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (ihdr, idat)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_decompression_bomb_is_refused_before_decoding(put):
    path = put(bomb(60_000, 60_000))
    with pytest.raises(DataError, match=rf"slide {SLIDE}.*3,600,000,000 pixels.*limit.*Fix:"):
        images.read(path, slide=SLIDE)


def test_advice_for_a_large_png_is_not_to_shrink_it_which_decodes_it_whole(put):
    with pytest.raises(DataError, match="Fix: save the image as a tiled TIFF") as refused:
        images.read(put(bomb(60_000, 60_000)), max_side=100)
    assert "max_side" not in str(refused.value)


def test_header_of_a_bomb_can_be_read(put):
    assert images.info(put(bomb(60_000, 60_000))).width == 60_000


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_limit_holds_for_every_format(put, monkeypatch, kind):
    monkeypatch.setattr(images, "MAX_PIXELS", 60 * 90 - 1)
    with pytest.raises(DataError, match="more than the limit"):
        images.read(put(Image.fromarray(picture()), kind))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_image_above_the_limit_can_be_shrunk_while_decoding(put, monkeypatch, kind):
    monkeypatch.setattr(images, "MAX_PIXELS", 600 * 900 // 4)
    assert images.read(put(Image.fromarray(picture(600, 900)), kind), max_side=100).shape[1] == 100


def test_progressive_jpeg_above_the_limit_is_refused_even_shrunk(put, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 600 * 900 // 4)
    path = put(Image.fromarray(picture(600, 900)), "JPEG", progressive=True)
    with pytest.raises(DataError, match="more than the limit"):
        images.read(path, max_side=100)


def test_tiff_above_the_limit_can_be_read_by_region(put, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    assert (
        images.read_region(put(Image.fromarray(picture()), "TIFF"), (0, 0, 20, 20)).shape[0] == 20
    )


def test_pillows_own_limit_is_neither_used_nor_changed(put, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = put(Image.fromarray(picture()), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.read(path).shape == (60, 90, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_threads_read_the_same(put):
    path = put(Image.fromarray(picture(300, 300)), "JPEG")
    expected, seen = images.read(path), []
    threads = [threading.Thread(target=lambda: seen.append(images.read(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert all(np.array_equal(expected, pixels) for pixels in seen)


# --------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_truncated_image_is_refused(put, kind, share):
    options = {"compression": "tiff_deflate"} if kind == "TIFF" else {}
    data = encoded(Image.fromarray(picture(300, 300)), kind, **options)
    path = put(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=rf"slide {SLIDE}, file .*{SLIDE}\.png.*truncated.*Fix:"):
        images.read(path, slide=SLIDE)


@pytest.mark.parametrize("tile", [None, (32, 32)], ids=["strips", "tiles"])
@pytest.mark.parametrize("compression", [None, "jpeg"])
def test_truncated_tiff_is_refused_whole_shrunk_and_by_region(tmp_path, tile, compression):
    path = tmp_path / "a.png"
    tifffile.imwrite(path, picture(300, 300), tile=tile, compression=compression, photometric="rgb")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for use in (
        lambda: images.read(path),
        lambda: images.read(path, max_side=50),
        lambda: images.read_region(path, (200, 200, 300, 300)),
    ):
        with pytest.raises(DataError, match="truncated"):
            use()


def test_truncated_jpeg_is_refused_even_when_shrunk(put):
    data = encoded(Image.fromarray(picture(800, 800)), "JPEG")
    with pytest.raises(DataError, match="truncated"):
        images.read(put(data[: len(data) // 2]), max_side=100)


BAD = {
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "zero bytes": (b"", "is empty"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
    "text": (b"hello", "not a PNG, JPEG or TIFF"),
    "gif": (b"GIF89a" + bytes(20), "not a PNG, JPEG or TIFF"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("function", [images.info, images.read])
def test_what_is_no_image_is_named(put, name, function):
    data, word = BAD[name]
    with pytest.raises(DataError, match=rf"slide {SLIDE}, file .*\.png.*{word}.*Fix:"):
        function(put(data), slide=SLIDE)


def test_missing_image_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"slide {SLIDE}, file .*nowhere\.png: .*missing"):
        images.read(tmp_path / "nowhere.png", slide=SLIDE)


def test_folder_instead_of_an_image_is_refused(tmp_path):
    with pytest.raises(DataError, match="directory"):
        images.read(tmp_path)


def test_jpeg_with_stray_bytes_is_refused_as_they_are_what_damage_looks_like(put):
    data = encoded(Image.fromarray(picture(64, 64)), "JPEG", restart_marker_blocks=1)
    marker = data.index(b"\xff\xd1")
    with pytest.raises(DataError, match=r"damaged.*20 extraneous bytes"):
        images.read(put(data[:marker] + b"\x12" * 20 + data[marker:]))


@pytest.mark.parametrize("max_side", [None, 100])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_jpeg_with_a_hole_is_refused(put, progressive, max_side):
    data = encoded(Image.fromarray(picture(400, 600)), "JPEG", progressive=progressive)
    half = len(data) // 2
    path = put(data[:half] + bytes(2000) + data[half + 2000 :])
    with pytest.raises(DataError, match=f"slide {SLIDE}.*damaged.*Corrupt JPEG data"):
        images.read(path, slide=SLIDE, max_side=max_side)


SEEDS = {
    kind: encoded(Image.fromarray(picture(40, 40)), kind, **options)
    for kind, options in {"PNG": {}, "JPEG": {}, "TIFF": {"compression": "tiff_lzw"}}.items()
}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(SEEDS)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    keep=st.floats(0, 1),
)
def test_damaged_bytes_give_pixels_or_a_data_error_and_nothing_else(tmp_path, kind, edits, keep):
    data = bytearray(SEEDS[kind])
    for place, value in edits:
        data[int(place * (len(data) - 1))] = value
    path = tmp_path / "fuzz.png"
    path.write_bytes(bytes(data[: max(1, int(len(data) * keep))]))
    with contextlib.suppress(DataError):
        pixels = images.read(path)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3


# --------------------------------------------------------------------------- real


@pytest.mark.real
def test_every_real_slide_is_decoded_without_a_complaint(real_root):
    for path in sorted(real_root.glob("*/image/*.png")):
        header = images.info(path)
        assert images.read(path, max_side=500).shape[:2] == tuple(
            round(side * 500 / max(header.width, header.height))
            for side in (header.height, header.width)
        )


@pytest.mark.real
@pytest.mark.parametrize("name", ["*Rep4.png", "*ST_A1.png"], ids=["JPEG", "PNG"])
def test_real_slides_equal_pillow(real_root, name):
    for path in sorted((real_root / "ST/image").glob(name)):
        assert np.array_equal(images.read(path), np.asarray(Image.open(path).convert("RGB")))
