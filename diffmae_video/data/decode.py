"""Decode frames and clips from untrusted bytes, touching as little as the wanted frames need.

`Video` opens a file from memory with a fixed demuxer, no protocols and one FFmpeg thread. Frame `i` always means the
i-th frame that decoding the whole stream would yield. Three strategies reach it, the first that is exact wins:
the container's index (streams without reordering: our own shards), a table of all packets (reordering, edit lists),
and plain decoding from the start (no usable times, damaged files). See benchmarks/data.py for what each costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from diffmae_video.data.display import Display
from diffmae_video.data.media import DEFAULT_LIMITS, Limits
from diffmae_video.data.packets import PacketTable, Unusable, is_unreferenced, nal_length
from diffmae_video.data.paint import Box, ClipFrames
from diffmae_video.data.video_file import Source, VideoFile
from diffmae_video.errors import DataError

if TYPE_CHECKING:  # sharding workers probe without torch
    from torch import Tensor


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
    interlaced: bool


class Clip(NamedTuple):
    """Frames of one clip and when they are shown."""

    frames: Tensor  # uint8 (T, C, H, W)
    pts: Tensor  # float64 (T,), seconds


class Video(VideoFile):
    """A video in memory whose frames are found by number; see `VideoFile` for the arguments."""

    def __init__(self, source: Source, limits: Limits = DEFAULT_LIMITS, known: bool = False):
        super().__init__(source, limits, known)
        self._table: PacketTable | None = None
        self._counted: int | None = None
        self._entries: list[tuple[int, bool]] | None = None
        self._entries_read = False

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
            self.interlaced,
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

    def times(self) -> np.ndarray | None:
        """When each frame is shown, seconds from the first, float64 (frames,); None where the packets do not tell."""
        if self.counts_frames or not self.stream.time_base:
            return None
        entries = self._index()
        if entries is not None:
            stamps = [stamp for stamp, _ in entries]  # times of decoding: nothing is reordered
        else:
            order, pts = self._shown(), self._packets().pts
            stamps = [pts[place] for place in order or ()]
        if not stamps or None in stamps:
            return None
        found = np.asarray(stamps, np.float64) * float(self.stream.time_base)
        return found - found[0]

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

        canvas = ClipFrames(indices, crops or [None] * len(indices), size, self.display)
        numbers = sorted(canvas.wanted)
        try:
            for number, frame in self.frames_at(numbers):
                canvas.take(number, frame, self.time(frame, number))
        except (FFmpegError, Unusable):
            canvas.missing = set(numbers)
        if canvas.missing:
            self._paint_from_start(canvas, numbers)
        return [Clip(torch.from_numpy(frames), torch.from_numpy(times)) for frames, times in canvas.clips()]

    def frames_at(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (number, frame) of ascending frame numbers in decode order, decoding only what they refer to.

        Raises:
            FFmpegError, Unusable: this video needs plain decoding; what came before is not to be trusted.
        """
        return self._by_index(numbers) if self._index() is not None else self._by_table(numbers)

    def _paint_from_start(self, canvas: ClipFrames, numbers: list[int]) -> None:
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
        if not self._entries_read:
            self._entries_read = True
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
        entries = self._index() or []
        keys = [number for number, entry in enumerate(entries) if entry[1]]
        starts = np.asarray(keys)[np.searchsorted(keys, numbers, side="right") - 1].tolist()
        needed = set(numbers)
        packets: Iterator[av.Packet] = iter(())
        position, delay = -1, None  # position: number of the packet that comes next
        for number, start in zip(numbers, starts, strict=True):
            if number >= len(entries):
                raise Unusable
            if position < 0 or start > position + 48 or position > number:  # short gaps: reading on is cheaper
                self._seek(entries[start][0])
                position, packets = start, self._demux()
            while position <= number:
                packet = next(packets, None)
                if packet is None or packet.pts is None or packet.dts is None or packet.dts != entries[position][0]:
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
        order, packets = self._shown(), self._packets().packets
        if order is None or numbers[-1] >= len(order):
            raise Unusable
        pts = [stamp or 0 for stamp in self._packets().pts]  # all are there, or there would be no order
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

    def _rewind(self) -> None:
        if self._dirty:
            self._table = None  # its packets belong to the decoder that goes
        super()._rewind()


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
