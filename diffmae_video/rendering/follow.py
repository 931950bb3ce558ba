"""A mask of one frame follows its object through the clip, forwards and backwards.

Several marked frames are corrections of one another: each frame takes what was followed from the nearest. Following
ends at a cut, and where the object cannot be recognised: its flow does not lead back, its size jumps, or its colours
are no longer those of the frame that was marked (see `follower`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from diffmae_video.rendering.follower import SIDE, Follower, at_edge
from diffmae_video.rendering.frame_store import shrunk
from diffmae_video.rendering.motion import one_thread
from diffmae_video.rendering.moving import Scene

SIZES = 3.0
"""Change of an object's area since it was marked above which somebody should look."""


@dataclass
class Followed:
    """Where an object is, frame by frame."""

    shape: tuple[int, int]
    """Height and width of the masks."""
    frames: int
    packed: dict[int, np.ndarray] = field(default_factory=dict)
    """Frame -> bits of its mask, without empty rows at the top and bottom behind two numbers; absent where empty."""
    notes: list[str] = field(default_factory=list)
    """Where it was followed and why it ended, in words."""

    def set(self, number: int, hidden: np.ndarray) -> None:
        """Keep a mask bool (H, W)."""
        rows = np.flatnonzero(hidden.any(1))
        self.packed.pop(number, None)
        if len(rows):
            first, last = int(rows[0]), int(rows[-1]) + 1
            bits = np.packbits(hidden[first:last])
            self.packed[number] = np.concatenate([np.array([first, last], np.int32).view(np.uint8), bits])

    def __call__(self, number: int) -> np.ndarray:
        """The mask of a frame, bool (H, W); empty where the object is not seen."""
        hidden = np.zeros(self.shape, dtype=bool)
        if number in self.packed:
            kept = self.packed[number]
            first, last = kept[:8].view(np.int32).tolist()
            size = (last - first) * self.shape[1]
            hidden[first:last] = np.unpackbits(kept[8:], count=size).view(bool).reshape(last - first, -1)
        return hidden


def follow_object(
    frames: Sequence[np.ndarray],
    keys: Mapping[int, np.ndarray],
    *,
    span: tuple[int, int] | None = None,
    again: str = "mark it again there",
    fps: float | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Followed:
    """Follow what is marked in one or more frames through a clip.

    Each frame takes the mask that was followed from the nearest marked frame, or from the next one where that was lost.

    Args:
        frames: uint8 (h, w, 3) each, of one size, in any order at hand; larger ones than SIDE are made smaller.
        keys: frame number -> all of the object in it, bool (H, W) at the clip's size; an empty one says that it is not
            there, and nothing is hidden as far as that frame is the nearest.
        span: first and last frame to follow it to; the whole clip without it.
        again: what to do where it was lost, in words.
        fps: to tell times beside frame numbers.
        progress: called with the number of frames just done.

    Returns:
        The masks, at the keys' size.

    Raises:
        ValueError: no key, or one outside the frames.
    """
    first, last = span or (0, len(frames) - 1)
    numbers = sorted(keys)
    if not numbers or not first <= numbers[0] <= numbers[-1] <= last < len(frames):
        raise ValueError(f"marked frames {numbers} of frames {first} to {last}; mark one among them")
    found = Followed(next(iter(keys.values())).shape, len(frames))
    for number in numbers:
        found.set(number, keys[number])
    told = _Teller(found.notes, again, fps)
    progress(len(numbers))
    scene = Scene(frames)
    with one_thread():
        _Walk(frames, scene, keys, numbers[0], -1, found, progress).go(first, told)
        for left, right in itertools.pairwise(numbers):
            middle = (left + right) // 2
            ahead, behind = (_Walk(frames, scene, keys, *start, found, progress) for start in ((left, 1), (right, -1)))
            ahead.go(middle)
            behind.go(middle + 1)
            if ahead.lost and not behind.lost:
                behind.go(ahead.at + 1, told)
            elif behind.lost and not ahead.lost:
                ahead.go(behind.at - 1, told)
            elif ahead.lost:
                told.lost(ahead, behind.at - 1)
        _Walk(frames, scene, keys, numbers[-1], 1, found, progress).go(last, told)
    for number in numbers:
        told.sizes(found, number, [n for n in found.packed if min(numbers, key=lambda key: abs(key - n)) == number])
    return found


class _Walk:
    """Following from one marked frame in one direction."""

    def __init__(
        self,
        frames: Sequence[np.ndarray],
        scene: Scene,
        keys: Mapping[int, np.ndarray],
        key: int,
        step: int,
        found: Followed,
        progress: Callable[[int], None],
    ) -> None:
        self.frames, self.scene, self.step, self.found, self.progress = frames, scene, step, found, progress
        self.at, self.key, self.empty = key, key, not keys[key].any()
        rgb = shrunk(frames[key], SIDE)
        hidden = resized(keys[key], rgb.shape[:2])
        self.follower = Follower(rgb, hidden, scene.moving(key, hidden.shape))

    @property
    def lost(self) -> str | None:
        return self.follower.lost

    def go(self, until: int, told: _Teller | None = None) -> None:
        """Follow up to a frame, that one included; say so where the object is lost before."""
        while not self.lost and (until - self.at) * self.step > 0:
            if not self.empty:
                rgb = shrunk(self.frames[self.at + self.step], SIDE)
                hidden = self.follower.step(rgb, self.scene.moving(self.at + self.step, rgb.shape[:2]))
                if self.lost:
                    break
                self.found.set(self.at + self.step, resized(hidden, self.found.shape))
            self.at += self.step
            self.progress(1)
        if self.lost and told is not None:
            told.lost(self, until)


@dataclass
class _Teller:
    notes: list[str]
    again: str
    fps: float | None

    def sizes(self, found: Followed, key: int, near: list[int]) -> None:
        """Say so where what was followed is much smaller or larger than what was marked in a frame.

        Args:
            near: frames in which the object is seen and whose nearest mark is in frame `key`.
        """
        areas = {n: float(hidden.sum()) for n in near if not at_edge(hidden := found(n))}
        marked = float(found(key).sum())
        small = [n for n, area in areas.items() if area * SIZES < marked]
        large = [n for n, area in areas.items() if area > marked * SIZES]
        for odd, words in ((small, "less than a third as large as"), (large, "more than three times as large as")):
            if odd:
                when = f" ({min(odd) / self.fps:.2f} s)" if self.fps else ""
                self.notes.append(
                    f"What is followed is {words} what was marked in frame {key}, in {len(odd)} of the frames, first "
                    f"in {min(odd)}{when}: look whether all of the object is hidden there; if not, {self.again}."
                )

    def lost(self, walk: _Walk, until: int) -> None:
        """Say where it was lost on the way to a frame."""
        ends = sorted((walk.at + walk.step, until))
        frames = f"frame {ends[0]}" if ends[0] == ends[1] else f"frames {ends[0]} to {ends[1]}"
        if self.fps:
            frames += f" (from {ends[0] / self.fps:.2f} s)"
        self.notes.append(
            f"The object of frame {walk.key} is lost in {frames}: {walk.lost}. Nothing is hidden there; {self.again}."
        )


def resized(hidden: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask bool (H, W) at another size, edges smooth."""
    if hidden.shape == size:
        return hidden
    way = cv2.INTER_AREA if hidden.shape[0] > size[0] else cv2.INTER_LINEAR
    return cv2.resize(hidden.astype(np.float32), (size[1], size[0]), interpolation=way) > 0.5
