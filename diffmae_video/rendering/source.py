"""Frames of a video, a picture or a folder of pictures: upright RGB with exact times, one at a time."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.container
import numpy as np
from av.video.reformatter import VideoReformatter

from diffmae_video.data.decode import Video
from diffmae_video.data.images import read_image
from diffmae_video.data.media import Limits, read_head, sniff
from diffmae_video.errors import DataError

_ANY_LENGTH = 1 << 31  # frames; they are read one at a time
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class SourceFrame:
    """One displayed frame and when it is shown."""

    rgb: np.ndarray  # uint8 (H, W, 3)
    pts: int
    """Time in units of the source's `time_base`, from 0 on, strictly rising."""


class VideoSource:
    """A video file, an image, or a folder of images, read forwards.

    Attributes:
        height, width: of the displayed frame, rotation applied.
        frames: frames of the clip as its packets say; damaged files may hold fewer.
        fps: frames a second.
        time_base: seconds per unit of time.
        kind: `video`, `image` or `folder`.
        interlaced: frames hold two fields; they are taken as they are.
        pixel_aspect: width of a displayed pixel by its height; frames keep the grid of pixels that the file has.

    Raises:
        DataError: the file is none of these, or damaged beyond use.
    """

    def __init__(self, path: Path | str, fps: float = 24.0) -> None:
        self.path = Path(path)
        self.pixel_aspect, self.interlaced = Fraction(1), False
        self.video: Video | None = None
        if self.path.is_dir():
            self._open_images(list_images(self.path), Fraction(fps).limit_denominator(1001))
            self.kind = "folder"
            return
        if (sniff(read_head(self.path)) or "").startswith("image:"):
            self._open_images([self.path], Fraction(1))
            self.kind = "image"
            return
        self.kind = "video"
        try:
            self._open_video()
        except DataError as error:
            if str(self.path) in str(error):
                raise
            raise DataError(f"{self.path}: {error}") from error

    def _open_images(self, files: list[Path], rate: Fraction) -> None:
        if not files:
            raise DataError(f"{self.path} holds no pictures; give a video, a picture or a folder of pictures.")
        self.files, self.frames, self.fps, self.time_base = files, len(files), rate, 1 / rate
        self.height, self.width = read_image(files[0]).shape[1:]
        self.has_audio = False

    def _open_video(self) -> None:
        self.video = Video(self.path, Limits(frames=_ANY_LENGTH))
        info = self.video.info
        self.frames = info.frames
        self.display = info.display._replace(aspect=Fraction(1))
        self.pixel_aspect = 1 / info.display.aspect if self.display.transpose else info.display.aspect
        stream, codec = self.video.stream, self.video.codec
        self.width, self.height = self.display.size(codec.width, codec.height)
        self.fps, self.counted = self.video.rate, self.video.counts_frames
        self.time_base = 1 / self.fps if self.counted else Fraction(stream.time_base or Fraction(1, 1000))
        self.has_audio, self.interlaced = info.has_audio, info.interlaced
        if self.frames == 0 or next(iter(self.video.decode_all()), None) is None:
            self.close()
            raise DataError(f"{self.path} has no frame that can be decoded; replace or remove it.")

    def __iter__(self) -> Iterator[SourceFrame]:
        return self._images() if self.video is None else self._frames()

    def _images(self) -> Iterator[SourceFrame]:
        for number, file in enumerate(self.files):
            rgb = np.ascontiguousarray(read_image(file).permute(1, 2, 0).numpy())
            if rgb.shape[:2] != (self.height, self.width):
                size = f"{rgb.shape[1]}x{rgb.shape[0]}"
                raise DataError(f"{file} is {size}, the first picture {self.width}x{self.height}; make them equal.")
            yield SourceFrame(rgb, number)

    def _frames(self) -> Iterator[SourceFrame]:
        assert self.video is not None
        reformatter = VideoReformatter()
        coded = (self.height, self.width) if self.display.transpose else (self.width, self.height)
        last, nominal = -1, max(1, round(1 / self.fps / self.time_base))
        origin: int | None = None
        for number, frame in enumerate(self.video.decode_all()):
            pts = number if self.counted else frame.pts
            if pts is None:  # no time at all: one frame duration after the last
                pts = last + nominal + (origin or 0)
            if origin is None:
                origin = self._origin(pts)
            pts = max(pts - origin, last + 1)
            last = pts
            if (frame.width, frame.height) != coded:  # a stream may change size midway: keep the first
                frame = VideoReformatter().reformat(frame, *coded, threads=1)
            yield SourceFrame(self.display.rgb(frame, reformatter), pts)

    def _origin(self, first: int) -> int:
        """Start of the presentation: the first frame, or the sound where it begins earlier (but not before 0)."""
        self.start = Fraction(0)
        if self.counted:
            return 0
        start = first
        assert self.video is not None
        for stream in self.video.container.streams.audio[:1]:
            if stream.start_time is not None and stream.time_base:
                sound = Fraction(stream.start_time) * stream.time_base / self.time_base
                start = min(start, max(0, int(sound)) if first >= 0 else first)
        self.start = start * self.time_base
        return start

    def audio(self) -> tuple[av.container.InputContainer, av.AudioStream] | None:
        """A second reading of the file for its first audio stream, or None."""
        if self.video is None or not self.has_audio:
            return None
        container = av.open(
            io.BytesIO(self.video.data),
            "r",
            format=self.video.format,
            options={"format_whitelist": self.video.format},
            metadata_errors="replace",
        )
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            container.close()
            return None
        return container, stream

    def close(self) -> None:
        """Release the decoder."""
        if self.video is not None:
            self.video.close()


def list_images(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names, numbers by value (2 before 10)."""

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", path.name)]

    return sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()), key=order)
