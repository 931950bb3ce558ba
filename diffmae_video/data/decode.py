"""Decode frames and clips from untrusted bytes, touching as little as the wanted frames need.

`Video` opens a file from memory with a fixed demuxer, no protocols and one FFmpeg thread. Frame `i` always means the
i-th frame that decoding the whole stream would yield. Three strategies reach it, the first that is exact wins:
the container's index (streams without reordering: our own shards), a table of all packets (reordering, edit lists),
and plain decoding from the start (no usable times, damaged files). See benchmarks/data.py for what each costs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from diffmae_video.data.display import PLAIN, Display, display_matrix, display_of
from diffmae_video.data.media import DEFAULT_LIMITS, Limits, demuxer_of, read_bytes
from diffmae_video.data.packets import (
    PacketTable,
    Unusable,
    has_orientation,
    has_turned_track,
    is_unreferenced,
    nal_length,
)
from diffmae_video.data.paint import Box, Canvas
from diffmae_video.errors import DataError, LimitError

if TYPE_CHECKING:  # sharding workers probe without torch
    from torch import Tensor

Source = bytes | str | Path


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds; `width` and `height` are as displayed: turned, in square pixels."""

    frames: int
    fps: float
    width: int
    height: int
    duration: float
    codec: str
    display: Display
    has_audio: bool
    container: str
    pixel_format: str


class Clip(NamedTuple):
    """Frames of one clip and when they are shown."""

    frames: Tensor  # uint8 (T, C, H, W)
    pts: Tensor  # float64 (T,), seconds


def _refuse(*_: object) -> None:
    raise PermissionError("a media file may not open other files")


