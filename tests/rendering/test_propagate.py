"""Propagation: hidden places are taken from the frames that show them, exactly where that is possible."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from diffmae_video.rendering.candidates import Region, soonest
from diffmae_video.rendering.motion import View, fit_motion, neighbour_motion, sane, spread
from diffmae_video.rendering.propagate import PropagateSettings, Propagator, boxes

HEIGHT, WIDTH = 72, 96
QUICK = PropagateSettings(window=10, candidates=6)


def picture(seed: int, height: int = 140, width: int = 260, channels: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    """A smooth coloured texture, uint8 (height, width, 3); channels that are not named stay dark."""
    draw = np.random.default_rng(seed)
    noise = sum(
        cv2.resize(draw.uniform(-1, 1, (height // cell, width // cell, 3)).astype(np.float32), (width, height)) * cell
        for cell in (4, 8, 16)
    )
    noise = cv2.GaussianBlur(noise, (0, 0), 1.0)
    levels = 128 + 100 * noise / np.abs(noise).max()
    dark = [c for c in range(3) if c not in channels]
    levels[..., dark] = 10
    return levels.astype(np.uint8)


def panned(scene: np.ndarray, count: int, step: int = 3) -> list[np.ndarray]:
    """A camera that moves over a picture by whole pixels."""
    return [scene[20 : 20 + HEIGHT, 10 + step * n : 10 + step * n + WIDTH].copy() for n in range(count)]


def moving_holes(count: int, step: int = 4) -> list[np.ndarray]:
    """A disc that moves to the right, and comes in again."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    places = [24 + step * n % (WIDTH - 48) for n in range(count)]
    return [(rows - 36) ** 2 + (columns - x) ** 2 < 11**2 for x in places]


def still_holes(count: int) -> list[np.ndarray]:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return [(rows - 36) ** 2 + (columns - 48) ** 2 < 11**2] * count


