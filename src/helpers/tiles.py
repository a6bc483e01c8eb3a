"""The tissue around each spot, as square tiles of one physical size in one array.

A tile is the square of `side_um` microns centred on a spot, resampled to `size` px. Its side in px
of the slide, ``side_um / um_per_px``, and its corners are fractions and are not rounded, so slides
of any resolution give tiles at one scale.

Each slide is decoded once. All tiles go into one memory-mapped uint8 array, in the order of the
spots, beside an index with the position and quality of each. Both are kept in the cache under a
key of settings and data (image file, coordinates, spot ids), and appear there complete or not at
all.

What lies beyond the image (`edge`): ``"pad"`` white, as if the empty slide went on; ``"reflect"``
the tissue mirrored; ``"drop"`` leaves the spot out; ``"error"`` refuses. A tile with no pixel
inside the image is always an error.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import anndata as ad
import numba
import numpy as np
import pandas as pd
from tqdm import tqdm

from helpers import images, slides
from helpers.files import DataError, atomic, cache_dir, digest, fingerprint, progress

logger = logging.getLogger(__name__)

EDGES = ("pad", "reflect", "drop", "error")
TISSUE_OD = 0.03
"""Mean optical density above the slide's background from which a px counts as tissue."""
_VERSION = 2  # of the way tiles are made; a new one makes every cached array stale
_CHUNK = 32  # tiles per task of a thread
_BATCH = 32  # tasks whose tiles are in memory at the same time
_SAMPLE = 500  # px: longest side of the sample that shows a slide's background


@dataclass(frozen=True)
class Tiles:
    """Tiles of one or more slides.

    Attributes
    ----------
    array
        uint8 ``(n, size, size, 3)``, RGB; memory-mapped and read-only when it comes from the cache.
    index
        One row per tile in the same order, named by spot id: `slide`; `x_px`, `y_px`, the centre in
        px of the full image; `inside`, the share of the tile that lies in the image; `tissue`, the
        share of its px that show tissue; `focus`, see `focus`; `row`, its place in the array.
    settings
        What made it: `side_um`, `size`, `edge`, and for each of its `slides` the `um_per_px`,
        `side_px` and `background` (red, green and blue of the empty slide).
    """

    array: np.ndarray
    index: pd.DataFrame
    settings: dict


def cut(
    adata: ad.AnnData,
    *,
    side_um: float = 100.0,
    size: int = 96,
    edge: str = "pad",
    cache: bool = True,
) -> Tiles:
    """Cut the tile around each spot of one slide; see `cut_study` for the parameters.

    Written plainly, this is what happens (`cut` agrees with it to two grey levels)::

        image = Image.open(slides.image_path(adata)).convert("RGB")
        side = side_um / slides.um_per_px(adata)  # px of the image, a fraction
        tiles = np.empty((adata.n_obs, size, size, 3), np.uint8)
        for tile, (x, y) in zip(tiles, adata.obsm["spatial"]):
            box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
            tile[:] = image.resize((size, size), Image.Resampling.BICUBIC, box=box)

    The code below is longer because it uses threads, goes on beyond the edge of the image, and
    keeps the tiles in the cache.
    """
    return cut_study([adata], side_um=side_um, size=size, edge=edge, cache=cache)


