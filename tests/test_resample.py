"""resample: Pillow's bicubic result, at any fraction of a pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.tiles import resample, taps


def pillow(picture, box, size):
    """The reference: Pillow's resampling of a box with fractional corners."""
    image = Image.fromarray(picture)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def ours(picture, x, y, side, size):
    first_x, weights_x = taps(x, side, size)
    first_y, weights_y = taps(y, side, size)
    x0, y0 = int(first_x[0]), int(first_y[0])
    x1 = int(first_x[-1]) + weights_x.shape[1]
    y1 = int(first_y[-1]) + weights_y.shape[1]
    assert 0 <= x0 < x1 <= picture.shape[1]
    assert 0 <= y0 < y1 <= picture.shape[0]
    out = np.empty((size, size, 3), np.uint8)
    resample(picture[y0:y1, x0:x1], first_x - x0, weights_x, first_y - y0, weights_y, out)
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
    first, weights = taps(12.34, side, 96)
    assert np.allclose(weights.sum(1), 1, atol=1e-6)
    assert (np.diff(first) >= 0).all()