def run(
    frames: list[np.ndarray], holes: list[np.ndarray], settings: PropagateSettings = QUICK
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Result (T, H, W, 3), seen and confidence (T, H, W), of frames whose hidden pixels are magenta."""
    masked = np.where(np.stack(holes)[..., None], np.array([255, 0, 255], np.uint8), np.stack(frames))
    answers = list(Propagator(settings).stream(zip(range(len(frames)), masked, holes, strict=True)))
    assert [number for number, *_ in answers] == list(range(len(frames)))
    return tuple(np.stack([answer[k] for answer in answers]) for k in (1, 2, 3))  # type: ignore[return-value]


def miss(result: np.ndarray, frames: list[np.ndarray], where: np.ndarray) -> np.ndarray:
    """Largest difference of the channels at the places: int (N,)."""
    return np.abs(result.astype(int) - np.stack(frames)).max(-1)[where]


def test_a_pan_shows_what_a_still_hole_hides() -> None:
    frames, holes = panned(picture(0), 24), still_holes(24)
    result, seen, confidence = run(frames, holes)
    assert seen[np.stack(holes)].mean() > 0.95
    assert (miss(result, frames, seen) <= 2).mean() > 0.99
    assert confidence[seen].mean() > 0.7


def test_a_still_scene_comes_back_exactly() -> None:
    frames, holes = [picture(1)[:HEIGHT, :WIDTH]] * 16, moving_holes(16)
    result, seen, _ = run(frames, holes)
    np.testing.assert_array_equal(seen, np.stack(holes))
    np.testing.assert_array_equal(result, np.stack(frames))


def test_visible_pixels_keep_their_bits_and_hidden_ones_are_never_read() -> None:
    frames, holes = panned(picture(2), 12), moving_holes(12)
    noise = np.random.default_rng(0).integers(0, 256, (12, HEIGHT, WIDTH, 3), dtype=np.uint8)
    given = np.where(np.stack(holes)[..., None], noise, np.stack(frames))
    answers = list(Propagator(QUICK).stream(zip(range(12), given, holes, strict=True)))
    result, seen, confidence = run(frames, holes)
    for number, (_, rgb, shown, sure) in enumerate(answers):
        np.testing.assert_array_equal(rgb[~holes[number]], frames[number][~holes[number]])
        np.testing.assert_array_equal(shown, seen[number])
        np.testing.assert_array_equal(sure, confidence[number])
        np.testing.assert_array_equal(rgb[shown], result[number][shown])
        assert not (shown & ~holes[number]).any()
    np.testing.assert_array_equal(given[~np.stack(holes)], np.stack(frames)[~np.stack(holes)])


def test_a_cut_is_never_crossed() -> None:
    frames = panned(picture(3, channels=(0,)), 9) + panned(picture(4, channels=(2,)), 9)
    holes = moving_holes(18)
    result, seen, _ = run(frames, holes)
    assert seen[:9].any()
    assert seen[9:].any()
    assert result[:9, ..., 2][seen[:9]].max() < 30  # the second shot is blue
    assert result[9:, ..., 0][seen[9:]].max() < 30  # the first one red
    assert neighbour_motion(View(8, frames[8], holes[0]), View(9, frames[9], holes[0])) is None


def test_a_thing_that_moves_before_a_plain_wall_does_not_move_the_view() -> None:
    """All corners lie on the thing."""
    scene = picture(7)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    wall = np.repeat((110 + 20 * np.sin(rows / 9) + 15 * np.sin(columns / 7))[..., None], 3, -1).astype(np.uint8)
    frames = []
    for n in range(2):
        thing = (slice(20, 52), slice(30 + 3 * n, 62 + 3 * n))
        frames.append(wall.copy())
        frames[n][thing] = scene[40:72, 40:72]
    none = np.zeros((HEIGHT, WIDTH), bool)
    motion = neighbour_motion(*(View(n, frame, none) for n, frame in enumerate(frames)))
    np.testing.assert_array_equal(motion, np.eye(3))


def test_the_frames_that_show_a_place_soonest_are_looked_at() -> None:
    frames, holes = [picture(1)[:HEIGHT, :WIDTH]] * 16, moving_holes(16)
    views = [View(n, frame, hole) for n, (frame, hole) in enumerate(zip(frames, holes, strict=True))]
    others = sorted(((view, np.eye(3)) for view in views if view.number != 8), key=lambda one: abs(one[0].number - 8))
    (box,) = boxes(holes[8])
    chosen = {others[k][0].number for k in soonest(Region(views[8], box), others, [], 12)}
    shows = {n: ~holes[n] & holes[8] for n in range(16) if n != 8}
    nearest = {n: abs(n - 8) for n in shows}
    for y, x in np.argwhere(holes[8])[::7]:
        soon = min(nearest[n] for n in shows if shows[n][y, x])
        assert any(shows[n][y, x] and nearest[n] <= soon + 1 for n in chosen)
    assert len(chosen) < 8  # and not all


def test_what_no_frame_shows_is_not_seen() -> None:
    frames, holes = [picture(5)[:HEIGHT, :WIDTH]] * 8, still_holes(8)
    result, seen, confidence = run(frames, holes)
    assert not seen.any()
    assert not confidence.any()
    assert (result[np.stack(holes)] == (255, 0, 255)).all()  # as they came


def test_frames_hidden_whole_or_not_at_all() -> None:
    frames = panned(picture(6), 6)
    whole, none = np.ones((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)
    _, seen, _ = run(frames, [none, whole, none, whole, whole, none])
    assert not seen.any()
    assert list(Propagator(QUICK).stream(iter(()))) == []
    (number, rgb, seen_, confidence), *rest = Propagator(QUICK).stream([(7, frames[0], none)])
    assert (number, rest, seen_.any(), confidence.any()) == (7, [], False, False)
    np.testing.assert_array_equal(rgb, frames[0])


def turned(scene: np.ndarray, count: int) -> list[np.ndarray]:
    """A view that turns, moves and comes nearer."""
    frames = []
    for n in range(count):
        move = cv2.getRotationMatrix2D((130, 70), 1.2 * n, 1 + 0.012 * n)
        move[:, 2] -= (80 - 1.5 * n, 34)
        frames.append(cv2.warpAffine(scene, move, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC))
    return frames


def test_zoom_and_rotation_are_followed() -> None:
    frames, holes = turned(picture(7), 14), moving_holes(14)
    result, seen, _ = run(frames, holes)
    assert seen[np.stack(holes)].mean() > 0.95
    assert np.mean(miss(result, frames, seen)) < 3


def test_a_fade_is_taken_up() -> None:
    scene = picture(8)[:HEIGHT, :WIDTH]
    frames = [(scene * (1 - 0.05 * n) + 0.5).astype(np.uint8) for n in range(12)]
    holes = moving_holes(12)
    result, seen, _ = run(frames, holes)
    assert seen[np.stack(holes)].mean() > 0.95
    assert np.mean(miss(result, frames, seen)) < 3


def test_what_passes_before_the_scene_is_not_copied() -> None:
    """A bright ball crosses: not where the hole is, but in some frames that show the place."""
    scene = picture(9)[:HEIGHT, :WIDTH]
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    frames, holes = [], []
    for n in range(20):
        frame = scene.copy()
        frame[(rows - 36) ** 2 + (columns - (-10 + 6 * n)) ** 2 < 8**2] = (250, 250, 250)
        frames.append(frame)
        holes.append((rows - 36) ** 2 + (columns - 48) ** 2 < 10**2 if n in (3, 4, 16, 17) else np.zeros_like(rows) > 0)
    result, seen, _ = run(frames, holes, PropagateSettings(window=20))
    assert seen[np.stack(holes)].mean() > 0.95
    assert miss(result, frames, seen).max() < 20  # the ball differs by 100


@pytest.mark.parametrize(
    ("settings", "reached"),
    [
        (PropagateSettings(window=3, candidates=2), 3),
        (PropagateSettings(window=30, candidates=2, memory=11 * 7 * HEIGHT * WIDTH), 5),  # 7 bytes a pixel, 11 frames
        (PropagateSettings(window=30, candidates=2, memory=0), 2),
    ],
    ids=["window", "memory", "least"],
)
def test_memory_is_bounded_by_the_window(settings: PropagateSettings, reached: int) -> None:
    scene, alive, most, done = picture(10, width=400), [], 0, 0

    def frames() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for n in range(30):
            rgb = scene[:HEIGHT, 3 * n : 3 * n + WIDTH].copy()
            alive.append(weakref.ref(rgb))
            yield n, rgb, still_holes(1)[0]

    for number, *_ in Propagator(settings).stream(frames()):
        assert len(alive) <= number + reached + 1  # no further ahead than the window
        most, done = max(most, sum(one() is not None for one in alive)), done + 1
    assert 2 * reached + 1 <= most <= 2 * reached + 2  # and one on its way in
    assert done == 30


@pytest.mark.parametrize(
    ("height", "width", "reached"), [(480, 854, 30), (1080, 1920, 30), (2160, 3840, 8), (4320, 7680, 2)]
)
def test_large_frames_are_held_in_smaller_numbers(height: int, width: int, reached: int) -> None:
    assert PropagateSettings().reach(height, width) == reached


def test_the_number_of_threads_changes_nothing() -> None:
    frames, holes = turned(picture(11), 8), moving_holes(8)
    before, results = cv2.getNumThreads(), []
    try:
        for threads in (1, 2, 4):
            cv2.setNumThreads(threads)
            results.append(run(frames, holes))
            assert cv2.getNumThreads() == threads
    finally:
        cv2.setNumThreads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


# --- motion ----------------------------------------------------------------------------------------------------------


def still(rgb: np.ndarray) -> View:
    return View(0, rgb, np.zeros(rgb.shape[:2], dtype=bool))


def test_the_simplest_motion_that_fits_is_taken() -> None:
    scene = picture(12)
    a = scene[20 : 20 + HEIGHT, 10 : 10 + WIDTH]
    np.testing.assert_array_equal(neighbour_motion(still(a), still(a.copy())), np.eye(3))
    shifted = neighbour_motion(still(a), still(scene[18 : 18 + HEIGHT, 13 : 13 + WIDTH].copy()))
    np.testing.assert_allclose(shifted, [[1, 0, -3], [0, 1, 2], [0, 0, 1]], atol=0.05)


def test_a_homography_is_found_among_wrong_points() -> None:
    draw = np.random.default_rng(0)
    true = np.array([[1.05, 0.02, 4.0], [-0.03, 0.97, -2.0], [2e-4, -1e-4, 1.0]])
    p = draw.uniform((0, 0), (WIDTH, HEIGHT), (200, 2)).astype(np.float32)
    q = cv2.perspectiveTransform(p[:, None], true)[:, 0].astype(np.float32)
    q[:60] += draw.normal(0, 20, (60, 2)).astype(np.float32)
    np.testing.assert_allclose(fit_motion(p, q, (HEIGHT, WIDTH)), true, rtol=0.02, atol=0.05)


def test_motions_that_no_camera_makes_are_refused() -> None:
    assert sane(np.eye(3), (HEIGHT, WIDTH))
    assert not sane(np.diag([-1.0, 1.0, 1.0]), (HEIGHT, WIDTH))  # a mirror
    assert not sane(np.diag([9.0, 9.0, 1.0]), (HEIGHT, WIDTH))
    assert not sane(np.full((3, 3), np.nan), (HEIGHT, WIDTH))
    assert fit_motion(*np.random.default_rng(0).uniform(0, 70, (2, 40, 2)).astype(np.float32), (HEIGHT, WIDTH)) is None


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (31, 17), (64, 64)])
def test_spread_keeps_what_is_known(shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(0)
    values = draw.uniform(-5, 5, (*shape, 3)).astype(np.float32)
    weight = (draw.uniform(size=shape) < 0.3).astype(np.float32)
    weight[0, 0] = 1
    full = spread(values, weight)
    np.testing.assert_array_equal(full[weight == 1], values[weight == 1])
    low, high = values[weight == 1].min(0), values[weight == 1].max(0)
    assert (full >= low - 1e-4).all()
    assert (full <= high + 1e-4).all()
    np.testing.assert_allclose(spread(np.full((*shape, 1), 3, np.float32), weight), 3, rtol=1e-5)


def test_boxes_around_holes() -> None:
    hidden = np.zeros((200, 300), dtype=bool)
    hidden[20:30, 20:30] = hidden[25:40, 60:70] = hidden[150:190, 200:280] = True
    assert boxes(hidden) == [(slice(4, 56), slice(4, 86)), (slice(118, 200), slice(168, 300))]
    assert boxes(np.zeros((5, 5), dtype=bool)) == []
