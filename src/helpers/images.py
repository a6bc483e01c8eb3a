"""An image file to pixels, by what its bytes say and not by its name.

In STimage-1K4M every image is called ``.png``, and is a PNG, a JPEG or a TIFF.

Rules of this module, for every format:

- Result: uint8 RGB, ``(height, width, 3)``. Transparency is laid over white, the colour of an empty
  slide. Palette, grey, bilevel and CMYK images are converted. Of 16 bits the upper 8 are kept.
- Coordinates in the dataset count stored pixels, so an EXIF orientation is *not* applied: turning
  the image would move the tissue away from its spots.
- At most `MAX_PIXELS` pixels are held at once (1 gigapixel, 3 GB). A larger image is refused before
  decoding, because a few kilobytes can claim any size (a decompression bomb). Pillow's own limit is
  a global variable that a library should not touch; the format classes are used directly instead.
- Larger images can still be used: `read` with `max_side` shrinks a JPEG while decoding it (by up to
  8 in its own frequency domain) and a TIFF band by band, and `read_region` reads only the tiles of
  a TIFF that it needs. A PNG has to be decoded whole, and so has a progressive JPEG.

JPEGs are decoded by libjpeg-turbo at its accurate setting, through simplejpeg, which notices
missing and damaged data (imagecodecs, as fast, returns grey instead). The result equals Pillow's to
the bit.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from helpers.files import DataError

MAX_PIXELS = 1_000_000_000
"""Pixels held in memory at once; as RGB they take 3 GB."""

_FETCH = "fetch the file again"
_TOO_LARGE = "store the image as a tiled TIFF, which is read by region"
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
}
_CLASSES = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}


@dataclass(frozen=True)
class ImageInfo:
    """What the header says: the format, and the stored width and height in px."""

    format: str
    width: int
    height: int


def info(path: Path | str, *, slide: str | None = None) -> ImageInfo:
    """Read the header of an image, not its pixels.

    Raises
    ------
    DataError
        When the file is missing, empty, a web page, a git-lfs pointer or no PNG, JPEG or TIFF.
    """
    path = Path(path)
    kind = _sniff(path, slide)
    try:
        if kind == "TIFF":
            with _tiff(path) as tiff:
                page = tiff.pages.first
                return ImageInfo(kind, page.imagewidth, page.imagelength)
        with path.open("rb") as file, _CLASSES[kind](file) as image:
            return ImageInfo(kind, *image.size)
    except Exception as error:
        _refuse(error, path, slide)


def read(
    path: Path | str,
    *,
    max_side: int | None = None,
    slide: str | None = None,
    buffer: np.ndarray | None = None,
) -> np.ndarray:
    """Read an image as RGB.

    Parameters
    ----------
    path
        A PNG, JPEG or TIFF under any name. Of a TIFF with several pages, the first.
    max_side
        Shrink the image, keeping its shape, so that its longer side is at most this many px. It is
        never enlarged.
    slide
        Named in errors.
    buffer
        Flat uint8 memory to decode into, used when it is large enough. Giving the same one for
        slide after slide saves the system from handing out fresh memory, which takes longer than
        decoding a JPEG.

    Returns
    -------
    uint8 array ``(height, width, 3)``, yours to write to.

    Raises
    ------
    DataError
        When the file is no readable image, is truncated or damaged, holds pixels of a kind that has
        no place in RGB (floating point, five channels), or is larger than `MAX_PIXELS`.
    """
    path = Path(path)
    if max_side is not None and not max_side >= 1:
        what = f"an image cannot be shrunk to {max_side} px"
        raise DataError(what, slide=slide, file=path, fix="give a max_side of 1 or more")
    header = info(path, slide=slide)
    factor = 1.0 if max_side is None else max(1.0, max(header.width, header.height) / max_side)
    try:
        pixels = _READERS[header.format](path, header, factor, slide, buffer)
        if factor == 1.0:
            return pixels
        size = (round(header.width / factor) or 1, round(header.height / factor) or 1)
        return _shrink(pixels, size)
    except DataError:
        raise
    except Exception as error:
        _refuse(error, path, slide)


def read_region(
    path: Path | str, box: tuple[int, int, int, int], *, slide: str | None = None
) -> np.ndarray:
    """Read one rectangle of an image as RGB.

    Of a TIFF only the tiles or strips under the rectangle are decoded, whatever its size. A PNG or
    JPEG is decoded whole first (within `MAX_PIXELS`), so read those once and slice.

    Parameters
    ----------
    path
        A PNG, JPEG or TIFF under any name.
    box
        ``(x0, y0, x1, y1)`` in stored px, x1 and y1 excluded, inside the image.

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
            fix="cut the region to the image first",
        )
    _bound((x1 - x0) * (y1 - y0), path, slide)
    if header.format != "TIFF":
        return read(path, slide=slide)[y0:y1, x0:x1]
    try:
        with _tiff(path) as tiff:
            if _is_plain(page := _complete(tiff.pages.first)):
                return _to_rgb8(_rows(page)(y0, y1, x0, x1))
        return read(path, slide=slide)[y0:y1, x0:x1]
    except DataError:
        raise
    except Exception as error:
        _refuse(error, path, slide)