def cut_study(
    adatas: Mapping[str, ad.AnnData] | Iterable[ad.AnnData],
    *,
    side_um: float = 100.0,
    size: int = 96,
    edge: str = "pad",
    cache: bool = True,
) -> Tiles:
    """Cut the tile around each spot of several slides into one array.

    Parameters
    ----------
    adatas
        Slides as `helpers.slides` loads them, with their images' paths and scales.
    side_um
        Side of a tile in um.
    size
        Side of a tile in px of the result.
    edge
        ``"pad"``, ``"reflect"``, ``"drop"`` or ``"error"``, see the module.
    cache
        Read the tiles back when they have been cut before, else write them. When False, they stay
        in memory and nothing is written.

    Returns
    -------
    Tiles, slides and spots in the order given.

    Raises
    ------
    DataError
        When a setting is not valid, an image cannot be read, or a tile lies outside its image.
    """
    _check_settings(side_um, size, edge)
    settings = {"side_um": float(side_um), "size": int(size), "edge": edge}
    given = adatas.values() if isinstance(adatas, Mapping) else adatas
    jobs = [_job(adata, side_um, edge) for adata in given]
    shape = (sum(len(job.spots) for job in jobs), int(size), int(size), 3)
    if shape[0] == 0:
        raise DataError("there is no spot to cut a tile for", fix="check slides and edge")
    if not cache:
        parts: list[np.ndarray] = []
        index, per_slide = _cut(jobs, settings, parts.append)
        return Tiles(np.concatenate(parts), index, {**settings, "slides": per_slide})
    key = digest(version=_VERSION, **settings, slides=[job.key() for job in jobs])
    folder = cache_dir() / "tiles" / key
    if (tiles := _load(folder, shape)) is not None:
        return tiles
    with atomic(folder) as temporary:
        temporary.mkdir()
        with (temporary / "tiles.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            index, per_slide = _cut(jobs, settings, file.write)
        index.to_csv(temporary / "index.csv", quoting=csv.QUOTE_NONNUMERIC)
        text = json.dumps({**settings, "slides": per_slide}, indent=1)
        (temporary / "settings.json").write_text(text)
    if (tiles := _load(folder, shape)) is None:
        what = "the tiles just cut are missing from the cache, or damaged"
        raise DataError(what, file=folder, fix="run it again, or cut with cache=False")
    return tiles


def of_spots(cut: Tiles, spots: pd.DataFrame) -> np.ndarray:
    """Return the tiles of spots, uint8 ``(n, size, size, 3)``, in the order of their table.

    Raises
    ------
    DataError
        Naming the first spot without a tile.
    """
    where = pd.Series(
        cut.index["row"].to_numpy(),
        pd.MultiIndex.from_arrays([cut.index["slide"], cut.index.index]),
    )
    row = where.reindex(pd.MultiIndex.from_arrays([spots["slide"], spots.index]))
    if row.isna().any():
        slide, spot = row.index[row.isna()][0]
        raise DataError(f"spot {spot} has no tile", slide=slide, fix='cut tiles with edge="pad"')
    return cut.array[row.to_numpy(int)]


def tissue_fraction(
    array: np.ndarray, background: Iterable[float] = (255.0, 255.0, 255.0)
) -> np.ndarray:
    """Measure the share of each tile that shows tissue.

    A px is tissue when its optical density ``-log10(value / background)``, averaged over red, green
    and blue, is above `TISSUE_OD`. Optical density is proportional to the amount of stain (Beer and
    Lambert; Ruifrok and Johnston 2001). The threshold separates background from tissue on the
    book's ten real slides; Otsu's would separate nuclei from the rest. White fat and the holes of
    ducts do not count as tissue.

    Parameters
    ----------
    array
        uint8 ``(n, height, width, 3)``.
    background
        Red, green and blue of the empty slide, which is not white in a real scan; `cut` measures it
        on each slide (99th percentile).

    Returns
    -------
    float64 ``(n,)``, from 0 to 1.
    """
    # The mean of logarithms is the logarithm of the product, so no px needs a logarithm.
    limit = np.prod(np.asarray(background, float)) * 10 ** (-3 * TISSUE_OD)
    return _tissue(array, int(np.ceil(limit)))


@numba.njit(nogil=True, cache=True)
def _tissue(array, limit):
    share = np.empty(array.shape[0])
    n_px = array.shape[1] * array.shape[2]
    for i in range(array.shape[0]):
        count = np.int32(0)
        for px in array[i].reshape(n_px, 3):
            product = np.int32(px[0]) * np.int32(px[1]) * np.int32(px[2])
            count += np.int32(product < np.int32(limit))
        share[i] = count / max(n_px, 1)
    return share


@numba.njit(nogil=True, cache=True, fastmath=True)
def focus(array):
    """Measure how sharp each tile is: the variance of the Laplacian of its brightness.

    Pech-Pacheco et al. 2000, https://doi.org/10.1109/ICPR.2000.903548. The second derivative hardly
    varies in a blurred tile, which has no sharp edges, nor in an empty one. Values depend on the
    scale: compare tiles of one setting and preferably of one slide.

    Parameters
    ----------
    array
        uint8 ``(n, height, width, 3)``, at least 3 px high and wide.

    Returns
    -------
    float64 ``(n,)``; 0 for a uniform tile, or one that is smaller than 3 px.
    """
    n, height, width = array.shape[:3]
    result = np.zeros(n)
    if height < 3 or width < 3:
        return result
    grey = np.empty((height, width), np.int32)  # in thousandths
    for i in range(n):
        for y in range(height):
            for x in range(width):
                red, green, blue = array[i, y, x]
                grey[y, x] = 299 * red + 587 * green + 114 * blue
        total, squares = 0.0, 0.0
        for y in range(1, height - 1):
            for x in range(1, width - 1):
                around = grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1]
                second = np.float64(around - 4 * grey[y, x])
                total += second
                squares += second * second
        count = (height - 2) * (width - 2)
        result[i] = max(0.0, squares / count - (total / count) ** 2) / 1e6
    return result


