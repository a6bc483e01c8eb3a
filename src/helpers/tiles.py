"""The tissue around each spot, as square tiles of one physical size in one array.

A tile is the square of `side_um` microns centred on a spot, resampled to `size` px. Its side in px
of the slide, ``side_um / um_per_px``, and its corners are fractions and stay so: nothing is
rounded. Slides of any resolution therefore give tiles at one scale.

Each slide is decoded once. All tiles go into one memory-mapped uint8 array, in the order of the
spots, beside an index that says where each came from and how good it is. Both are kept in the cache
under a key of settings and data (image file, coordinates, spot ids), and appear there whole or not
at all.

What lies beyond the image (`edge`): ``"pad"`` white, as if the empty slide went on; ``"reflect"``
the tissue mirrored; ``"drop"`` leaves the spot out; ``"error"`` refuses. A tile with no pixel
inside the image is always an error.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

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
"""Mean optical density above the slide's glass from which a px counts as tissue."""
_VERSION = 2  # of the way tiles are made; a new one makes every cached array stale
_CHUNK = 32  # tiles per task of a thread
_LARGE = 100_000_000  # bytes of memory that are worth two threads to ask for
_SAMPLE = 500  # px: longest side of the sample that shows a slide's glass


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
        What made it: `side_um`, `size`, `edge`, and per slide `um_per_px`, `side_px` and `glass`.
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
    """Cut the tile around each spot of one slide; see `cut_study`."""
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
        When a setting makes no sense, an image cannot be read, or a tile lies outside its image.
    """
    lengths = isinstance(side_um, Real) and 0 < side_um < math.inf
    whole = isinstance(size, Real) and size >= 1 and size % 1 == 0
    if not (lengths and whole and edge in EDGES):
        raise DataError(
            f"tiles of {side_um!r} um, {size!r} px and edge {edge!r} cannot be cut",
            fix=f"give lengths above 0, px as a whole number and an edge of {EDGES}",
        )
    size = int(size)
    jobs = [_job(a, side_um, edge) for a in getattr(adatas, "values", lambda: adatas)()]
    n = sum(len(job.spots) for job in jobs)
    if n == 0:
        raise DataError("there is no spot to cut a tile for", fix="check slides and edge")
    settings = {"side_um": float(side_um), "size": size, "edge": edge}
    if not cache:
        array = np.empty((n, size, size, 3), np.uint8)
        index, per_slide = _fill(partial(_put, array), jobs, settings)
        return Tiles(array, index, {**settings, "slides": per_slide})
    key = digest(version=_VERSION, **settings, slides=[job.key() for job in jobs])
    folder = cache_dir() / "tiles" / key
    if (tiles := _load(folder, (n, size, size, 3))) is not None:
        return tiles
    with atomic(folder) as temporary:
        temporary.mkdir()
        with _npy(temporary / "tiles.npy", (n, size, size, 3)) as store:
            index, per_slide = _fill(store, jobs, settings)
        index.to_csv(temporary / "index.csv", quoting=csv.QUOTE_NONNUMERIC)
        text = json.dumps({**settings, "slides": per_slide}, indent=1)
        (temporary / "settings.json").write_text(text)
    if (tiles := _load(folder, (n, size, size, 3))) is None:
        what = "the tiles just cut are gone from the cache, or damaged again"
        raise DataError(what, file=folder, fix="run it again, or cut with cache=False")
    return tiles


_Store = Callable[[int, np.ndarray], None]  # (row of the first tile, tiles)


def _put(array: np.ndarray, row: int, part: np.ndarray) -> None:
    """Store tiles in memory."""
    array[row : row + len(part)] = part


@contextmanager
def _npy(path: Path, shape: tuple[int, ...]) -> Iterator[_Store]:
    """Write an array in NumPy's format part by part, in any order.

    Writing through a memory map would take several times as long: each page of it is a fault.
    """
    lock = Lock()
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        begin, step = file.tell(), math.prod(shape[1:])

        def store(row: int, part: np.ndarray) -> None:
            with lock:
                file.seek(begin + row * step)
                file.write(part)

        yield store


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
        if array.shape != shape or len(index) != shape[0]:
            raise ValueError(f"{array.shape} and {len(index)} rows where {shape} belongs")
    except Exception as error:  # at damaged bytes numpy, pandas and json throw a dozen kinds
        logger.warning("the cached tiles in %s are damaged (%r) and are cut again", folder, error)
        _remove(folder)
        return None
    return Tiles(array, index, settings)


def _remove(folder: Path) -> None:
    """Remove a folder of the cache: first out of sight, so that nobody meets half of it.

    Aside it has a name that `files.atomic` sweeps away should this process die here.
    """
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as aside:
        try:
            folder.rename(Path(aside) / folder.name)
        except FileNotFoundError:
            logger.info("another process has removed %s", folder)


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
    known = adata.uns.get("spatial", {})
    slide = next(iter(known), None)
    named = set(adata.obs["slide"].astype(str)) if "slide" in adata.obs else set()
    if known and len(named | set(known)) > 1:
        raise DataError(
            f'obs["slide"] names {sorted(named)} and uns["spatial"] {sorted(known)}: tiles are cut '
            "from one image per AnnData",
            fix="pass cut_study a dict or list of one AnnData per slide, each with its own image",
        )
    try:
        scale, path = slides.um_per_px(adata), slides.image_path(adata)
        xy = np.ascontiguousarray(adata.obsm["spatial"], dtype=np.float64)
    except (KeyError, StopIteration) as error:
        raise DataError(
            f"the slide does not say where it is ({error} is missing)",
            slide=slide,
            fix="load it with helpers.slides",
        ) from error
    header = images.info(path, slide=slide)
    if not (np.isfinite(scale) and scale > 0 and np.isfinite(xy).all() and xy.shape[1:] == (2,)):
        raise DataError(
            f"um_per_px ({scale}) or a spot's x and y are no numbers to cut by",
            slide=slide,
            file=path,
            fix='check uns["spatial"][slide]["um_per_px"] and obsm["spatial"]',
        )
    side = side_um / scale
    if side > max(header.width, header.height):
        raise DataError(
            f"a tile of {side_um:g} um is {side:.0f} px wide, more than the whole image of "
            f"{header.width} x {header.height} px",
            slide=slide,
            file=path,
            fix='give a smaller side_um, or check uns["spatial"][slide]["um_per_px"]',
        )
    far = np.array([header.width, header.height])
    beyond = np.maximum(side / 2 - xy, 0) + np.maximum(xy + side / 2 - far, 0)
    inside = np.clip(1 - beyond / side, 0, 1).prod(axis=1)
    keep = np.full(len(xy), True)
    if edge == "drop":
        keep = inside == 1
    lost = inside < 1 if edge == "error" else inside == 0
    if lost.any():
        first = adata.obs_names[lost][0]
        x, y = xy[lost][0]
        raise DataError(
            f"{lost.sum()} of {len(xy)} tiles of {side:.1f} px lie {'partly ' * (edge == 'error')}"
            f"outside the image of {header.width} x {header.height} px, the first around spot "
            f"{first} at x = {x:.0f}, y = {y:.0f}",
            slide=slide,
            file=path,
            fix="check that image and coordinates belong together and that x comes before y"
            if edge != "error"
            else 'cut with edge="pad", "reflect" or "drop"',
        )
    return _Job(
        slide, path, header, scale, side, adata.obs_names[keep], xy[keep], inside[keep]
    )  # fmt: skip


# --------------------------------------------------------------------------- cutting

_Pixels = Callable[[int, int, int, int], np.ndarray]  # (y0, y1, x0, x1) -> uint8 (h, w, 3)


def _fill(store: _Store, jobs: list[_Job], settings: dict) -> tuple[pd.DataFrame, dict]:
    """Cut and store the tiles of every job; return the index and the facts per slide."""
    buffer = _buffer(jobs)
    rows, per_slide, start = [], {}, 0
    total = sum(len(job.spots) for job in jobs)
    with progress(total=total, desc="tiles", unit="tile", delay=1, leave=False) as bar:
        for job in jobs:
            pixels, sample = _open(job, buffer)
            glass = _glass(sample)
            table = _cut_slide(partial(_shifted, store, start), job, pixels, glass, settings, bar)
            table["row"] = np.arange(start, start + len(table))
            rows.append(table)
            per_slide[job.slide] = {
                "um_per_px": job.um_per_px,
                "side_px": job.side_px,
                "glass": glass.tolist(),
            }
            start += len(table)
    index = pd.concat(rows).rename_axis("spot")
    if index.index.has_duplicates:
        twice = index.index[index.index.duplicated()][0]
        raise DataError(f"the spot id {twice} stands twice", fix="make spot ids unique over slides")
    return index, per_slide


def _shifted(store: _Store, start: int, row: int, part: np.ndarray) -> None:
    """Store tiles of a slide whose first tile stands at `start`."""
    store(start + row, part)


def _buffer(jobs: list[_Job]) -> np.ndarray:
    """Return memory for the largest slide, to decode all of them into.

    Fresh memory takes the system longer than decoding does: it is asked for once, by two threads.
    """
    whole = [job.header for job in jobs if job.header.format != "TIFF"]
    sizes = [header.width * header.height for header in whole]
    buffer = np.empty(3 * max((n for n in sizes if n <= images.MAX_PIXELS), default=0), np.uint8)
    if buffer.size > _LARGE:
        pages = buffer[:: mmap.PAGESIZE]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda part: part.fill(0), np.array_split(pages, 2)))
    return buffer


def _open(job: _Job, buffer: np.ndarray) -> tuple[_Pixels, np.ndarray]:
    """Return a way to get pixels of a slide, and a sparse sample of all of them."""
    if job.header.format == "TIFF" and job.header.width * job.header.height > images.MAX_PIXELS:
        sample = images.read(job.path, max_side=_SAMPLE, slide=job.slide)
        return (
            lambda y0, y1, x0, x1: images.read_region(
                job.path, (x0, y0, x1, y1), slide=job.slide
            ),
            sample,
        )  # fmt: skip
    image = images.read(job.path, slide=job.slide, buffer=buffer)
    step = max(1, max(image.shape) // _SAMPLE)
    return lambda y0, y1, x0, x1: image[y0:y1, x0:x1], image[::step, ::step]


def _glass(sample: np.ndarray) -> np.ndarray:
    """Return the colour of the empty slide: the 99th percentile of each channel.

    Px of pure white are left out: they were painted (slides masked to their tissue) or saturated.
    """
    measured = sample[(sample < 255).any(axis=2)]
    if len(measured) < sample.shape[0] * sample.shape[1] / 100:
        return np.full(3, 255.0)
    return np.percentile(measured, 99, axis=0)


def _cut_slide(
    store: _Store, job: _Job, pixels: _Pixels, glass: np.ndarray, settings: dict, bar: tqdm
) -> pd.DataFrame:
    """Cut and store the tiles of one slide, in two threads; return their part of the index."""
    n, size, threads = len(job.spots), settings["size"], min(2, os.cpu_count() or 1)
    quality = np.empty((2, n))
    memory: SimpleQueue = SimpleQueue()
    for _ in range(threads):
        memory.put(np.empty((_CHUNK, size, size, 3), np.uint8))

    def work(begin: int) -> int:
        part = slice(begin, min(begin + _CHUNK, n))
        chunk = memory.get()
        try:
            out = chunk[: part.stop - begin]
            for tile, (x, y) in zip(out, job.xy[part], strict=True):
                _cut_one(tile, pixels, job, x, y, settings["edge"])
            quality[:, part] = _tissue(out, _darkest_glass(glass)), _focus(out)
            store(begin, out)
            return len(out)
        finally:
            memory.put(chunk)

    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(work, range(0, n, _CHUNK)):
            bar.update(done)
    return pd.DataFrame(
        {
            "slide": job.slide,
            "x_px": job.xy[:, 0],
            "y_px": job.xy[:, 1],
            "inside": job.inside,
            "tissue": quality[0],
            "focus": quality[1],
        },
        index=job.spots,
    )


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
    if left < right and top < bottom:
        window[top - y0 : bottom - y0, left - x0 : right - x0] = pixels(top, bottom, left, right)
    return window


def _mirror(start: int, stop: int, length: int) -> np.ndarray:
    """Fold positions back into ``[0, length)``, as ``np.pad(mode="reflect")`` does."""
    period = max(2 * (length - 1), 1)
    at = np.arange(start, stop) % period
    return np.minimum(at, period - at)


# --------------------------------------------------------------------------- quality


def tissue_fraction(
    array: np.ndarray, glass: Iterable[float] = (255.0, 255.0, 255.0)
) -> np.ndarray:
    """Measure the share of each tile that shows tissue.

    A px is tissue when its optical density ``-log10(value / glass)``, averaged over red, green and
    blue, is above `TISSUE_OD`. Optical density is proportional to the amount of stain (Beer and
    Lambert; Ruifrok and Johnston 2001). `glass` is the colour of the empty slide: `cut` measures it
    on each slide (99th percentile), because the glass of a real scan is not white. The threshold is
    the one that separates glass from tissue on the book's ten real slides; Otsu's would separate
    nuclei from the rest. White fat and the holes of ducts count as no tissue.

    Parameters
    ----------
    array
        uint8 ``(n, height, width, 3)``.
    glass
        Red, green and blue of the empty slide.

    Returns
    -------
    float64 ``(n,)``, from 0 to 1.
    """
    limit = _darkest_glass(glass)
    return _in_parts(lambda part: _tissue(part, limit), array)


def focus(array: np.ndarray) -> np.ndarray:
    """Measure how sharp each tile is: the variance of the Laplacian of its brightness.

    Pech-Pacheco et al. 2000, https://doi.org/10.1109/ICPR.2000.903548. A blurred tile has no sharp
    edges, so its second derivative hardly varies; nor does that of an empty tile. Values depend on
    the scale, so compare tiles of one setting and preferably of one slide.

    Parameters
    ----------
    array
        uint8 ``(n, height, width, 3)``, at least 3 px high and wide.

    Returns
    -------
    float64 ``(n,)``; 0 for a uniform tile, or one too small to tell.
    """
    return _in_parts(_focus, array)


def _in_parts(measure: Callable, array: np.ndarray) -> np.ndarray:
    """Measure a few tiles at a time, copied, so that a memory-mapped array is never whole here."""
    parts = (np.array(array[i : i + _CHUNK]) for i in range(0, len(array), _CHUNK))
    return np.concatenate([measure(part) for part in parts] or [np.empty(0)])


def _darkest_glass(glass: Iterable[float]) -> int:
    """Return the product of red, green and blue below which a px is tissue.

    The mean of logarithms is the logarithm of the product, so no px needs a logarithm.
    """
    return int(np.ceil(np.prod(np.asarray(glass, float)) * 10 ** (-3 * TISSUE_OD)))


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
def _focus(array):
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
