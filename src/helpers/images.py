"""Read images as RGB pixels; the format is told by the file's bytes, not by its name.

In STimage-1K4M every image is called ``.png``, and is a PNG, a JPEG or a TIFF.

- Result: uint8 RGB, ``(height, width, 3)``. Transparency is laid over white, the colour of an empty
  slide. Palette and grey images are converted. Of 16 bits the upper 8 are kept.
- Coordinates in the dataset refer to stored pixels, so an EXIF orientation is *not* applied:
  rotating the image would move the tissue away from its spots.
- At most `MAX_PIXELS` pixels are decoded at once (1 gigapixel, 3 GB), because a file of a few
  kilobytes can claim any size (a decompression bomb). Pillow's limit is a global variable that a
  library should not change, so its format classes are used directly.
- Larger images: `read` with `max_side` shrinks a JPEG while decoding it (by up to 8) and a TIFF in
  bands, and `read_region` decodes only the tiles of a TIFF that it needs. A PNG or a progressive
  JPEG must be decoded whole.

simplejpeg decodes JPEGs with libjpeg-turbo at its accurate setting and reports missing or damaged
data (imagecodecs, equally fast, returns grey instead). The pixels are identical to Pillow's.
"""

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from helpers.files import DataError, mistaken_for

MAX_PIXELS = 1_000_000_000
"""Largest number of pixels decoded at once; as RGB they take 3 GB."""

_FETCH = "fetch the file again"
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
}
_CLASSES = {"PNG": PngImagePlugin.PngImageFile, "JPEG": JpegImagePlugin.JpegImageFile}


@dataclass(frozen=True)
class ImageInfo:
    """Format of an image, and its stored width and height in px."""

    format: str
    width: int
    height: int


def info(path: Path | str, *, slide: str | None = None) -> ImageInfo:
    """Read the header of an image, not its pixels.

    Raises
    ------
    DataError
        When the file is missing, empty, a web page, a git-lfs pointer, or not a PNG, JPEG or TIFF.
    """
    path = Path(path)
    kind = _format(path, slide)
    with _decoding(path, slide):
        if kind == "TIFF":
            with _tiff(path) as tiff:
                page = tiff.pages.first
                return ImageInfo(kind, page.imagewidth, page.imagelength)
        with path.open("rb") as file, _CLASSES[kind](file) as image:
            return ImageInfo(kind, *image.size)


def read(path: Path | str, *, max_side: int | None = None, slide: str | None = None) -> np.ndarray:
    """Read an image as RGB.

    Parameters
    ----------
    path
        A PNG, JPEG or TIFF under any name. Of a TIFF with several pages, the first is read.
    max_side
        Shrink the image, keeping its aspect ratio, so that its longer side has at most this many
        px. It is never enlarged.
    slide
        Slide name for messages.

    Returns
    -------
    uint8 array ``(height, width, 3)``, writable.

    Raises
    ------
    DataError
        When the file is not a readable image, is truncated or damaged, has pixels that cannot be
        shown as RGB (floating point, five channels), or is larger than `MAX_PIXELS`.
    """
    path = Path(path)
    if max_side is not None and not max_side >= 1:
        what = f"an image cannot be shrunk to {max_side} px"
        raise DataError(what, slide=slide, file=path, fix="give a max_side of 1 or more")
    header = info(path, slide=slide)
    factor = 1.0 if max_side is None else max(1.0, max(header.width, header.height) / max_side)
    reader = {"JPEG": _read_jpeg, "PNG": _read_png, "TIFF": _read_tiff}[header.format]
    with _decoding(path, slide):
        pixels = reader(path, header, factor)
        if factor > 1:
            size = max(1, round(header.width / factor)), max(1, round(header.height / factor))
            pixels = _shrink(pixels, size)
        return pixels


def read_region(
    path: Path | str, box: tuple[int, int, int, int], *, slide: str | None = None
) -> np.ndarray:
    """Read a rectangle of an image as RGB.

    Of a TIFF, only the tiles or strips under the rectangle are decoded. A PNG or JPEG is decoded
    whole (within `MAX_PIXELS`), so for several regions of one it is faster to `read` and slice.

    Parameters
    ----------
    path
        A PNG, JPEG or TIFF under any name.
    box
        ``(x0, y0, x1, y1)`` in stored px, x1 and y1 excluded, inside the image.
    slide
        Slide name for messages.

    Returns
    -------
    uint8 array ``(y1 - y0, x1 - x0, 3)``.
    """
    path = Path(path)
    header = info(path, slide=slide)
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= header.width and 0 <= y0 < y1 <= header.height):
        raise DataError(
            f"the region {tuple(box)} is not inside the image of {header.width} x {header.height}"
            " px",
            slide=slide,
            file=path,
            fix="crop the region to the image first",
        )
    if header.format != "TIFF":
        return read(path, slide=slide)[y0:y1, x0:x1]
    with _decoding(path, slide), _tiff(path) as tiff:
        _check_size((x1 - x0) * (y1 - y0))
        return _to_rgb8(np.asarray(_lazy(_checked(tiff.pages.first))[y0:y1, x0:x1]))


# --------------------------------------------------------------------------- checks and errors