# --------------------------------------------------------------------------- what is to be cut


@dataclass(frozen=True)
class _Job:
    """One slide: its image and scale, and the spots to cut."""

    slide: str
    path: Path
    header: images.ImageInfo
    um_per_px: float
    side_px: float
    spots: pd.Index
    xy: np.ndarray
    inside: np.ndarray

    def key(self) -> dict:
        """Return what the tiles depend on, for the cache."""
        return {
            "slide": self.slide,
            "image": fingerprint(self.path),
            "um_per_px": self.um_per_px,
            "xy": digest(xy=self.xy.tobytes().hex()),
            "spots": digest(spots=list(self.spots)),
        }


def _job(adata: ad.AnnData, side_um: float, edge: str) -> _Job:
    """Check one slide and find out how its tiles lie on the image."""
    slide = _check_one_slide(adata)
    try:
        scale, path = slides.um_per_px(adata), slides.image_path(adata)
        xy = np.ascontiguousarray(adata.obsm["spatial"], dtype=np.float64)
    except (KeyError, StopIteration) as error:
        what = f"the slide lacks its image, scale or spot positions ({error} is missing)"
        raise DataError(what, slide=slide, fix="load it with helpers.slides") from error
    header, where = images.info(path, slide=slide), {"slide": slide, "file": path}
    if not (np.isfinite(scale) and scale > 0 and np.isfinite(xy).all() and xy.shape[1:] == (2,)):
        what = f"um_per_px ({scale}) is not above 0, or x and y of a spot are not numbers"
        fix = 'check uns["spatial"][slide]["um_per_px"] and obsm["spatial"]'
        raise DataError(what, **where, fix=fix)
    side, image = side_um / scale, f"image of {header.width} x {header.height} px"
    if side > max(header.width, header.height):
        what = f"a tile of {side_um:g} um is {side:.0f} px wide, more than the whole {image}"
        fix = 'give a smaller side_um, or check uns["spatial"][slide]["um_per_px"]'
        raise DataError(what, **where, fix=fix)
    far = np.array([header.width, header.height])
    beyond = np.maximum(side / 2 - xy, 0) + np.maximum(xy + side / 2 - far, 0)
    inside = np.clip(1 - beyond / side, 0, 1).prod(axis=1)
    lost = inside < 1 if edge == "error" else inside == 0
    if lost.any():
        x, y = xy[lost][0]
        partly, fix = "", "check that image and coordinates belong together, x before y"
        if edge == "error":
            partly, fix = "partly ", 'cut with edge="pad", "reflect" or "drop"'
        what = f"{lost.sum()} of {len(xy)} tiles of {side:.1f} px lie {partly}outside the {image}"
        first = f"the first around spot {adata.obs_names[lost][0]} at x = {x:.0f}, y = {y:.0f}"
        raise DataError(f"{what}, {first}", **where, fix=fix)
    keep = inside == 1 if edge == "drop" else np.full(len(xy), True)
    spots = adata.obs_names[keep]
    return _Job(slide, path, header, scale, side, spots, xy[keep], inside[keep])