# --------------------------------------------------------------------------- what, and how large


def _sniff(path: Path, slide: str | None) -> str:
    """Return ``"PNG"``, ``"JPEG"`` or ``"TIFF"``, or say what the file is instead."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        what = "the image is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(what, slide=slide, file=path, fix="check the path") from error
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return kind
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        what = "the image is an empty file"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "this is a web page saved under an image's name, not an image"
    elif text.startswith(b"version https://git-lfs"):
        what = "this is a git-lfs pointer, not the image it points to"
    else:
        what = f"this is not a PNG, JPEG or TIFF (it begins with {head[:8]!r})"
    raise DataError(what, slide=slide, file=path, fix=f"{_FETCH}, or save it as TIFF")


def _bound(pixels: int, path: Path, slide: str | None) -> None:
    """Refuse what would hold more than `MAX_PIXELS` pixels."""
    if pixels > MAX_PIXELS:
        raise DataError(
            f"{pixels:,} pixels are more than the limit of {MAX_PIXELS:,}",
            slide=slide,
            file=path,
            fix=_TOO_LARGE,
        )


def _refuse(error: Exception, path: Path, slide: str | None) -> NoReturn:
    """Turn what a decoder threw (each has its own set of exceptions) into one that says where."""
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, NotImplementedError):
        what = f"this kind of image is not supported ({error})"
        fix = "save it as RGB with 8 bits per channel"
        raise DataError(what, slide=slide, file=path, fix=fix) from error
    raise DataError(
        f"the image is truncated or damaged ({error or type(error).__name__})",
        slide=slide,
        file=path,
        fix=_FETCH,
    ) from error


# --------------------------------------------------------------------------- one reader per format


def _read_jpeg(
    path: Path, header: ImageInfo, factor: float, slide: str | None, buffer: np.ndarray | None
) -> np.ndarray:
    """Decode a JPEG, by `factor` or a little less smaller when factor is above 1."""
    import simplejpeg

    data = path.read_bytes()
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        mode, progressive = image.mode, "progressive" in image.info
    wanted = {}
    if factor > 1:
        wanted = {
            "min_width": math.ceil(header.width / factor),
            "min_height": math.ceil(header.height / factor),
        }
    if mode not in ("RGB", "L"):  # CMYK: Pillow knows how Adobe's inverted inks are meant
        return _read_pillow(path, header, slide)
    height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False, **wanted)
    # Every coefficient of a progressive JPEG is held in memory, however small the result.
    _bound(header.width * header.height if progressive else width * height, path, slide)
    out = _view(buffer, (height, width, 3))
    # Strict: any complaint of the decoder is an error. Stray bytes before a marker may be harmless,
    # but they are also what damage looks like, and none of the book's slides has them.
    return simplejpeg.decode_jpeg(data, "RGB", buffer=out, strict=True, **wanted)


def _read_png(
    path: Path, header: ImageInfo, factor: float, slide: str | None, buffer: np.ndarray | None
) -> np.ndarray:
    """Decode a PNG whole. Plain RGB takes the way that needs a third of Pillow's memory."""
    import imagecodecs

    _bound(header.width * header.height, path, slide)
    with path.open("rb") as file, PngImagePlugin.PngImageFile(file) as image:
        bits = image.tile[0].args
        plain = image.mode == "RGB" and bits == "RGB" and "transparency" not in image.info
    if not plain:
        return _read_pillow(path, header, slide)
    out = _view(buffer, (header.height, header.width, 3))
    return imagecodecs.png_decode(path.read_bytes(), out=out)


