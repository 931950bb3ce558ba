"""A video of a stranger, opened from memory: one demuxer, no protocols, one FFmpeg thread, sizes checked first.

`VideoFile` tells how and when frames are shown, and decodes from the start or from a key frame on; `decode.Video` adds
frames by number.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Self, cast

import av
import av.stream
from av.error import FFmpegError

from diffmae_video.data.display import PLAIN, Display, display_matrix, display_of, has_dolby_vision
from diffmae_video.data.media import DEFAULT_LIMITS, Limits, demuxer_of, read_bytes
from diffmae_video.data.packets import has_orientation, has_turned_track, needs_dolby_vision
from diffmae_video.errors import DataError, LimitError

Source = bytes | str | Path
_UNSPECIFIED = 2  # transfer characteristics, ISO 23091-2
_PROGRESSIVE = 1  # FFmpeg's field orders: 0 unknown, above 1 interlaced


class VideoFile:
    """A video in memory.

    Args:
        source: bytes, or the path of a local file.
        limits: bounds that are checked before frames are decoded.
        known: frame count and size are known and frames are shown as they are stored (shards that `diffmae shard`
            encoded): FFmpeg's look into the stream, a tenth of the cost of a clip, is left out for MP4, and sizes are
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
        opening: dict[str, Any] = {"metadata_errors": "replace", "io_open": _refuse, "buffer_size": 1 << 16}
        if self.known:
            opening["stream_options"] = [{"skip_frame": "all"}]
        try:
            self.container = av.open(
                io.BytesIO(self.data),
                format=self.format,
                options=options,
                **opening,
            )
        except (FFmpegError, ValueError, OSError) as error:
            raise DataError(f"{self.name} cannot be opened ({_reason(error)}); replace or remove it.") from error
        streams = [stream for stream in self.container.streams.video if not _is_cover(stream)]
        if not streams or cast(Any, streams[0].codec_context) is None:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def display(self) -> Display:
        """What is done to frames before they are shown.

        Raises:
            DataError: their colours cannot be read.
        """
        if self._display is None:
            self._display = PLAIN
            if not self.known or has_turned_track(self.data):
                matrix, dolby = None, self.format == "mov" and needs_dolby_vision(self.data)
                if self._may_be_turned() and not dolby:
                    frame = next(iter(self.decode_all()), None)
                    if frame is not None:
                        matrix = display_matrix(frame)
                        dolby = has_dolby_vision(frame) and int(self.codec.color_trc) == _UNSPECIFIED
                self._display = display_of(self.stream, self.name, matrix, dolby)
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
    def interlaced(self) -> bool:
        """Whether the stream says that its frames hold two fields; it is decoded frame by frame nevertheless."""
        return int(self.codec.field_order) > _PROGRESSIVE

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

    def _too_long(self) -> LimitError:
        return LimitError(f"{self.name} has more than {self.limits.frames} frames; leave it out or cut it.")

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
            self.container.close()
            self._open()
        self._dirty = True


def _refuse(*_: object) -> None:
    raise PermissionError("a media file may not open other files")


def _is_cover(stream: av.VideoStream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.split("\n")[0]
