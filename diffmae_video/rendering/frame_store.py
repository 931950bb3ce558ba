"""Frames of a clip at hand in any order: a file of small pictures, so that memory does not grow with the clip."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from typing import Any, overload

import cv2
import numpy as np

from diffmae_video.errors import DataError

QUALITY = 95
"""Of the JPEG pictures."""
HOW = (
    *(cv2.IMWRITE_JPEG_QUALITY, QUALITY),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),  # edges of colour stay
)


class FrameStore(Sequence[np.ndarray]):
    """Frames of one size, kept as JPEG in a temporary file that is gone with the object.

    Args:
        side: longer side of what is kept, pixels; larger frames are made smaller.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the object
        self.ends = [0]
        self.lock = threading.Lock()
        self.shape = (0, 0)
        """Height and width of what is kept."""

    def add(self, rgb: np.ndarray) -> None:
        """Keep a frame uint8 (H, W, 3)."""
        small = shrunk(rgb, self.side)
        done, data = cv2.imencode(".jpg", small[..., ::-1], HOW)
        assert done
        self.shape = (small.shape[0], small.shape[1])
        with self.lock:
            self.file.seek(self.ends[-1])
            self.file.write(data.tobytes())
            self.ends.append(self.ends[-1] + len(data))

    def jpeg(self, number: int) -> bytes:
        """A frame as it is kept."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        with self.lock:  # a page asks from many threads
            self.file.seek(self.ends[number])
            return self.file.read(self.ends[number + 1] - self.ends[number])

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, number: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, number: Any) -> Any:
        """A frame, uint8 (h, w, 3)."""
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        read = cv2.imdecode(np.frombuffer(self.jpeg(number), np.uint8), cv2.IMREAD_COLOR)
        if read is None:
            raise DataError("A temporary file of frames was damaged; free disk space and try again.")
        return read[..., ::-1]

    def close(self) -> None:
        """Remove the file."""
        self.file.close()


def shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture (H, W) or (H, W, 3) whose longer side is at most `side` pixels."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