def _read_tiff(
    path: Path, header: ImageInfo, factor: float, slide: str | None, buffer: np.ndarray | None
) -> np.ndarray:
    """Decode the first image of a TIFF; when shrinking, from the best level of its pyramid."""
    with _tiff(path) as tiff:
        page = _complete(tiff.pages.first)
        if not _is_plain(page):
            _bound(header.width * header.height, path, slide)
            if _is_planar(page):
                return _to_rgb8(np.stack(page.asarray(), axis=-1))
            return _read_pillow(path, header, slide)
        if factor == 1:
            _bound(header.width * header.height, path, slide)
            return _to_rgb8(page.asarray())
        small = [page]
        if tiff.series and tiff.series[0].keyframe.index == page.index:
            small += [level.keyframe for level in tiff.series[0].levels[1:]]
        fits = [p for p in small if _is_plain(p) and p.imagewidth * factor >= header.width]
        page = _complete(min(fits, key=lambda p: p.imagewidth))
        step = max(1, int(page.imagewidth * factor / header.width))
        _bound(page.imagewidth * page.imagelength // step**2, path, slide)
        return _reduce(_rows(page), page.imagewidth, page.imagelength, step)


def _read_pillow(path: Path, header: ImageInfo, slide: str | None) -> np.ndarray:
    """Decode with Pillow, for every kind of pixels that the fast ways don't know."""
    _bound(header.width * header.height, path, slide)
    with path.open("rb") as file, _CLASSES[header.format](file) as image:
        image.load()
        if image.mode.startswith("I"):
            return _to_rgb8(np.asarray(image))
        if image.has_transparency_data:
            over = Image.new("RGB", image.size, "white")
            rgba = image.convert("RGBA")
            over.paste(rgba, mask=rgba.getchannel("A"))
            return np.array(over)
        return np.array(image.convert("RGB"))


_READERS: dict[str, Callable[..., np.ndarray]] = {
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "TIFF": _read_tiff,
}


# --------------------------------------------------------------------------- TIFF pages


def _tiff(path: Path):
    """Open a TIFF; the import takes a moment, so only when there is one."""
    import tifffile

    return tifffile.TiffFile(path)


def _is_plain(page) -> bool:
    """Say whether a page is 8 or 16-bit RGB(A) or grey, pixel by pixel: what `_rows` can cut."""
    return (
        page.axes in ("YXS", "YX")
        and page.dtype in (np.uint8, np.uint16)
        and page.bitspersample in (8, 16)
        and page.photometric.name in ("RGB", "MINISBLACK", "YCBCR")
        and (page.photometric.name != "YCBCR" or page.compression.name == "JPEG")
        and page.shape[2:] in ((), (3,), (4,))
    )


def _is_planar(page) -> bool:
    """Say whether a page is RGB(A) stored colour by colour, which Pillow misreads at 16 bits."""
    bits = page.bitspersample
    return page.axes == "SYX" and page.photometric.name == "RGB" and bits in (8, 16)


def _complete(page):
    """Return the page; refuse pixels that are no picture, and a file that ends before its data.

    Decoders may fill in what is missing, and Pillow knows little but 8 bits.
    """
    samples, bits = page.samplesperpixel, page.bitspersample
    known = bits <= 8 or _is_plain(page) or _is_planar(page)
    if samples > 4 or page.dtype is None or page.dtype.kind not in "bu" or not known:
        kind = f"{samples} channel(s) of {bits}-bit {page.dtype}, {page.photometric.name}"
        raise NotImplementedError(kind)
    ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
    if max(ends, default=0) > page.parent.filehandle.size:
        raise ValueError("the file ends before the pixels do")
    return page


def _rows(page) -> Callable[[int, int, int, int], np.ndarray]:
    """Return a function ``(y0, y1, x0, x1) -> pixels`` that decodes only what it needs."""
    import zarr

    pixels = zarr.open(page.aszarr(), mode="r")
    return lambda y0, y1, x0, x1: np.asarray(pixels[y0:y1, x0:x1])


# --------------------------------------------------------------------------- pixels


def _to_rgb8(pixels: np.ndarray) -> np.ndarray:
    """Turn grey, RGB or RGBA of 8 or 16 bits into RGB of 8; alpha over white."""
    if pixels.dtype != np.uint8:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.shape[2] == 4:
        over = Image.new("RGB", pixels.shape[1::-1], "white")
        over.paste(Image.fromarray(pixels[:, :, :3]), mask=Image.fromarray(pixels[:, :, 3]))
        return np.array(over)
    return pixels


def _view(buffer: np.ndarray | None, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the front of `buffer` in the wanted shape, or new memory when it is too small."""
    size = math.prod(shape)
    if buffer is None or buffer.size < size:
        return np.empty(shape, np.uint8)
    return buffer[:size].reshape(shape)


def _reduce(
    rows: Callable[[int, int, int, int], np.ndarray], width: int, height: int, step: int
) -> np.ndarray:
    """Average blocks of ``step x step`` px, a band of rows at a time."""
    band = max(1, 1024 // step) * step
    parts = []
    for y in range(0, height, band):
        pixels = _to_rgb8(rows(y, min(y + band, height), 0, width))
        parts.append(np.asarray(Image.fromarray(pixels).reduce(step)))
    return np.concatenate(parts)


def _shrink(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resample to ``(width, height)`` px: whole blocks first, then bicubic with antialiasing."""
    height, width = pixels.shape[:2]
    if (step := min(width // size[0], height // size[1])) > 1:
        pixels = _reduce(lambda y0, y1, x0, x1: pixels[y0:y1, x0:x1], width, height, step)
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
