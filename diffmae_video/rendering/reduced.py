"""A clip at the resolution at which a model will look at its hole, without anything that is hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from diffmae_video.rendering.windows import Window, place_windows, shrink

PIXELS = 2**25
"""Pixels that are held of a reduced clip, at most: of larger frames what lies around the hole, of longer clips
stretches of frames, evenly spread."""


@dataclass(frozen=True)
class Look:
    """Where a model will look at a hole: a window of some frames."""

    first: int
    """First frame."""
    window: Window
    """In pixels of the source."""


@dataclass(frozen=True)
class ReducedClip:
    """A clip at the resolution of a model's windows."""

    frames: np.ndarray
    """uint8 (T, H', W', 3): each the mean of the visible pixels it covers, black where there is none."""
    hidden: np.ndarray
    """bool (T, H', W'), True where a hidden pixel is covered."""
    starts: np.ndarray
    """int64 (S,): frames at which a window of the span may begin, all of it inside one stretch."""
    holes: np.ndarray
    """bool (K, T', h, w): shapes of what the model will have to fill, as they lie in its windows."""


def plan_looks(
    asked: Callable[[int], np.ndarray],
    frames: int,
    span: int,
    size: tuple[int, int],
    margin: float = 0.5,
    mode: str = "auto",
) -> list[Look]:
    """Where a model will look, span by span; holes of a span get a window each (`windows.place_windows`).

    Args:
        asked: what is to be filled of a frame, bool (H, W).
        frames: of the clip.
        span: frames of the clip that a window covers.
        size, margin, mode: see `place_windows`.
    """
    looks = []
    for first in range(0, frames, span):
        union = asked(first).copy()
        for number in range(first + 1, min(first + span, frames)):
            union |= asked(number)
        looks += [Look(first, window) for window in place_windows(union, size, margin, mode)]
    return looks


def window_size(looks: Sequence[Look], size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Height and width for a model: those of the shape of the largest window, with about as many pixels as `size`."""
    window = largest(looks)
    if abs(window.height / window.width - size[0] / size[1]) < 0.05:
        return size
    scale = (size[0] * size[1] / (window.height * window.width)) ** 0.5
    sides = [max(2, round(side * scale / patch)) * patch for side in (window.height, window.width)]
    return sides[0], sides[1]


def largest(looks: Sequence[Look]) -> Window:
    """The window that covers most; its scale is that of the reduced clip."""
    return max((look.window for look in looks), key=lambda window: window.height * window.width)


def reduce_clip(
    pictures: Iterable[np.ndarray],
    hidden: Callable[[int], np.ndarray],
    asked: Callable[[int], np.ndarray],
    looks: Sequence[Look],
    count: int,
    shape: tuple[int, int, int],
    stride: int = 1,
) -> ReducedClip:
    """Bring a clip to the resolution at which a model looks at its largest hole.

    Args:
        pictures: uint8 (H, W, 3), all frames of the clip, read once.
        hidden: what is hidden of a frame, bool (H, W): neither read nor scored.
        asked: what of that the model will have to fill.
        looks: from `plan_looks`, at least one.
        count: frames of the clip.
        shape: frames, height and width of the model's clips.
        stride: frames of the clip between those of a window.
    """
    window = largest(looks)
    scale = shape[1] / window.height, shape[2] / window.width
    span = (shape[0] - 1) * stride + 1
    kept: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    starts: list[int] = []
    area, size, stretches = (slice(0), slice(0)), (0, 0), list[range]()
    for number, rgb in enumerate(pictures):
        if not stretches:
            area = _around(window, rgb.shape[:2], (PIXELS / (2 * span * scale[0] * scale[1])) ** 0.5)
            rows, columns = (part.stop - part.start for part in area)
            size = max(shape[1], round(rows * scale[0])), max(shape[2], round(columns * scale[1]))
            stretches = _stretches(count, span, PIXELS // (size[0] * size[1]))
        inside = next((part for part in stretches if number in part), None)
        if inside is None:
            continue
        if number + span <= inside.stop or not starts:  # a clip that is shorter than a window repeats its last frame
            starts.append(len(kept))
        mask = hidden(number)[area]
        kept.append(shrink(rgb[area], mask, size))
        masks.append(touched(mask, size))
    holes = [_hole(asked, look, count, shape, stride) for look in looks]
    found = np.stack([hole for hole in holes if hole.any()])
    return ReducedClip(np.stack(kept), np.stack(masks), np.array(starts, dtype=np.int64), found)


def _around(window: Window, frame: tuple[int, ...], most: float) -> tuple[slice, slice]:
    """Rows and columns around the middle of a window, at most `most` of each, and no fewer than the window's."""
    places = ((window.top, window.height), (window.left, window.width))
    sides = [min(length, max(side, int(most))) for (_, side), length in zip(places, frame, strict=True)]
    starts = [
        min(max(first + (side - new) // 2, 0), length - new)
        for (first, side), new, length in zip(places, sides, frame, strict=True)
    ]
    return slice(starts[0], starts[0] + sides[0]), slice(starts[1], starts[1] + sides[1])


def _hole(
    asked: Callable[[int], np.ndarray], look: Look, count: int, shape: tuple[int, int, int], stride: int
) -> np.ndarray:
    """What is to be filled in a window, at the model's resolution: bool (T', h, w)."""
    frames = [min(look.first + stride * place, count - 1) for place in range(shape[0])]
    return np.stack([touched(look.window.of(asked(frame)), (shape[1], shape[2])) for frame in frames])


def _stretches(count: int, span: int, most: int) -> list[range]:
    """Stretches of frames that are held: one of all where they fit, else as many of two windows each as fit."""
    if count <= most:
        return [range(count)]
    length = 2 * span
    number = max(1, most // length)
    first = np.linspace(0, count - length, number).round().astype(int) if number > 1 else [(count - length) // 2]
    return [range(int(at), int(at) + length) for at in first]


def touched(hidden: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which pixels of a picture brought to `size` cover a hidden one: bool (h, w)."""
    if hidden.shape == size:
        return hidden.copy()
    shrinks = size[0] < hidden.shape[0] or size[1] < hidden.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(hidden.astype(np.float32), (size[1], size[0]), interpolation=method) > 0