class Video:
    """A video in memory, opened once for any number of clips.

    Args:
        source: bytes, or the path of a local file.
        limits: bounds that are checked before frames are decoded.
        known: frame count and size are known and frames are shown as they are stored (shards that `diffmae shard`
            encoded): FFmpeg's look into the stream, a tenth of the cost of a clip, is left out for MP4, and `info` is
            what the header declares.

    Raises:
        DataError: no video, no decodable video stream, or beyond the limits.
    """

    def __init__(self, source: Source, limits: Limits = DEFAULT_LIMITS, known: bool = False):
        self.name = "The video" if isinstance(source, (bytes, bytearray, memoryview)) else str(source)
        self.data = read_bytes(source, limits)
        self.limits = limits
        self.format = demuxer_of(self.data)
        self.known = known and self.format == "mov"
        self._table: PacketTable | None = None
        self._counted: int | None = None
        self._display: Display | None = None
        self._clock: tuple[int, int, bool, Fraction] | None = None
        self._dirty = False
        self.errors = 0
        """Packets that failed in the last pass of `decode_all`."""
        self._open()

    def _open(self) -> None:
        options = {"format_whitelist": self.format, "max_pixels": str(self.limits.pixels)}
        if self.format == "mov":  # the header tells everything; skip the guess of the frame rate
            options |= {"fpsprobesize": "0"} | ({"probesize": "32"} if self.known else {})
        try:
            self.container = av.open(
                io.BytesIO(self.data),
                format=self.format,
                options=options,
                stream_options=[{"skip_frame": "all"}] if self.known else None,
                metadata_errors="replace",
                io_open=_refuse,
                buffer_size=1 << 16,
            )
        except (FFmpegError, ValueError, OSError) as error:
            raise DataError(f"{self.name} cannot be opened ({_reason(error)}); replace or remove it.") from error
        streams = [stream for stream in self.container.streams.video if not _is_cover(stream)]
        if not streams or streams[0].codec_context is None:
            self.close()
            raise DataError(f"{self.name} has no video stream that can be decoded; replace or remove it.")
        self.stream = streams[0]
        context = self.stream.codec_context
        if context.width * context.height == 0:
            self.close()
            raise DataError(f"{self.name} has frames without pixels; replace or remove it.")
        try:
            self.limits.check_size(f"A frame of {self.name}", context.width, context.height)
        except LimitError:
            self.close()
            raise
        context.thread_count = 1
        context.thread_type = "NONE"
        self.codec = context

    def close(self) -> None:
        """Release the decoder; the object is of no use afterwards."""
        self.container.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def info(self) -> VideoInfo:
        """Frame count, rate and size. The count is of presentable packets, or of decoded frames once they were."""
        width, height = self.display.size(self.codec.width, self.codec.height)
        frames = self.frames
        rate = self.stream.average_rate or self.stream.guessed_rate
        fps = float(rate) if rate else 0.0
        seconds = frames / fps if fps else 0.0
        has_audio = bool(self.container.streams.audio)
        return VideoInfo(
            frames,
            fps,
            width,
            height,
            seconds,
            self.codec.name,
            self.display,
            has_audio,
            self.format,
            self.codec.pix_fmt or "",
        )

    @property
    def frames(self) -> int:
        """Number of frames."""
        if self._counted is None:
            entries = self._index()
            if entries is not None:
                self._counted = len(entries)
            else:
                order = self._shown()
                self._counted = len(order) if order is not None else sum(1 for _ in self.decode_all())
        return self._counted

    @property
    def display(self) -> Display:
        """What is done to frames before they are shown.

        Raises:
            DataError: their colours cannot be read.
        """
        if self._display is None:
            self._display = PLAIN
            if not self.known:
                matrix = None
                if self._may_be_turned():
                    frame = next(iter(self.decode_all()), None)
                    matrix = display_matrix(frame) if frame is not None else None
                self._display = display_of(self.stream, self.name, matrix)
        return self._display

    def _may_be_turned(self) -> bool:
        """Whether a display matrix may come with the frames: from the container, or inside H.264 and HEVC."""
        if self.format in ("mov", "matroska") and (self.format == "matroska" or has_turned_track(self.data)):
            return True
        if self.codec.name not in ("h264", "hevc"):
            return False
        if self.format != "mov":
            return True
        first = self.stream.index_entries[0] if len(self.stream.index_entries) else None
        return first is None or has_orientation(self.data[first.pos : first.pos + first.size], self.codec.name)

    @property
    def counts_frames(self) -> bool:
        """Whether the file has an order of frames but no times: raw streams, and AVI where frames are reordered."""
        return self.format in ("h264", "mpegvideo") or (self.format == "avi" and bool(self.codec.has_b_frames))

    @property
    def rate(self) -> Fraction:
        """Frames a second as declared; 25 where nothing sensible is."""
        rate = self.stream.average_rate or self.stream.guessed_rate
        return Fraction(rate) if rate and 0 < rate <= 1000 else Fraction(25)

    def time(self, frame: av.VideoFrame, number: int) -> float:
        """When frame `number` is shown, seconds; by the frame rate where the file has no times."""
        if self._clock is None:
            base = self.stream.time_base or Fraction(1, 1000)
            self._clock = (base.numerator, base.denominator, self.counts_frames, self.rate)
        numerator, denominator, counts, rate = self._clock
        if frame.pts is not None and not counts:
            return frame.pts * numerator / denominator
        return float(number / rate)

    def decode_all(self) -> Iterator[av.VideoFrame]:
        """All frames in display order; a damaged packet costs its own frames only."""
        self._rewind()
        yield from self._decode()

    def decode_from(self, start: float) -> Iterator[av.VideoFrame]:
        """Frames in display order from a key frame some seconds before `start` (seconds of the file's clock) on.

        All frames where the file has no times to go by, or its index leads astray.
        """
        early = start - 3.0  # frames around a key frame may lack what they refer to
        if early > 0 and self.format in ("mov", "matroska") and self.stream.time_base:
            self._rewind()
            self._seek(int(early / self.stream.time_base))
            frames = self._decode()
            first = next(frames, None)
            if first is not None and first.pts is not None and self.time(first, 0) <= start:
                yield first
                yield from frames
                return
        yield from self.decode_all()

    def _decode(self) -> Iterator[av.VideoFrame]:
        count = self.errors = 0
        for packet in self._demux():
            try:
                frames = packet.decode()
            except FFmpegError:
                frames, self.errors = [], self.errors + 1
            for frame in frames:
                count += 1
                if count > self.limits.frames:
                    raise self._too_long()
                yield frame

    def clips(
        self,
        indices: Sequence[Sequence[int]],
        crops: Sequence[Box | None] | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[Clip]:
        """Decode several clips in one pass over the video.

        Args:
            indices: frame numbers of each clip, in any order, repeats allowed.
            crops: a box for each clip, in pixels of the displayed frame; None takes the whole frame.
            size: height and width to scale each crop to; None keeps the crop's own.

        Raises:
            DataError: no frame can be decoded.
        """
        import torch

        canvas = Canvas(indices, crops or [None] * len(indices), size, self.display)
        numbers = sorted(canvas.wanted)
        try:
            for number, frame in self.frames_at(numbers):
                canvas.take(number, frame, self.time(frame, number))
        except (FFmpegError, Unusable):
            canvas.missing = set(numbers)
        if canvas.missing:
            self._paint_from_start(canvas, numbers)
        return [
            Clip(torch.from_numpy(frames), torch.from_numpy(times))
            for frames, times in zip(canvas.frames, canvas.times, strict=True)
        ]

    # -- strategies ------------------------------------------------------------------------------------------------

    def frames_at(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (number, frame) of ascending frame numbers in decode order, decoding only what they refer to.

        Raises:
            FFmpegError, Unusable: this video needs plain decoding; what came before is not to be trusted.
        """
        return self._by_index(numbers) if self._index() is not None else self._by_table(numbers)

    def _paint_from_start(self, canvas: Canvas, numbers: list[int]) -> None:
        """Plain decoding; where a declared frame is not there, the last one stands in."""
        last: tuple[int, av.VideoFrame] | None = None
        for number, frame in enumerate(self.decode_all()):
            last = (number, frame)
            canvas.take(number, frame, self.time(frame, number))
            if number >= numbers[-1]:
                return
        if last is None:
            raise DataError(f"{self.name} has no frame that can be decoded; replace or remove it.")
        self._counted = last[0] + 1
        for number in sorted(canvas.missing):
            canvas.take(*last, self.time(last[1], last[0]), stands_for=number)

    def _index(self) -> list[tuple[int, bool]] | None:
        """(dts, is key) of every packet, when decode order is display order and the container has them all."""
        if not hasattr(self, "_entries"):
            self._entries = None
            plain = self.format == "mov" and self.codec.name == "h264" and not self.codec.has_b_frames
            if plain and self.codec.reorder_depth == 0:
                entries = [
                    (entry.timestamp, entry.is_keyframe, entry.is_discard) for entry in self.stream.index_entries
                ]
                stamps = [entry[0] for entry in entries]
                rising = all(a < b for a, b in pairwise(stamps))
                if entries and rising and entries[0][1] and not any(entry[2] for entry in entries):
                    declared = self.stream.frames
                    if declared in (0, len(entries)) and len(entries) <= self.limits.frames:
                        self._entries = [entry[:2] for entry in entries]
        return self._entries

    def _by_index(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Jump to the key frame before each group of wanted frames and stop after the last of the group."""
        entries = self._index()
        keys = [number for number, entry in enumerate(entries) if entry[1]]
        starts = np.asarray(keys)[np.searchsorted(keys, numbers, side="right") - 1].tolist()
        needed = set(numbers)
        position, packets, delay = -1, iter(()), None  # position: number of the packet that comes next
        for number, start in zip(numbers, starts, strict=True):
            if number >= len(entries):
                raise Unusable
            if position < 0 or start > position + 48 or position > number:  # short gaps: reading on is cheaper
                self._seek(entries[start][0])
                position, packets = start, self._demux()
            while position <= number:
                packet = next(packets, None)
                if packet is None or packet.dts != entries[position][0]:
                    raise Unusable
                if position >= start:  # between groups packets are read and dropped
                    delay = packet.pts - packet.dts if delay is None else delay  # constant where nothing is reordered
                    frames = packet.decode()
                    if len(frames) != 1 or frames[0].pts != packet.pts or packet.pts - packet.dts != delay:
                        raise Unusable
                    if position in needed:
                        yield position, frames[0]
                position += 1

    def _packets(self) -> PacketTable:
        """Every packet of the stream, read once."""
        if self._table is None:
            self._rewind()
            packets = []
            for packet in self._demux():
                if packet.size:
                    packets.append(packet)
                    if len(packets) > self.limits.frames:
                        raise self._too_long()
            self._table = PacketTable(packets, self.codec.name)
        return self._table

    def _shown(self) -> list[int] | None:
        """Places of the shown packets in display order; AVI has no times, and packets without a frame."""
        return None if self.format == "avi" else self._packets().presentation()

    def _by_table(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """From a table of packets, decode only what the wanted frames refer to."""
        order, packets, pts = self._shown(), self._packets().packets, self._packets().pts
        if order is None or numbers[-1] >= len(order):
            raise Unusable
        places = {order[number]: number for number in numbers}  # place in decode order -> frame number
        by_pts = {pts[place]: number for place, number in places.items()}
        length = nal_length(self.codec)
        keys = self._packets().keys[::-1]
        ranges: list[list[int]] = []
        for place in sorted(places):
            start = next((key for key in keys if key <= place and pts[key] <= pts[place]), 0)
            if ranges and start <= ranges[-1][1] + 1:
                ranges[-1][1] = max(ranges[-1][1], place)
            else:
                ranges.append([start, place])
        codec = self.codec
        codec.flush_buffers()
        for start, stop in ranges:
            for place in range(start, stop + 2):  # frames leave at once, so that the decoder has few buffers to fill
                if place > stop:
                    frames = codec.decode(None)
                elif place not in places and length and is_unreferenced(packets[place], length):
                    continue
                else:
                    frames = packets[place].decode()
                for frame in frames:
                    number = by_pts.pop(frame.pts, None)
                    if number is not None:
                        yield number, frame
            codec.flush_buffers()

    def _demux(self) -> Iterator[av.Packet]:
        try:
            yield from self.container.demux(self.stream)
        except FFmpegError:  # a cut file ends here; what came before is good
            return

    def _too_long(self) -> LimitError:
        return LimitError(f"{self.name} has more than {self.limits.frames} frames; leave it out or cut it.")

    def _seek(self, timestamp: int) -> None:
        self.container.seek(timestamp, stream=self.stream, backward=True)
        self._dirty = True

    def _rewind(self) -> None:
        """Start over; reopening is exact for every container, seeking to zero is not."""
        if self._dirty:
            self._table = None  # its packets belong to the decoder that goes
            self.container.close()
            self._open()
        self._dirty = True


def _is_cover(stream: av.VideoStream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.split("\n")[0]


def probe(source: Source, limits: Limits = DEFAULT_LIMITS, exact: bool = False) -> VideoInfo:
    """What a video holds.

    Args:
        source: bytes or a local path.
        limits: bounds on size, pixels and frames.
        exact: count the frames by decoding them all; damaged files hold fewer than their packets say.

    Raises:
        DataError: not a video, none inside, or beyond the limits.
    """
    with Video(source, limits) as video:
        if exact:
            video._counted = sum(1 for _ in video.decode_all())
            video._rewind()
        info = video.info
        if info.frames == 0:
            raise DataError(f"{video.name} has no frame that can be decoded; replace or remove it.")
        return info


def read_clips(
    source: Source,
    indices: Sequence[Sequence[int]],
    crops: Sequence[Box | None] | None = None,
    size: tuple[int, int] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> list[Clip]:
    """Read clips given as lists of frame numbers; see `Video.clips`. Returns a `Clip` (frames, pts) for each."""
    with Video(source, limits) as video:
        return video.clips(indices, crops, size)


class VideoReader:
    """Iterate all frames in display order as (rgb uint8 (H, W, 3), pts in seconds), upright, one at a time."""

    def __init__(self, source: Source, limits: Limits = DEFAULT_LIMITS):
        self.video = Video(source, limits)
        self.info = self.video.info

    def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
        reformatter, display = VideoReformatter(), self.video.display
        first: tuple[int, int] | None = None
        for number, frame in enumerate(self.video.decode_all()):
            first = first or (frame.width, frame.height)
            if (frame.width, frame.height) != first:  # a stream may change size midway: keep the first
                frame = VideoReformatter().reformat(frame, *first, threads=1)
            yield display.rgb(frame, reformatter), self.video.time(frame, number)

    def close(self) -> None:
        """Release the decoder."""
        self.video.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
