"""Decode frames, clips and images from untrusted bytes, touching as little as the wanted frames need.

`Video` opens a file from memory with a fixed demuxer, no protocols and one FFmpeg thread. Frame `i` always means the
i-th frame that decoding the whole stream would yield. Three strategies reach it, the first that is exact wins:
the container's index (streams without reordering: our own shards), a table of all packets (reordering, edit lists),
and plain decoding from the start (no usable times, damaged files). See benchmarks/data.py for what each costs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from diffmae_video.data.media import DEFAULT_LIMITS, IMAGE_FORMATS, Limits, demuxer_of, describe, read_bytes, sniff
from diffmae_video.errors import DataError

if TYPE_CHECKING:  # sharding workers probe without torch
    from PIL import Image
    from torch import Tensor

Source = bytes | str | Path
Box = tuple[int, int, int, int]
"""A crop in pixels of the displayed frame: left, top, width, height."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds; `width` and `height` are as displayed (rotation applied)."""

    frames: int
    fps: float
    width: int
    height: int
    duration: float
    codec: str
    rotation: int
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

    Raises:
        DataError: no video, no decodable video stream, or beyond the limits.
    """

    def __init__(self, source: Source, limits: Limits = DEFAULT_LIMITS):
        self.name = "The video" if isinstance(source, (bytes, bytearray, memoryview)) else str(source)
        self.data = read_bytes(source, limits)
        self.limits = limits
        self.format = demuxer_of(self.data)
        self._table: list[_Packet] | None = None
        self._counted: int | None = None
        self._rotation: int | None = None
        self._dirty = False
        self.errors = 0
        """Packets that failed in the last pass of `decode_all`."""
        self._open()

    def _open(self) -> None:
        options = {"format_whitelist": self.format, "max_pixels": str(self.limits.pixels)}
        if self.format == "mov":  # the header tells everything; skip the guess of the frame rate
            options |= {"fpsprobesize": "0"}
        try:
            self.container = av.open(
                io.BytesIO(self.data),
                format=self.format,
                options=options,
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
        if context.width * context.height > self.limits.pixels or context.width * context.height == 0:
            size = f"{context.width}x{context.height}"
            self.close()
            raise DataError(f"{self.name} has frames of {size}, beyond {self.limits.pixels} pixels; leave it out.")
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
        rotation = self.rotation
        width, height = self.codec.width, self.codec.height
        if rotation in (90, 270):
            width, height = height, width
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
            rotation,
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
                table = self._packets()
                order = self._shown(table)
                self._counted = len(order) if order is not None else sum(1 for _ in self.decode_all())
        return self._counted

    @property
    def rotation(self) -> int:
        """Clockwise turn that display needs, in degrees: 0, 90, 180 or 270 (the display matrix of the first frame)."""
        if self._rotation is None:
            if self.format not in ("mov", "matroska") or (self.format == "mov" and not _turned(self.data)):
                self._rotation = 0
            else:
                frame = next(iter(self.decode_all()), None)
                self._rotation = -round(frame.rotation) % 360 if frame is not None else 0
        return self._rotation

    def decode_all(self) -> Iterator[av.VideoFrame]:
        """All frames in display order; a damaged packet costs its own frames only."""
        self._rewind()
        count = self.errors = 0
        for packet in self._demux():
            try:
                frames = packet.decode()
            except FFmpegError:
                frames, self.errors = [], self.errors + 1
            for frame in frames:
                count += 1
                if count > self.limits.frames:
                    raise DataError(f"{self.name} has more than {self.limits.frames} frames; leave it out or cut it.")
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

        crops = crops or [None] * len(indices)
        wanted: dict[int, list[tuple[int, int]]] = {}  # frame -> places (clip, slot)
        for clip, numbers in enumerate(indices):
            for slot, number in enumerate(numbers):
                wanted.setdefault(int(number), []).append((clip, slot))
        painters = [_Painter(crop, size, self.rotation) for crop in crops]
        outputs: list[np.ndarray | None] = [None] * len(indices)
        times = [np.full(len(numbers), np.nan) for numbers in indices]
        missing = set(wanted)
        last: tuple[int, av.VideoFrame] | None = None
        for number, frame in self._frames_at(sorted(wanted)):
            last = (number, frame) if last is None or number > last[0] else last
            for clip, slot in wanted.get(number, ()):
                outputs[clip] = painters[clip].paint(frame, outputs[clip], len(indices[clip]), slot)
                times[clip][slot] = _time(frame, number, self.stream)
            missing.discard(number)
        if last is None:
            raise DataError(f"{self.name} has no frame that can be decoded; replace or remove it.")
        for number in missing:  # declared, yet not there: the last frame stands in
            for clip, slot in wanted[number]:
                outputs[clip] = painters[clip].paint(last[1], outputs[clip], len(indices[clip]), slot)
                times[clip][slot] = _time(last[1], last[0], self.stream)
        return [Clip(torch.from_numpy(out), torch.from_numpy(pts)) for out, pts in zip(outputs, times, strict=True)]

    # -- strategies ------------------------------------------------------------------------------------------------

    def _frames_at(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (number, frame) for the wanted frames; falls back to plain decoding from the start."""
        found: dict[int, av.VideoFrame] = {}
        strategy = self._by_index if self._index() is not None else self._by_table
        try:
            for number, frame in strategy(numbers):
                found[number] = frame
        except (FFmpegError, _Unusable):
            found = {}
        if len(found) == len(numbers):
            yield from found.items()
            return
        needed, last = set(numbers), None
        for number, frame in enumerate(self.decode_all()):
            last = (number, frame)
            if number in needed:
                yield number, frame
            if number >= numbers[-1]:
                return
        if last is not None:
            self._counted = last[0] + 1
            if last[0] not in needed:
                yield last

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
        position, packets = -1, iter(())  # position: number of the packet that comes next
        for number, start in zip(numbers, starts, strict=True):
            if number >= len(entries):
                raise _Unusable
            if position < 0 or start > position + 48 or position > number:  # short gaps: reading on is cheaper
                self._seek(entries[start][0])
                position, packets = start, self._demux()
            while position <= number:
                packet = next(packets, None)
                if packet is None or packet.dts != entries[position][0]:
                    raise _Unusable
                if position >= start:  # between groups packets are read and dropped
                    frames = packet.decode()
                    if len(frames) != 1 or frames[0].pts != packet.pts:
                        raise _Unusable
                    if position in needed:
                        yield position, frames[0]
                position += 1

    def _packets(self) -> list[_Packet]:
        """Every packet of the stream, read once."""
        if self._table is None:
            self._rewind()
            self._table = []
            for packet in self._demux():
                if packet.size == 0:
                    continue
                hidden = packet.is_discard or _is_hidden(self.codec.name, packet)
                self._table.append(_Packet(packet, packet.pts, packet.is_keyframe, hidden))
                if len(self._table) > self.limits.frames:
                    raise DataError(f"{self.name} has more than {self.limits.frames} frames; leave it out or cut it.")
        return self._table

    def _shown(self, table: list[_Packet]) -> list[int] | None:
        return None if self.format == "avi" else _presentation(table)  # AVI has no times, and packets without a frame

    def _by_table(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """From a table of packets, decode only what the wanted frames refer to."""
        table = self._packets()
        order = self._shown(table)
        if order is None or numbers[-1] >= len(order):
            raise _Unusable
        places = {order[number]: number for number in numbers}  # place in decode order -> frame number
        by_pts = {table[place].pts: number for place, number in places.items()}
        length = _nal_length(self.codec)
        keys = [place for place, packet in enumerate(table) if packet.key]
        ranges: list[list[int]] = []
        for place in sorted(places):
            start = next((k for k in reversed(keys) if k <= place and table[k].pts <= table[place].pts), 0)
            if ranges and start <= ranges[-1][1] + 1:
                ranges[-1][1] = max(ranges[-1][1], place)
            else:
                ranges.append([start, place])
        codec = self.codec
        codec.flush_buffers()
        for start, stop in ranges:
            frames: list[av.VideoFrame] = []
            for place in range(start, stop + 1):
                packet = table[place].packet
                if place not in places and length and _is_unreferenced(packet, length):
                    continue
                frames += packet.decode()
            frames += codec.decode(None)
            codec.flush_buffers()
            for frame in frames:
                number = by_pts.pop(frame.pts, None)
                if number is not None:
                    yield number, frame

    def _demux(self) -> Iterator[av.Packet]:
        try:
            yield from self.container.demux(self.stream)
        except FFmpegError:  # a cut file ends here; what came before is good
            return

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


class _Unusable(Exception):
    """A strategy met something it cannot be exact about."""


@dataclass
class _Packet:
    packet: av.Packet
    pts: int | None
    key: bool
    hidden: bool


def _presentation(table: list[_Packet]) -> list[int] | None:
    """Places of the shown packets in display order, or None where times do not tell."""
    shown = [place for place, packet in enumerate(table) if not packet.hidden]
    if not shown or not table[0].key:
        return None
    stamps = [table[place].pts for place in shown]
    if any(stamp is None for stamp in stamps) or len(set(stamps)) != len(stamps):
        return None
    if any(packet.pts is None or packet.packet.is_corrupt for packet in table) or min(stamps) < table[0].pts:
        return None
    return [place for _, place in sorted(zip(stamps, shown, strict=True))]


def _nal_length(codec: av.VideoCodecContext) -> int:
    """Bytes of the length field before each NAL unit of an H.264 stream in AVCC form; 0 for anything else."""
    extra = codec.extradata
    if codec.name != "h264" or not extra or len(extra) < 7 or extra[0] != 1:
        return 0
    return (extra[4] & 3) + 1


def _is_unreferenced(packet: av.Packet, length: int) -> bool:
    """Whether no other frame refers to this H.264 packet (nal_ref_idc = 0 on its first slice; ITU-T H.264, 7.4.1)."""
    data = memoryview(packet)
    position = 0
    while position + length < len(data):
        header = data[position + length]
        if 1 <= header & 0x1F <= 5:
            return header & 0x60 == 0
        position += length + int.from_bytes(data[position : position + length], "big")
    return False


def _is_hidden(codec: str, packet: av.Packet) -> bool:
    """VP8 keeps frames that are only referred to in packets of their own (RFC 6386, 9.1: show_frame)."""
    return codec in ("vp8", "libvpx") and packet.size > 0 and not memoryview(packet)[0] & 0x10


def _is_cover(stream: av.VideoStream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _turned(data: bytes) -> bool:
    """Whether any track header of an MP4 asks for a turn: its matrix is not the identity (ISO 14496-12, 8.3.2)."""
    start = 0
    while (at := data.find(b"tkhd", start)) >= 0:
        version = data[at + 4] if at + 4 < len(data) else 0
        matrix = data[at + 4 + (52 if version else 40) :][:36]
        if len(matrix) == 36 and matrix[:20] != _UPRIGHT:
            return True
        start = at + 4
    return False


_UPRIGHT = bytes.fromhex("00010000" + "00000000" * 3 + "00010000")


def _time(frame: av.VideoFrame, number: int, stream: av.VideoStream) -> float:
    """When a frame is shown, seconds; by the frame rate where the file has no times."""
    if frame.pts is not None and stream.container.format.name != "avi":  # AVI stores no times, only an order
        return float(frame.pts * stream.time_base)
    rate = stream.average_rate or stream.guessed_rate
    return float(number / rate) if rate else float("nan")


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.split("\n")[0]


class _Painter:
    """Turn frames of one clip into uint8 (T, C, H, W): crop and scale in one swscale context, to planar RGB."""

    def __init__(self, crop: Box | None, size: tuple[int, int] | None, rotation: int):
        self.crop, self.size, self.rotation = crop, size, rotation
        self.reformatter = VideoReformatter()
        self.graph, self.graph_key = None, None

    def paint(self, frame: av.VideoFrame, out: np.ndarray | None, length: int, slot: int) -> np.ndarray:
        if self.rotation:  # rare: shards hold upright frames
            upright = np.rot90(
                self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray(), -self.rotation // 90
            )
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(upright), format="rgb24")
        left, top, width, height = self.crop or (0, 0, frame.width, frame.height)
        if self.crop and (left < 0 or top < 0 or left + width > frame.width or top + height > frame.height):
            raise ValueError(f"crop {self.crop} does not fit a frame of {frame.width}x{frame.height}")
        rows, columns = self.size or ((height, width) if out is None else out.shape[-2:])
        if out is None:
            out = np.empty((length, 3, rows, columns), np.uint8)
        if (rows, columns) == (
            height,
            width,
        ) and frame.width % 32:  # swscale leaves the tail of such gbrp rows unwritten
            rgb = self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            out[slot] = rgb[top : top + rows, left : left + columns].transpose(2, 0, 1)
            return out
        if (rows, columns) == (height, width):
            planar, y, x = self.reformatter.reformat(frame, format="gbrp", threads=1), top, left
        elif self.crop is None:
            planar, y, x = self.reformatter.reformat(frame, columns, rows, "gbrp", threads=1), 0, 0
        else:
            planar, y, x = self._through_graph(frame, (rows, columns)), 0, 0
        for channel, plane in enumerate((planar.planes[2], planar.planes[0], planar.planes[1])):  # G, B, R in memory
            pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            out[slot, channel] = pixels[y : y + rows, x : x + columns]
        return out

    def _through_graph(self, frame: av.VideoFrame, size: tuple[int, int]) -> av.VideoFrame:
        key = (frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range))
        if key != self.graph_key:
            left, top, width, height = self.crop
            graph = av.filter.Graph()
            graph.threads = 1
            nodes = [
                graph.add(
                    "buffer",
                    f"video_size={key[0]}x{key[1]}:pix_fmt={key[2]}:time_base=1/1000:colorspace={key[3]}:range={key[4]}",
                ),
                graph.add("crop", f"{width}:{height}:{left}:{top}"),
                graph.add("scale", f"{size[1]}:{size[0]}:flags=bilinear"),
                graph.add("format", "gbrp"),
                graph.add("buffersink"),
            ]
            for source, target in pairwise(nodes):
                source.link_to(target)
            graph.configure()
            self.graph, self.graph_key = graph, key
        self.graph.vpush(frame)
        return self.graph.vpull()


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
        reformatter = VideoReformatter()
        turns = -self.video.rotation // 90
        first: tuple[int, int] | None = None
        for number, frame in enumerate(self.video.decode_all()):
            first = first or (frame.width, frame.height)  # a stream may change size midway: keep the first
            rgb = reformatter.reformat(frame, *first, format="rgb24", threads=1).to_ndarray()
            pts = _time(frame, number, self.video.stream)
            yield np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb, float(pts)

    def close(self) -> None:
        """Release the decoder."""
        self.video.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_image(source: Source, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Open an image with the reader that its first bytes name; pixels are not decoded yet.

    Raises:
        DataError: not an image of a known kind, or beyond the limits.
    """
    from PIL import Image

    name = "The image" if isinstance(source, (bytes, bytearray, memoryview)) else str(source)
    data = read_bytes(source, limits)
    kind = sniff(data[:1024])
    kind = "GIF" if kind == "gif" else kind.removeprefix("image:") if kind and kind.startswith("image:") else None
    if kind not in IMAGE_FORMATS:
        raise DataError(f"{name} is not a readable image: it is {describe(data[:1024])}; replace or remove it.")
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be decoded ({_reason(error)}); replace or remove it.") from error
    if image.width * image.height > limits.pixels:
        size = f"{image.width}x{image.height}"
        raise DataError(f"{name} has {size} pixels, beyond the limit of {limits.pixels}; leave it out.")
    return image


def read_image(source: Source, limits: Limits = DEFAULT_LIMITS) -> Tensor:
    """Decode an image to uint8 (C, H, W), upright, RGB (alpha dropped, palettes and grey expanded).

    Raises:
        DataError: not an image of a known kind, damaged, or beyond the limits.
    """
    import torch
    from PIL import ImageOps

    with open_image(source, limits) as image:
        try:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"The image cannot be decoded ({_reason(error)}); replace or remove it.") from error
        return torch.from_numpy(np.asarray(upright).transpose(2, 0, 1).copy())  # (C, H, W)
