"""What moves against the scene: pixels of a frame that other frames, aligned with it, do not show.

The frames around one are aligned with it by the motion of the view. Most of them show the same in a place that belongs
to the scene, and few where something moves through it (Irani and Anandan 1998, "A unified approach to moving object
detection in 2D and 3D scenes").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import cv2
import numpy as np

from diffmae_video.rendering.frame_store import shrunk
from diffmae_video.rendering.motion import View, ellipse, look_up, neighbour_motion

SIDE = 320
"""Longer side of the frames that are compared."""
AWAY = (3, 6, 9, 13, 17, 22, 27, 33, 40)
"""Distances in frames, before and after, of the frames that a frame is compared with."""
LEAST_FRAMES = 5
"""Aligned frames that must show a place."""
LEAST_DIFFERENCE = 7.0
"""Grey levels up to which a pixel is the same in another frame; from twice as many on it is another."""
SURE = 0.3
"""How far from one half the share of frames that show the same must be to count in full."""
DRIFT = 0.5
"""Pixels a frame by which a place must move otherwise than the view to be no part of the scene."""
EDGE = 1
"""Pixels by which the alignment may be wrong."""


class Scene:
    """The still part of a clip, looked up by frame.

    Args:
        frames: uint8 (h, w, 3) each, of one size; larger ones than SIDE are made smaller.
    """

    def __init__(self, frames: Sequence[np.ndarray]) -> None:
        self.frames = frames
        self.flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._small: dict[int, np.ndarray] = {}
        self._to_next: dict[int, np.ndarray | None] = {}
        self._kept: dict[int, np.ndarray] = {}

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Height and width of what is compared."""
        height, width = self._frame(0).shape[:2]
        return height, width

    def moving(self, number: int, size: tuple[int, int]) -> np.ndarray:
        """How far each pixel of a frame is something that moves against the scene.

        Args:
            number: of the frame.
            size: height H and width W at which it is looked at.

        Returns:
            float32 (H, W) from -1 (the scene, as other frames show it) to 1 (nothing that they show); 0 where too few
            frames show the place.
        """
        if number not in self._kept:
            if len(self._kept) > 4:
                self._kept.pop(next(iter(self._kept)))
            self._kept[number] = self._measure(number)
        found = self._kept[number]
        return found if found.shape == size else cv2.resize(found, size[::-1], interpolation=cv2.INTER_LINEAR)

    def _frame(self, number: int) -> np.ndarray:
        """A frame, small and without its noise: uint8 (h, w, 3)."""
        if number not in self._small:
            if len(self._small) > 2 * AWAY[-1] + 2:
                self._small.pop(next(iter(self._small)))
            self._small[number] = cv2.GaussianBlur(shrunk(self.frames[number], SIDE), (0, 0), 0.6)
        return self._small[number]

    def _measure(self, number: int) -> np.ndarray:
        frame = self._frame(number).astype(np.float32)
        known, alike = np.zeros(self.shape, np.float32), np.zeros(self.shape, np.float32)
        disc = ellipse(EDGE)
        for other, shown in self._aligned(number):
            most, least = cv2.dilate(other, disc), cv2.erode(other, disc)
            miss = np.maximum(np.maximum(frame - most, least - frame), 0).mean(2)
            miss = cv2.GaussianBlur(miss, (0, 0), 1.2)
            alike += shown * np.clip(2 - miss / LEAST_DIFFERENCE, 0, 1)
            known += shown
        share = alike / np.maximum(known, 1)
        found = np.where(known >= LEAST_FRAMES, np.clip((0.5 - share) / SURE, -1, 1), 0).astype(np.float32)
        return np.where(self._drifts(number), np.maximum(found, 0), found)

    def _drifts(self, number: int) -> np.ndarray:
        """Where a frame moves otherwise than the view, bool (h, w): a slow thing covers its place in most frames."""
        step = 1 if self._step(number, 1) is not None else -1
        motion = self._step(number, step)
        if motion is None:
            return np.zeros(self.shape, dtype=bool)
        one, two = (cv2.cvtColor(self._frame(n), cv2.COLOR_RGB2GRAY) for n in (number, number + step))
        flow = self.flow.calc(one, two, np.zeros((*self.shape, 2), np.float32))
        grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in self.shape[::-1])), axis=-1)
        view = cv2.perspectiveTransform(grid.reshape(1, -1, 2), motion).reshape(grid.shape) - grid
        back = self.flow.calc(two, one, np.zeros_like(flow))
        returns = np.linalg.norm(flow + look_up(back, flow), axis=2) < DRIFT
        return returns & (np.linalg.norm(flow - view, axis=2) > DRIFT + 0.1 * np.linalg.norm(view, axis=2))

    def _aligned(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Other frames as seen from one: float32 (h, w, 3) each, and bool (h, w), where they show something."""
        size = self.shape[::-1]
        for step in (-1, 1):
            motion, at = np.eye(3), number
            for away in range(1, AWAY[-1] + 1):
                following = self._step(at, step)
                if following is None:
                    break
                motion, at = following @ motion, at + step
                if away not in AWAY:
                    continue
                # `motion` says where the points of the frame lie in the other one
                flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
                other = cv2.warpPerspective(self._frame(at), motion, size, flags=flags)
                covers = cv2.warpPerspective(np.full(self.shape, 255, np.uint8), motion, size, flags=flags) == 255
                yield other.astype(np.float32), covers

    def _step(self, at: int, step: int) -> np.ndarray | None:
        """Where the points of a frame lie in its neighbour: (3, 3), or None at a cut or at an end."""
        first = min(at, at + step)
        if not 0 <= first < len(self.frames) - 1:
            return None
        if first not in self._to_next:
            nothing = np.zeros(self.shape, dtype=bool)
            views = (View(n, self._frame(n), nothing) for n in (first, first + 1))
            self._to_next[first] = neighbour_motion(*views)
        motion = self._to_next[first]
        return motion if motion is None or step > 0 else np.linalg.inv(motion)
