"""What moves against the scene is told from it, and lets an object be followed that its motion alone does not tell."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import pytest

from diffmae_video.rendering.follow import follow_object
from diffmae_video.rendering.follower import object_in_box
from diffmae_video.rendering.moving import Scene

HEIGHT, WIDTH, COUNT = 144, 192, 24


def texture(seed: int, height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(40, 216, (height // 6, width // 6, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


@cache
def walk() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Frames and masks: a body walks to the right, its leg swings ahead of it and back; the view moves to the right."""
    wide = texture(1, HEIGHT, WIDTH + 2 * COUNT)
    frames, masks = [], []
    for n in range(COUNT):
        frame, mask = wide[:, 2 * n : 2 * n + WIDTH].copy(), np.zeros((HEIGHT, WIDTH), np.uint8)
        x = 20 + 6 * n
        cv2.rectangle(mask, (x, 20), (x + 30, 80), 1, -1)
        swing = 40 * np.sin(2 * np.pi * n / 8)
        foot = (int(x + 15 + swing), 130)
        cv2.line(mask, (x + 15, 80), foot, 1, 12)
        frame[mask > 0] = (30, 30, 60)
        frames.append(cv2.GaussianBlur(frame, (0, 0), 0.7))
        masks.append(mask > 0)
    return frames, masks


def agreement(one: np.ndarray, two: np.ndarray) -> float:
    return float((one & two).sum() / max(1, (one | two).sum()))


def test_a_walker_is_told_from_the_scene() -> None:
    frames, masks = walk()
    scene = Scene(frames)
    for number in (4, 12, 19):
        found = scene.moving(number, (HEIGHT, WIDTH))
        near = cv2.dilate(masks[number].view(np.uint8), np.ones((9, 9), np.uint8)) > 0
        inner = cv2.erode(masks[number].view(np.uint8), np.ones((5, 5), np.uint8)) > 0
        assert (found[inner] > 0).mean() > 0.9
        assert (found[~near] > 0).mean() < 0.05
        assert found.min() >= -1
        assert found.max() <= 1


def test_it_can_be_asked_at_another_size() -> None:
    frames, _ = walk()
    scene = Scene(frames)
    large = scene.moving(9, (2 * HEIGHT, 2 * WIDTH))
    assert large.shape == (2 * HEIGHT, 2 * WIDTH)
    assert np.abs(large[::2, ::2] - scene.moving(9, (HEIGHT, WIDTH))).mean() < 0.1


@pytest.mark.parametrize("count", [1, 4])
def test_few_frames_say_nothing(count: int) -> None:
    frames, _ = walk()
    np.testing.assert_array_equal(Scene(frames[:count]).moving(0, (HEIGHT, WIDTH)), 0)


def test_frames_behind_a_cut_say_nothing() -> None:
    other = [texture(7, HEIGHT, WIDTH)] * 12
    frames, _ = walk()
    cut = Scene([*other, *frames])
    np.testing.assert_array_equal(cut.moving(15, (HEIGHT, WIDTH)), Scene(frames).moving(3, (HEIGHT, WIDTH)))


def test_limbs_that_move_on_their_own_are_followed() -> None:
    frames, masks = walk()
    found = follow_object(frames, {8: masks[8]})
    assert found.notes == []
    assert min(agreement(found(n), masks[n]) for n in range(COUNT)) > 0.75


def test_a_box_finds_what_moves_in_it_rather_than_a_colour_that_stands_out() -> None:
    wide = texture(1, HEIGHT, WIDTH + 2 * COUNT)
    wide[40:120, 90:150] = (230, 20, 20)  # a red wall
    skin = texture(5, HEIGHT, WIDTH)
    frames, masks = [], []
    for n in range(COUNT):
        frame = wide[:, 2 * n : 2 * n + WIDTH].copy()
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        mask[30:115, 6 * n : 6 * n + 28] = True
        frame[mask] = np.roll(skin, 6 * n, axis=1)[mask]
        frames.append(frame)
        masks.append(mask)
    box = np.zeros((HEIGHT, WIDTH), dtype=bool)
    box[26:119, 55:120] = True  # the thing at 72 to 100, and much of the wall
    plain = object_in_box(frames[12], box, np.zeros((HEIGHT, WIDTH), np.float32))
    found = object_in_box(frames[12], box, Scene(frames).moving(12, (HEIGHT, WIDTH)))
    assert agreement(plain, masks[12]) < 0.6
    assert agreement(found, masks[12]) > 0.8
