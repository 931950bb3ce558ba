"""Fillers that need no model: what other frames show is taken from there, and a classical fill for the rest.

See `frames` for the stream in which they stand, and `propagate` for how other frames are searched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from diffmae_video.errors import UsageError
from diffmae_video.rendering.frames import Frame
from diffmae_video.rendering.paste import Hole, membrane
from diffmae_video.rendering.propagate import PropagateSettings, Propagator

ROOM = 16
"""Pixels around what is filled classically that are looked at."""
SPECK = 16
"""Pixels of the largest leftover that is filled classically although a model follows: no model sees anything in it."""
WAIT = 64
"""Frames at the start of a clip that may be hidden whole: they are kept until one shows something."""


@dataclass(frozen=True)
class Taken:
    """What other frames show of a frame."""

    seen: np.ndarray
    """bool (H, W)."""
    rgb: np.ndarray
    """uint8 (P, 3), the P seen pixels in the order of rows."""
    confidence: float
    """Sum of the confidence of the seen pixels."""


class TakenStore(Protocol):
    """Keeps what was taken from other frames, so that an interrupted render continues."""

    def load(self, number: int) -> Taken | None:
        """What was saved of a frame; None where nothing was."""
        ...

    def save(self, number: int, taken: Taken) -> None:
        """Keep it, whole or not at all."""
        ...


class Propagation:
    """The filler that takes from other frames what they show (`frames.Filler`).

    Args:
        settings: how far other frames are looked at.
        store: keeps finished frames, to continue after an interruption.
        between_frames: called between frames; what it raises (a signal has asked to stop) ends the stream.

    Attributes:
        pixels: filled so far.
        confidence: their sum of how far each is believed, from 0 to 1.
        restored: frames taken from the store instead of computed.
    """

    def __init__(
        self,
        settings: PropagateSettings | None = None,
        *,
        store: TakenStore | None = None,
        between_frames: Callable[[], None] = lambda: None,
    ) -> None:
        self.propagator, self.store, self.between_frames = Propagator(settings), store, between_frames
        self.pixels = self.restored = 0
        self.confidence = 0.0

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Fill what other frames show, and yield each frame once `window` frames after it were read."""
        waiting: deque[Frame] = deque()
        kept: dict[int, Taken] = {}

        def views() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
            for frame in frames:
                waiting.append(frame)
                yield frame.number, frame.result(), frame.unfilled

        def wanted(number: int) -> bool:
            taken = self.store.load(number) if self.store is not None else None
            if taken is not None:
                kept[number] = taken
            return taken is None

        for number, rgb, seen, confidence in self.propagator.stream(views(), wanted):
            self.between_frames()
            frame = waiting.popleft()
            taken = kept.pop(number, None)
            if taken is not None:
                self.restored += 1
            else:
                taken = Taken(seen, rgb[seen], float(confidence[seen].sum(dtype=np.float64)))
                if self.store is not None and frame.unfilled.any():
                    self.store.save(number, taken)
            self._fill(frame, taken)
            yield frame

    def _fill(self, frame: Frame, taken: Taken) -> None:
        frame.seen = taken.seen
        if not taken.seen.any():
            return
        frame.filled = [frame.result().copy()]
        frame.filled[0][taken.seen] = taken.rgb
        frame.unfilled = frame.unfilled & ~taken.seen  # a new array: the old one is still looked at in the window
        self.pixels += len(taken.rgb)
        self.confidence += taken.confidence


class Classical:
    """The filler that needs no model: a smooth surface, frame by frame (`frames.Filler`).

    Args:
        largest: pixels of the largest connected leftover that is filled; larger ones are left to the next filler.
            Without it everything is filled, and a frame that is hidden whole repeats the one before it.

    Attributes:
        pixels: filled so far.
    """

    def __init__(self, largest: int | None = None) -> None:
        self.largest, self.pixels = largest, 0

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Fill what is unfilled and yield each frame.

        Raises:
            UsageError: the clip begins with more than WAIT frames that are hidden whole.
        """
        waiting: list[Frame] = []  # hidden whole, and nothing before them
        last: np.ndarray | None = None
        for frame in frames:
            blank = self.largest is None and bool(frame.unfilled.all())
            if blank and last is None:
                waiting.append(frame)
                if len(waiting) > WAIT:
                    raise UsageError(
                        f"Frames {waiting[0].number} to {frame.number} are hidden whole and nothing before them is "
                        "visible; leave some visible."
                    )
                continue
            if blank and last is not None:
                self._repeat(frame, last)
            elif frame.unfilled.any():
                self._paint(frame)
            for early in waiting:
                self._repeat(early, frame.result())
            yield from waiting
            waiting = []
            last = frame.result()
            yield frame
        if waiting:
            raise UsageError("Every frame is hidden whole; leave some visible.")

    def _repeat(self, frame: Frame, picture: np.ndarray) -> None:
        self.pixels += int(frame.unfilled.sum())
        frame.filled = [picture.copy()]
        frame.unfilled = np.zeros_like(frame.unfilled)

    def _paint(self, frame: Frame) -> None:
        asked = frame.unfilled
        if self.largest is not None:
            _, labels, stats, _ = cv2.connectedComponentsWithStats(asked.view(np.uint8), connectivity=8)
            small = stats[:, cv2.CC_STAT_AREA] <= self.largest
            small[0] = False  # what is filled
            asked = small[np.asarray(labels, dtype=np.int64)]
            if not asked.any():
                return
        picture = frame.result().copy()
        picture[asked] = smooth_fill(picture, frame.unfilled, asked)
        frame.filled = [picture]
        frame.unfilled = frame.unfilled & ~asked
        self.pixels += int(asked.sum())


def smooth_fill(picture: np.ndarray, hidden: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Values uint8 (P, 3) of the P asked pixels: the smoothest surface through what surrounds them (`paste.membrane`).

    On real clips it is nearer to what is hidden than Telea's fast marching (docs/results.md). Only the rectangle
    around the asked pixels is filled, with room for what surrounds it.

    Args:
        picture: uint8 (H, W, 3), not read where hidden.
        hidden: bool (H, W), some pixel not hidden.
        asked: bool (H, W), hidden pixels.
    """
    rows, columns = np.nonzero(asked.any(1))[0], np.nonzero(asked.any(0))[0]
    for room in (ROOM, max(picture.shape)):  # a rectangle that is hidden whole has nothing to start from
        box = tuple(slice(max(0, int(ends[0]) - room), int(ends[-1]) + 1 + room) for ends in (rows, columns))
        if not hidden[box].all():
            break
    surface = membrane(picture[box].astype(np.float32), ~hidden[box])
    filled = picture[box].copy()
    Hole(hidden[box], feather=0).paste(filled, (surface + 0.5).clip(0, 255).astype(np.uint8))
    return filled[asked[box]]
