"""Windows around holes, and pixels in and out of the model's resolution."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmae_video.rendering.windows import Window, enlarge, place_windows, shrink, to_cells

RNG = np.random.default_rng(0)


def _covered(windows: list[Window], shape: tuple[int, int]) -> np.ndarray:
    covered = np.zeros(shape, dtype=bool)
    for window in windows:
        window.of(covered)[:] = True
    return covered


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 120), st.integers(8, 120), st.integers(0, 2**32 - 1), st.sampled_from(["auto", "whole", "tiles"]))
def test_windows_lie_in_the_frame_and_cover_every_hole(height: int, width: int, seed: int, mode: str) -> None:
    rng = np.random.default_rng(seed)
    hidden = np.zeros((height, width), dtype=bool)
    for _ in range(int(rng.integers(0, 6))):
        y, x = rng.integers(0, height), rng.integers(0, width)
        hidden[y : y + rng.integers(1, 30), x : x + rng.integers(1, 30)] = True
    windows = place_windows(hidden, (32, 32), 0.5, mode)
    assert all(w.top >= 0 and w.left >= 0 and w.top + w.height <= height and w.left + w.width <= width for w in windows)
    assert not (hidden & ~_covered(windows, hidden.shape)).any()
    assert bool(windows) == hidden.any()


def test_a_small_hole_gets_a_square_of_the_model_size_around_it() -> None:
    hidden = np.zeros((360, 640), dtype=bool)
    hidden[100:110, 300:320] = True
    (window,) = place_windows(hidden, (64, 64), 0.5)
    assert (window.height, window.width) == (64, 64)
    assert abs(window.top + 32 - 105) <= 1
    assert abs(window.left + 32 - 310) <= 1


def test_two_distant_holes_get_a_window_each_and_near_ones_share() -> None:
    hidden = np.zeros((200, 400), dtype=bool)
    hidden[50:60, 50:60] = hidden[50:60, 300:310] = True
    assert len(place_windows(hidden, (64, 64))) == 2
    hidden[50:60, 80:90] = True
    assert len(place_windows(hidden, (64, 64))) == 2


def test_a_large_hole_is_filled_in_a_look_at_the_whole_frame() -> None:
    hidden = np.zeros((100, 300), dtype=bool)
    hidden[10:90, 10:290] = True
    assert place_windows(hidden, (64, 64)) == [Window(0, 0, 100, 300)]


def test_shrink_lets_nothing_hidden_through() -> None:
    rgb = RNG.integers(0, 256, (90, 130, 3), dtype=np.uint8)
    hidden = RNG.random((90, 130)) < 0.4
    other = rgb.copy()
    other[hidden] = RNG.integers(0, 256, (int(hidden.sum()), 3))
    for size in ((32, 48), (90, 130), (120, 200)):
        np.testing.assert_array_equal(shrink(rgb, hidden, size), shrink(other, hidden, size))


def test_shrink_is_the_mean_of_the_visible_pixels() -> None:
    rgb = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    hidden = np.zeros((8, 8), dtype=bool)
    hidden[0, 0] = hidden[1, 1] = hidden[4:6, 4:6] = True
    small = shrink(rgb, hidden, (4, 4))
    for i, j in np.ndindex(4, 4):
        block, keep = rgb[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], ~hidden[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        expected = block[keep].mean(0) if keep.any() else np.zeros(3)
        np.testing.assert_allclose(small[i, j], expected, atol=1)


def test_to_cells_rounds_outwards() -> None:
    hidden = np.zeros((50, 90), dtype=bool)
    hidden[9, 10] = True
    cells = to_cells(hidden, (5, 9))
    assert cells.sum() == 1
    assert cells[0, 1]
    hidden[9:11, 10:21] = True
    assert to_cells(hidden, (5, 9)).sum() == 4  # two rows, two columns


def test_enlarge_of_the_same_size_is_the_same() -> None:
    rgb = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(enlarge(rgb, (16, 16)), rgb)
    assert enlarge(rgb, (40, 30)).shape == (40, 30, 3)