def _check_settings(side_um: float, size: int, edge: str) -> None:
    lengths = isinstance(side_um, Real) and 0 < side_um < math.inf
    whole = isinstance(size, Real) and size >= 1 and size % 1 == 0
    if not (lengths and whole and edge in EDGES):
        what = f"tiles of {side_um!r} um, {size!r} px and edge {edge!r} cannot be cut"
        fix = f"give a side_um above 0, a size in whole px and an edge of {EDGES}"
        raise DataError(what, fix=fix)


def _check_one_slide(adata: ad.AnnData) -> str | None:
    """Return the slide of an AnnData; refuse several, whose image could be any of theirs."""
    known = set(adata.uns.get("spatial", {}))
    named = set(adata.obs["slide"].astype(str)) if "slide" in adata.obs else set()
    if known and len(named | known) > 1:
        what = f'obs["slide"] names {sorted(named)} and uns["spatial"] {sorted(known)}'
        fix = "pass cut_study a dict or list of one AnnData per slide, each with its own image"
        raise DataError(f"{what}: tiles are cut from one image per AnnData", fix=fix)
    return next(iter(known), None)


# --------------------------------------------------------------------------- the cache


def _load(folder: Path, shape: tuple[int, ...]) -> Tiles | None:
    """Read tiles back from the cache; None when they are not there or damaged."""
    if not folder.is_dir():
        return None
    try:
        array = np.load(folder / "tiles.npy", mmap_mode="r")
        types = {"spot": str, "slide": str}
        index = pd.read_csv(
            folder / "index.csv", dtype=types, keep_default_na=False, float_precision="round_trip"
        ).set_index("spot")
        settings = json.loads((folder / "settings.json").read_text())
        for facts in settings["slides"].values():
            if "glass" in facts:  # the name in the cache of version 1.0
                facts["background"] = facts.pop("glass")
        if array.shape != shape or len(index) != shape[0]:
            raise ValueError(f"{array.shape} and {len(index)} rows instead of {shape}")
    except Exception as error:  # at damaged bytes numpy, pandas and json throw a dozen kinds
        logger.warning("the cached tiles in %s are damaged (%r) and are cut again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Tiles(array, index, settings)


# --------------------------------------------------------------------------- cutting

_Pixels = Callable[[int, int, int, int], np.ndarray]  # (y0, y1, x0, x1) -> uint8 (h, w, 3)


def _cut(
    jobs: list[_Job], settings: dict, write: Callable[[np.ndarray], object]
) -> tuple[pd.DataFrame, dict]:
    """Cut the tiles of every job and write them in order; return the index, facts per slide."""
    parts, per_slide = [], {}
    total = sum(len(job.spots) for job in jobs)
    with progress(total=total, desc="tiles", unit="tile", delay=1, leave=False) as bar:
        for job in jobs:
            pixels, sample = _open(job)
            background = _background(sample)
            parts.append(_cut_slide(job, pixels, background, settings, write, bar))
            per_slide[job.slide] = {
                "um_per_px": job.um_per_px,
                "side_px": job.side_px,
                "background": background.tolist(),
            }
    index = pd.concat(parts).rename_axis("spot").assign(row=np.arange(total))
    if index.index.has_duplicates:
        twice = index.index[index.index.duplicated()][0]
        raise DataError(f"duplicate spot id {twice}", fix="make spot ids unique across slides")
    return index, per_slide


def _open(job: _Job) -> tuple[_Pixels, np.ndarray]:
    """Return a function that gives pixels of a slide, and a sparse sample of all of them."""
    if job.header.format == "TIFF" and job.header.width * job.header.height > images.MAX_PIXELS:

        def read(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
            return images.read_region(job.path, (x0, y0, x1, y1), slide=job.slide)

        return read, images.read(job.path, max_side=_SAMPLE, slide=job.slide)
    image = images.read(job.path, slide=job.slide)
    step = max(1, max(image.shape) // _SAMPLE)
    return lambda y0, y1, x0, x1: image[y0:y1, x0:x1], image[::step, ::step]


def _background(sample: np.ndarray) -> np.ndarray:
    """Return the colour of the empty slide: the 99th percentile of each channel.

    Px of pure white are left out: they were painted (slides masked to their tissue) or saturated.
    """
    measured = sample[(sample < 255).any(axis=2)]
    if len(measured) < sample.shape[0] * sample.shape[1] / 100:
        return np.full(3, 255.0)
    return np.percentile(measured, 99, axis=0)


def _cut_slide(
    job: _Job,
    pixels: _Pixels,
    background: np.ndarray,
    settings: dict,
    write: Callable[[np.ndarray], object],
    bar: tqdm,
) -> pd.DataFrame:
    """Cut the tiles of one slide in two threads and write them in order; return its index."""
    n, size = len(job.spots), settings["size"]
    tissue, sharpness = np.empty(n), np.empty(n)

    def work(begin: int) -> np.ndarray:
        part = slice(begin, min(begin + _CHUNK, n))
        tiles = np.empty((part.stop - begin, size, size, 3), np.uint8)
        for tile, (x, y) in zip(tiles, job.xy[part], strict=True):
            _cut_one(tile, pixels, job, x, y, settings["edge"])
        tissue[part], sharpness[part] = tissue_fraction(tiles, background), focus(tiles)
        return tiles

    step = _CHUNK * _BATCH
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for start in range(0, n, step):
            for tiles in pool.map(work, range(start, min(start + step, n), _CHUNK)):
                write(tiles)
                bar.update(len(tiles))
    x, y = job.xy.T
    columns = {"slide": job.slide, "x_px": x, "y_px": y, "inside": job.inside}
    return pd.DataFrame({**columns, "tissue": tissue, "focus": sharpness}, index=job.spots)


def _cut_one(tile: np.ndarray, pixels: _Pixels, job: _Job, x: float, y: float, edge: str) -> None:
    """Resample the square around (x, y) to `tile`."""
    first_x, weights_x = taps(x - job.side_px / 2, job.side_px, len(tile))
    first_y, weights_y = taps(y - job.side_px / 2, job.side_px, len(tile))
    x0, x1 = int(first_x[0]), int(first_x[-1]) + weights_x.shape[1]
    y0, y1 = int(first_y[0]), int(first_y[-1]) + weights_y.shape[1]
    window = _window(pixels, (x0, y0, x1, y1), job.header, edge)
    resample(window, first_x - x0, weights_x, first_y - y0, weights_y, tile)


def _window(
    pixels: _Pixels, box: tuple[int, int, int, int], header: images.ImageInfo, edge: str
) -> np.ndarray:
    """Return a rectangle of an image that goes on beyond its edge, white or mirrored."""
    x0, y0, x1, y1 = box
    width, height = header.width, header.height
    if x0 >= 0 and x1 <= width and y0 >= 0 and y1 <= height:
        return pixels(y0, y1, x0, x1)
    # One column more than needed makes this a view with gaps, as the slices of the image are: numba
    # then compiles one version of `resample`, which takes seconds.
    window = np.full((y1 - y0, x1 - x0 + 1, 3), 255, np.uint8)[:, :-1]
    if edge == "reflect":
        rows, columns = _mirror(y0, y1, height), _mirror(x0, x1, width)
        top, left = rows.min(), columns.min()
        block = pixels(top, rows.max() + 1, left, columns.max() + 1)
        window[:] = block[np.ix_(rows - top, columns - left)]
        return window
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    window[top - y0 : bottom - y0, left - x0 : right - x0] = pixels(top, bottom, left, right)
    return window


def _mirror(start: int, stop: int, length: int) -> np.ndarray:
    """Fold positions back into ``[0, length)``, as ``np.pad(mode="reflect")`` does."""
    period = max(2 * (length - 1), 1)
    at = np.arange(start, stop) % period
    return np.minimum(at, period - at)


# --------------------------------------------------------------------------- resampling


@numba.njit(nogil=True, cache=True)
def taps(low: float, side: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute which px of one axis make up each px of the tile, and with which weights.

    Parameters
    ----------
    low
        Where the tile begins, in px of the image; pixel i covers ``[i, i + 1)``.
    side
        Its length in px of the image.
    size
        Its length in px of the tile.

    Returns
    -------
    first
        int64 ``(size,)``: the first image px that counts for each tile px.
    weights
        float32 ``(size, n_taps)``: weights of it and its followers; each row sums to 1.
    """
    scale = side / size
    width = max(scale, 1.0)
    n_taps = int(np.ceil(4 * width))
    first = np.empty(size, np.int64)
    weights = np.zeros((size, n_taps), np.float32)
    row = np.empty(n_taps)
    for i in range(size):
        centre = low + (i + 0.5) * scale
        first[i] = int(np.floor(centre - 2 * width + 0.5))
        count = min(n_taps, int(np.floor(centre + 2 * width + 0.5)) - first[i])
        for k in range(count):
            d = abs(first[i] + k + 0.5 - centre) / width
            if d < 1:
                row[k] = (1.5 * d - 2.5) * d * d + 1
            elif d < 2:
                row[k] = ((-0.5 * d + 2.5) * d - 4) * d + 2
            else:
                row[k] = 0
        weights[i, :count] = row[:count] / row[:count].sum()
    return first, weights


@numba.njit(nogil=True, cache=True, fastmath=True)
def _weighted_lines(lines, first, weights, i, total, out):
    """Write the weighted mean of a few `lines` to `out`, rounded to 8 bits."""
    width = lines.shape[1]
    total[:width] = np.float32(0.5)  # rounds when the fraction is cut off
    for k in range(weights.shape[1]):
        weight, line = weights[i, k], lines[min(first[i] + k, lines.shape[0] - 1)]
        for j in range(width):
            total[j] += weight * line[j]
    for j in range(width):
        out[j] = np.uint8(min(max(total[j], np.float32(0)), np.float32(255)))


@numba.njit(nogil=True, cache=True, fastmath=True)
def resample(window, first_x, weights_x, first_y, weights_y, out) -> None:
    """Resample `window` to the tile `out`.

    Parameters
    ----------
    window
        uint8 ``(height, width, 3)``: every px that the taps ask for.
    first_x, weights_x, first_y, weights_y
        From `taps`, with `first` counted from the window's first px.
    out
        uint8 ``(size, size, 3)``, written to.
    """
    height, width, size = window.shape[0], window.shape[1], out.shape[0]
    # Columns side by side in memory: then both passes run along lines, as processors like it.
    turned = np.empty((width, height * 3), np.uint8)
    for top in range(0, height, 16):
        for x in range(width):
            for y in range(top, min(top + 16, height)):
                for c in range(3):
                    turned[x, 3 * y + c] = window[y, x, c]
    half = np.empty((height, size * 3), np.uint8)
    line = np.empty(height * 3, np.uint8)
    total = np.empty(3 * max(height, size), np.float32)
    for x in range(size):
        _weighted_lines(turned, first_x, weights_x, x, total, line)
        for y in range(height):
            for c in range(3):
                half[y, 3 * x + c] = line[3 * y + c]
    for y in range(size):
        _weighted_lines(half, first_y, weights_y, y, total, out[y].reshape(size * 3))
