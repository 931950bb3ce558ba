"""Small videos made on the spot: every frame tells its own number."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def numbered(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A frame, uint8 (H, W, 3), whose eight blocks of brightness spell `number` in binary."""
    frame = np.full((height, width, 3), 60, np.uint8)
    for bit in range(8):
        if number >> bit & 1:
            frame[:, bit * width // 8 : (bit + 1) * width // 8] = 200
    return frame


def read_number(frame: np.ndarray) -> int:
    """The number that a frame, uint8 (H, W, 3), spells."""
    blocks = np.array_split(frame.astype(float).mean((0, 2)), 8)
    return sum(1 << bit for bit, block in enumerate(blocks) if block.mean() > 130)


def make_video(
    path: Path | None = None,
    frames: int = 24,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    container: str = "mp4",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    first: int = 0,
) -> bytes:
    """Encode numbered frames at 10 frames a second; `times` (ms) makes the rate variable."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream = out.add_stream(codec, rate=10, options={"crf": "12", "g": "8", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p" if codec != "mjpeg" else "yuvj420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(first + number, *size), format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = times[number] if times else number * 100
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    data = sink.getvalue()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return data


def make_folders(root: Path, classes: tuple[str, ...] = ("hop", "run"), each: int = 4, frames: int = 12) -> Path:
    """Class folders below train/ and val/."""
    for split, count in (("train", each), ("val", max(1, each // 2))):
        for place, name in enumerate(classes):
            for number in range(count):
                path = root / split / name / f"-{name}_{split}_{number}.mp4"
                make_video(path, frames=frames, first=16 * place + number)
    return root