def _format(path: Path, slide: str | None) -> str:
    """Return ``"PNG"``, ``"JPEG"`` or ``"TIFF"``."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        what = "the image is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(what, slide=slide, file=path, fix="check the path") from error
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return kind
    wrong = mistaken_for(head) or f"is not a PNG, JPEG or TIFF (it begins with {head[:8]!r})"
    what = f"the image {wrong}"
    raise DataError(what, slide=slide, file=path, fix=f"{_FETCH}, or save it as TIFF")


class _TooLargeError(Exception):
    """Decoding would take more than `MAX_PIXELS` pixels."""


def _check_size(pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise _TooLargeError(f"{pixels:,} pixels are more than the limit of {MAX_PIXELS:,}")


@contextlib.contextmanager
def _decoding(path: Path, slide: str | None) -> Iterator[None]:
    """Turn the exceptions of all decoders into one error that names slide and file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except _TooLargeError as error:
        what, fix = str(error), "save the image as a tiled TIFF, which is read by region"
        raise DataError(what, slide=slide, file=path, fix=fix) from error
    except NotImplementedError as error:
        what, fix = f"unsupported kind of image ({error})", "save it as RGB with 8 bits per channel"
        raise DataError(what, slide=slide, file=path, fix=fix) from error
    except Exception as error:
        what = f"the image is truncated or damaged ({error or type(error).__name__})"
        raise DataError(what, slide=slide, file=path, fix=_FETCH) from error


# --------------------------------------------------------------------------- one reader per format


def _read_jpeg(path: Path, header: ImageInfo, factor: float) -> np.ndarray:
    """Decode a JPEG, shrunk by `factor` or a little less."""
    import simplejpeg

    data = path.read_bytes()
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        progressive = "progressive" in image.info
        if image.mode not in ("RGB", "L"):
            raise NotImplementedError(f"{image.mode} JPEG")
    smallest = {
        "min_width": math.ceil(header.width / factor),
        "min_height": math.ceil(header.height / factor),
    }
    height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False, **smallest)
    # All coefficients of a progressive JPEG are in memory, however small the result.
    _check_size(header.width * header.height if progressive else width * height)
    # Strict: every warning of the decoder is an error. Stray bytes before a marker may be harmless,
    # but damage looks the same, and no slide of the book has them.
    return simplejpeg.decode_jpeg(data, "RGB", strict=True, **smallest)


def _read_png(path: Path, header: ImageInfo, factor: float) -> np.ndarray:
    """Decode a PNG whole; plain RGB without Pillow, which needs three times the memory."""
    import imagecodecs

    _check_size(header.width * header.height)
    with path.open("rb") as file, PngImagePlugin.PngImageFile(file) as image:
        if image.mode == image.tile[0].args == "RGB" and not image.has_transparency_data:
            return imagecodecs.png_decode(path.read_bytes())
        image.load()
        if image.mode.startswith("I"):  # 16 bits
            return _to_rgb8(np.asarray(image))
        return _to_rgb8(np.array(image.convert("RGBA" if image.has_transparency_data else "RGB")))


def _read_tiff(path: Path, header: ImageInfo, factor: float) -> np.ndarray:
    """Decode the first image of a TIFF; when shrinking, from the best level of its pyramid."""
    with _tiff(path) as tiff:
        page = _checked(tiff.pages.first)
        if factor == 1:
            _check_size(header.width * header.height)
            return _to_rgb8(page.asarray())
        levels = [level.keyframe for level in tiff.series[0].levels]
        if levels[0].index == page.index:
            fits = [p for p in levels if p.imagewidth * factor >= header.width]
            page = _checked(min(fits, key=lambda p: p.imagewidth))
        step = max(1, int(page.imagewidth * factor / header.width))
        _check_size(page.imagewidth * page.imagelength // step**2)
        return _reduce(_lazy(page), step)


def _tiff(path: Path):
    import tifffile  # takes a moment, and most slides are not TIFFs

    return tifffile.TiffFile(path)


def _checked(page):
    """Return a TIFF page; refuse one that is not plain RGB(A) or grey, or lacks pixels.

    Decoders fill missing pixels with zeros.
    """
    samples, bits, colour = page.samplesperpixel, page.bitspersample, page.photometric.name
    rgb = colour in ("RGB", "MINISBLACK") or (colour, page.compression.name) == ("YCBCR", "JPEG")
    plain = page.axes in ("YXS", "YX") and samples in (1, 3, 4) and rgb
    if not plain or page.dtype not in (np.uint8, np.uint16) or bits not in (8, 16):
        kind = f"{samples} channel(s) of {bits}-bit {page.dtype}, {colour}, axes {page.axes}"
        raise NotImplementedError(kind)
    ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
    if max(ends, default=0) > page.parent.filehandle.size:
        raise ValueError("the file ends before the pixels do")
    return page


def _lazy(page):
    """Return the pixels of a TIFF page as an array that decodes what is sliced from it."""
    import zarr

    return zarr.open(page.aszarr(), mode="r")


# --------------------------------------------------------------------------- pixels


def _to_rgb8(pixels: np.ndarray) -> np.ndarray:
    """Turn grey, RGB or RGBA with 8 or 16 bits into RGB with 8; transparency over white."""
    if pixels.dtype != np.uint8:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.shape[2] == 4:
        over = Image.new("RGB", pixels.shape[1::-1], "white")
        over.paste(Image.fromarray(pixels[:, :, :3]), mask=Image.fromarray(pixels[:, :, 3]))
        return np.array(over)
    return pixels


def _reduce(pixels: np.ndarray, step: int) -> np.ndarray:
    """Average blocks of ``step x step`` px, one band of rows at a time."""
    band = max(1, 1024 // step) * step
    parts = []
    for y in range(0, pixels.shape[0], band):
        rows = _to_rgb8(np.asarray(pixels[y : y + band]))
        parts.append(np.asarray(Image.fromarray(rows).reduce(step)))
    return np.concatenate(parts)


def _shrink(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resample to ``(width, height)`` px: average whole blocks, then bicubic with antialiasing."""
    height, width = pixels.shape[:2]
    if (step := min(width // size[0], height // size[1])) > 1:
        pixels = _reduce(pixels, step)
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
