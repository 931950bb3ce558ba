"""What is hidden in each frame of a clip as one small file, so that it can be told later."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

_LARGEST = 2**31
"""Pixels of a mask that is read, at most: files may come from strangers."""


def pack_hidden(hidden: Callable[[int], np.ndarray], frames: int) -> bytes:
    """Masks bool (H, W) of all frames, one bit a pixel and compressed: a line of JSON, then the frames in turn."""
    sizes: list[int] = []
    body = io.BytesIO()
    shape: tuple[int, ...] = ()
    for number in range(frames):
        mask = hidden(number)
        shape = mask.shape
        packed = zlib.compress(np.packbits(mask).tobytes(), 6)
        sizes.append(len(packed))
        body.write(packed)
    return json.dumps({"shape": shape, "sizes": sizes}).encode() + b"\n" + body.getvalue()


def unpack_hidden(data: bytes) -> Iterator[np.ndarray]:
    """The masks that `pack_hidden` packed, bool (H, W), one at a time.

    Raises:
        ValueError: the bytes are no such masks.
    """
    head = data.partition(b"\n")[0]
    try:
        told = json.loads(head)
        height, width = (int(side) for side in told["shape"])
        sizes = [int(size) for size in told["sizes"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no masks: {error!r}") from error
    if not 0 < height * width < _LARGEST:
        raise ValueError(f"masks of {height} x {width}")
    length, place = (height * width + 7) // 8, len(head) + 1
    for size in sizes:
        part = data[place : place + size]
        try:
            packed = zlib.decompressobj().decompress(part, length)
        except zlib.error as error:
            raise ValueError(f"no masks: {error!r}") from error
        if size < 1 or len(part) != size or len(packed) != length:
            raise ValueError("masks that are not whole")
        place += size
        yield np.unpackbits(np.frombuffer(packed, np.uint8), count=height * width).view(bool).reshape(height, width)


def hides_all_of(path: Path, hidden: Callable[[int], np.ndarray], frames: int) -> bool:
    """Whether every pixel that is hidden now is hidden in the masks of a file; False where it cannot be read."""
    count = 0
    try:
        for number, mask in enumerate(unpack_hidden(path.read_bytes())):
            if number >= frames or mask.shape != (now := hidden(number)).shape or bool((now & ~mask).any()):
                return False
            count += 1
    except (OSError, ValueError):
        return False
    return count == frames
