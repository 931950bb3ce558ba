"""A mask follows an object that is drawn, so that the truth is known."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import pytest

from diffmae_video.rendering.follow import Followed, follow_object
from diffmae_video.rendering.follower import object_in_box
from diffmae_video.rendering.frame_store import FrameStore, shrunk

HEIGHT, WIDTH, COUNT = 96, 128, 14
NOTHING = np.zeros((HEIGHT, WIDTH), dtype=bool)


def texture(seed: int, size: int, low: int, high: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
    smooth = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    return low + smooth * (high - low) / 255


@cache
def scene(view: int = 0, pace: float = 3.0, growth: float = 0.4) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Frames and masks: a dark ball that grows and moves to the right, over a bright place whose view moves left."""
    wide, skin = texture(view, 256, 90, 255), texture(90, 128, 0, 120)
    frames, masks = [], []
    for n in range(COUNT):
        x, radius = 35 + pace * n, (15 if growth > 0 else 22) + growth * n
        y, columns = np.mgrid[:HEIGHT, :WIDTH]
        inside = (columns - x) ** 2 + (y - 48) ** 2 < radius**2
        frame = wide[60 : 60 + HEIGHT, 20 + 2 * n : 20 + 2 * n + WIDTH].copy()
        grown = 15 / radius
        own = np.array([[grown, 0, 64 - x * grown], [0, grown, 64 - 48 * grown]])
        back = cv2.invertAffineTransform(own)
        frame[inside] = cv2.warpAffine(skin, back, (WIDTH, HEIGHT))[inside]
        frames.append(frame.clip(0, 255).astype(np.uint8))
        masks.append(inside)
    return frames, masks


def agreement(found: Followed, masks: list[np.ndarray]) -> list[float]:
    return [float((found(n) & one).sum() / max(1, (found(n) | one).sum())) for n, one in enumerate(masks)]


def test_an_object_is_followed_forwards_and_backwards_from_the_frame_that_was_marked() -> None:
    frames, masks = scene()
    found = follow_object(frames, {6: masks[6]})
    assert min(agreement(found, masks)) > 0.85
    np.testing.assert_array_equal(found(6), masks[6])
    assert found.notes == []


def test_large_frames_are_followed_in_small_and_masks_come_back_large() -> None:
    frames, masks = scene()
    large = [cv2.resize(frame, (6 * WIDTH, 6 * HEIGHT)) for frame in frames[:4]]
    truth = [cv2.resize(one.view(np.uint8), (6 * WIDTH, 6 * HEIGHT)).view(bool) for one in masks[:4]]
    assert min(agreement(follow_object(large, {0: truth[0]}), truth)) > 0.85


def test_following_stops_at_a_cut_and_says_so() -> None:
    frames, masks = [*scene()[0][:7], *scene(view=1)[0][7:]], scene()[1]
    for number, frame in enumerate(scene(view=1)[0][7:], start=7):  # the ball's colours go on
        frames[number] = np.roll(frame, 40, axis=0)
    found = follow_object(frames, {2: masks[2]}, fps=10.0, again="Mark it")
    assert min(agreement(found, masks[:7])) > 0.85
    assert not any(found(n).any() for n in range(7, COUNT))
    assert found.notes == [
        "The object of frame 2 is lost in frames 7 to 13 (from 0.70 s): the clip cuts to another shot. Nothing is "
        "hidden there; Mark it."
    ]


def test_an_object_that_vanishes_is_lost_and_not_replaced_by_the_background() -> None:
    frames, masks = list(scene()[0]), scene()[1]
    wide = texture(0, 256, 90, 255).clip(0, 255).astype(np.uint8)
    for n in range(8, COUNT):
        frames[n] = wide[60 : 60 + HEIGHT, 20 + 2 * n : 20 + 2 * n + WIDTH]
    found = follow_object(frames, {2: masks[2]})
    assert not any(found(n).any() for n in range(9, COUNT))
    assert len(found.notes) == 1
    assert "lost in frames" in found.notes[0]


def test_marks_correct_one_another_and_an_empty_one_ends_it() -> None:
    frames, masks = scene()
    wrong = np.roll(masks[0], 30, axis=0)
    found = follow_object(frames, {0: wrong, 8: masks[8], 12: NOTHING})
    np.testing.assert_array_equal(found(0), wrong)
    assert min(agreement(found, masks)[5:11]) > 0.85  # nearer to the right one
    assert not any(found(n).any() for n in (11, 12, 13))


def test_the_next_mark_takes_over_where_one_is_lost() -> None:
    frames, masks = [*scene(view=1)[0][:2], *scene()[0][2:]], scene()[1]
    found = follow_object(frames, {0: masks[0], 12: masks[12]})
    assert min(agreement(found, masks)[2:]) > 0.85  # frames 2 to 6 are nearer to the first mark


def test_it_is_said_where_what_is_followed_is_much_smaller_or_larger_than_what_was_marked() -> None:
    frames, masks = scene(growth=-1.0)
    areas = [int(one.sum()) for one in masks]
    small = follow_object(frames, {0: masks[0]}, fps=10.0, again="mark it")
    first = next(n for n in range(COUNT) if 3 * small(n).sum() < areas[0])
    assert small.notes == [
        f"What is followed is less than a third as large as what was marked in frame 0, in {COUNT - first} of the "
        f"frames, first in {first} ({first / 10:.2f} s): look whether all of the object is hidden there; if not, mark "
        "it."
    ]
    large = follow_object(frames, {COUNT - 1: masks[-1]})
    assert len(large.notes) == 1
    assert "more than three times as large as what was marked in frame 13" in large.notes[0]
    assert follow_object(frames, {0: masks[0], COUNT - 1: masks[-1]}).notes == []  # a second mark looks at it


def test_what_is_marked_must_lie_in_the_clip() -> None:
    with pytest.raises(ValueError, match="mark one among them"):
        follow_object(scene()[0], {COUNT: NOTHING})


def test_a_box_finds_what_stands_out_in_it() -> None:
    frames, masks = scene()
    box = NOTHING.copy()
    rows, columns = (np.flatnonzero(masks[3].any(axis)) for axis in (1, 0))
    box[rows[0] - 3 : rows[-1] + 4, columns[0] - 3 : columns[-1] + 4] = True
    nothing = np.zeros((HEIGHT, WIDTH), np.float32)
    found = object_in_box(frames[3], box, nothing)
    assert (found & masks[3]).sum() / (found | masks[3]).sum() > 0.85
    plain = np.full_like(frames[3], 128)
    np.testing.assert_array_equal(object_in_box(plain, box, nothing), box)  # nothing stands out: all of the box


def test_a_store_gives_frames_in_any_order() -> None:
    store = FrameStore(64)
    for frame in scene()[0]:
        store.add(frame)
    assert len(store) == COUNT
    for number in (5, 0, COUNT - 1):
        small = shrunk(scene()[0][number], 64)
        assert store[number].shape == small.shape == (48, 64, 3)
        assert np.abs(store[number].astype(int) - small).mean() < 6
    with pytest.raises(IndexError):
        store[COUNT]
    store.close()
