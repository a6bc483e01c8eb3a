"""Resample a rectangle of an image to a square tile, at any fraction of a pixel.

Convolution-based bicubic resampling as Pillow does it (``Image.resize(..., BICUBIC, box=...)``):
Keys' cubic kernel with a = -0.5 (Keys 1981, https://doi.org/10.1109/TASSP.1981.1163711), widened
by the scale when shrinking, so that what is too fine for the tile is averaged and does not alias;
first along rows, rounded to 8 bits, then along columns.

Why not a library's: torch and OpenCV resample whole pixels only (a tile of 36.2 px would become 36,
moved by up to half a pixel), OpenCV's cubic aliases when shrinking, and Pillow takes two to four
times as long. The result is within 1 grey level of Pillow's.
"""

import numba
import numpy as np


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
