"""Turn one input file into the bytes of one sample: scale, re-encode, keep times; runs in a process of its own.

Nothing here imports torch: a worker (worker_process.py) starts in a fraction of a second.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from diffmae_video.data.display import BT709, LIMITED, Display, matrix_to_keep
from diffmae_video.data.media import DEFAULT_LIMITS, MEDIA_SUFFIXES, Limits
from diffmae_video.errors import DataError, LimitError

if TYPE_CHECKING:
    from diffmae_video.data.decode import Video


@dataclass(frozen=True)
class TranscodeOptions:
    """How inputs become samples; all of it decides the bytes of the shards."""

    kind: str = "video"
    copy: bool = False
    """Keep the bytes; they are still decoded once, to know that they can be and how many frames they hold."""
    trim: bool = False
    """Keep only the annotated span."""
    short_side: int = 256
    """Pixels of the shorter side; smaller inputs keep their size."""
    fps: float | None = None
    """Frame rate to convert to; the input's own times without it."""
    crf: int = 23
    preset: str = "veryfast"
    gop: int = 16
    b_frames: int = 3
    """Between two reference frames; nothing refers to them, so a reader drops those that no clip wants."""
    tune: str = "fastdecode"
    x264: str = "mbtree=0:rc-lookahead=0:ipratio=1.7:pbratio=1.5"
    """x264's own settings. Its macroblock tree is off because its bytes depend on the processor and, with AVX-512, on
    what memory held before; finer key frames and coarser B frames give back half of its gain (docs/data.md)."""
    quality: int = 92
    """JPEG quality of images that are scaled."""
    min_frames: int = 1
    limits: Limits = DEFAULT_LIMITS


def options_to_json(options: TranscodeOptions) -> dict[str, Any]:
    """Options as plain values, for the wire and for the record of a run."""
    return asdict(options)


def options_from_json(body: dict[str, Any]) -> TranscodeOptions:
    """The inverse of `options_to_json`; what is not known is left out."""
    known = {field.name for field in fields(TranscodeOptions)} - {"limits"}
    limits = Limits(**body["limits"]) if "limits" in body else DEFAULT_LIMITS
    return TranscodeOptions(**{name: value for name, value in body.items() if name in known}, limits=limits)


def transcode(
    data: bytes, options: TranscodeOptions, span: tuple[float, float] | None = None
) -> tuple[bytes, str, dict]:
    """Bytes, suffix and facts (frames, fps, width, height) of the sample made from one input.

    Raises:
        DataError: the input cannot be used.
    """
    if options.kind == "image":
        return _image(data, options)
    return _copy(data, options) if options.copy else _encode(data, options, span)


def even_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Size with the shorter side at most `short_side`, same aspect, even numbers (4:2:0 needs them)."""
    scale = min(1.0, short_side / min(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def _copy(data: bytes, options: TranscodeOptions) -> tuple[bytes, str, dict]:
    from diffmae_video.data.decode import probe

    info = probe(data, options.limits, exact=True)
    _enough(info.frames, options)
    suffix = {"mov": "mp4", "matroska": "mkv", "avi": "avi"}.get(info.container, "mp4")
    if info.container == "matroska" and b"webm" in data[:64]:
        suffix = "webm"
    if info.container not in ("mov", "matroska", "avi"):
        raise DataError(f"--copy keeps MP4, Matroska, WebM and AVI, not {info.container}; leave --copy out.")
    facts = {"frames": info.frames, "fps": info.fps, "width": info.width, "height": info.height}
    return data, suffix, facts | ({"interlaced": True} if info.interlaced else {})


def _encode(data: bytes, options: TranscodeOptions, span: tuple[float, float] | None) -> tuple[bytes, str, dict]:
    from diffmae_video.data.decode import Video

    span = span if options.trim else None
    with Video(data, options.limits) as video:
        _check_length(video, span, options.limits.seconds)
        frames = _shown(video, span)
        rate = video.rate
        if options.fps:
            rate = Fraction(options.fps).limit_denominator(1001)
            frames = _resampled(frames, rate)
        sink, count, end = io.BytesIO(), 0, 0.0
        encoder = _Encoder(sink, video.display, rate, options)
        try:
            for frame, time in frames:
                if time > options.limits.seconds:
                    raise _too_long(time, options.limits.seconds)
                encoder.add(frame, time)
                count, end = count + 1, time
            if not count and span:
                raise DataError(f"No frame lies between {span[0]:g} and {span[1]:g} s; is the file cut already?")
            if not count:
                raise DataError("The video has no frame that can be decoded; replace or remove it.")
        finally:
            encoder.close()
        errors, interlaced = video.errors, video.interlaced
    _enough(count, options)
    fps = float(rate) if count < 2 or end <= 0 else (count - 1) / end
    width, height = encoder.size
    meta: dict[str, Any] = {"frames": count, "fps": round(fps, 4), "width": width, "height": height}
    meta |= ({"decode_errors": errors} if errors else {}) | ({"interlaced": True} if interlaced else {})
    return sink.getvalue(), "mp4", meta


class _Encoder:
    """H.264 in MP4, square pixels, upright, in limited range; the matrix of the source is kept and named."""

    def __init__(self, sink: io.BytesIO, display: Display, rate: Fraction, options: TranscodeOptions):
        self.display, self.rate, self.options = display, rate, options
        self.redrawn = display.turned or bool(display.transfer)  # through RGB; else swscale does all in one go
        self.out = av.open(sink, "w", format="mp4", container_options={"fflags": "+bitexact"})
        self.stream: av.VideoStream | None = None
        self.size, self.matrix, self.stamp = (0, 0), BT709, -1
        self.scaler, self.drawer = VideoReformatter(), VideoReformatter()

    def add(self, frame: av.VideoFrame, time: float) -> None:
        """Scale and encode a frame that is shown at `time`, seconds."""
        if self.stream is None:
            self.size = even_size(*self.display.size(frame.width, frame.height), self.options.short_side)
            self.stream = self._add_stream(frame)
        if self.redrawn:
            rgb = self.display._replace(aspect=Fraction(1)).rgb(frame, self.drawer)
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        colours = {"dst_colorspace": _SWSCALE[self.matrix], "dst_color_range": ColorRange.MPEG}
        scaled = self.scaler.reformat(frame, *self.size, "yuv420p", interpolation=_BICUBIC, threads=1, **colours)
        scaled.pict_type = 0  # the encoder places the key frames
        scaled.time_base = _CLOCK
        self.stamp = scaled.pts = max(self.stamp + 1, round(time / _CLOCK))
        self.out.mux(self.stream.encode(scaled))

    def close(self) -> None:
        """Write what the encoder still holds, and the index."""
        try:
            if self.stream is not None:
                self.out.mux(self.stream.encode())
        finally:
            self.out.close()

    def _add_stream(self, frame: av.VideoFrame) -> av.VideoStream:
        options = self.options
        settings = {"crf": str(options.crf), "preset": options.preset, "g": str(options.gop)}
        settings |= {"bf": str(options.b_frames), "keyint_min": str(options.gop), "sc_threshold": "0"}
        if options.tune:
            settings["tune"] = options.tune
        fixed = ["b-adapt=0", "b-pyramid=none"] if options.b_frames else []
        settings["x264-params"] = ":".join([*fixed, *filter(None, [options.x264])])
        stream = self.out.add_stream("libx264", rate=self.rate, options=settings)
        stream.width, stream.height, stream.pix_fmt = *self.size, "yuv420p"
        context = stream.codec_context
        context.time_base = _CLOCK
        context.thread_count = 1  # one worker a core; the bytes do not depend on the machine
        self.matrix = BT709 if self.redrawn else matrix_to_keep(frame)
        primaries, transfer = int(frame.color_primaries), int(frame.color_trc)
        if self.display.transfer:
            primaries = transfer = BT709
        context.colorspace, context.color_range = self.matrix, LIMITED
        context.color_primaries = primaries if primaries in _PRIMARIES else _UNKNOWN
        context.color_trc = transfer if transfer in _TRANSFERS else _UNKNOWN
        return stream


_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND  # without it a change of matrix is half a level dark
_CLOCK = Fraction(1, 90_000)
_SWSCALE = {1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601} | {
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
_PRIMARIES, _TRANSFERS, _UNKNOWN = {1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 22}, {1, *range(4, 19)}, 2


def _check_length(video: Video, span: tuple[float, float] | None, most: float) -> None:
    """Refuse what would be too long before it is decoded; a declared duration may lie, so frames have to agree."""
    if span:
        seconds = span[1] - span[0]
        if seconds > most:
            raise _too_long(seconds, most)
    elif video.stream.duration and video.stream.time_base:
        seconds = float(video.stream.duration * video.stream.time_base)
        if seconds > most and video.frames > most:  # more than one frame a second
            raise _too_long(seconds, most)


def _too_long(seconds: float, most: float) -> LimitError:
    return LimitError(f"It lasts {seconds:.0f} s or more, above the limit of {most:.0f} s for one sample; cut it.")


def _shown(video: Video, span: tuple[float, float] | None) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames with the times at which they are shown, from 0 and strictly rising; of a span, those that lie in it."""
    source = video.decode_all()
    head = next(source, None)
    if head is None:
        return
    origin, least = video.time(head, 0), 1 / float(video.rate)
    start, end = span or (0.0, math.inf)
    source = video.decode_from(origin + start) if start > 10 else itertools.chain([head], source)
    last = -math.inf
    for number, frame in enumerate(source):
        time = video.time(frame, number) - origin
        if time <= last:
            time = last + least
        last = time
        if time >= end:
            return
        if time >= start:
            yield frame, time - start


def _resampled(frames: Iterator[tuple[Any, float]], rate: Fraction) -> Iterator[tuple[Any, float]]:
    """The frame shown at each tick of a constant rate."""
    tick, held, shown, length = 0, None, 0.0, 0.0
    for frame, time in frames:
        while held is not None and tick / rate < time:
            yield held, float(tick / rate)
            tick += 1
        held, shown, length = frame, time, time - shown
    while held is not None and (tick == 0 or tick / rate < shown + length - 1e-6):  # the last lasts as the one before
        yield held, float(tick / rate)
        tick += 1


def _image(data: bytes, options: TranscodeOptions) -> tuple[bytes, str, dict]:
    from PIL import Image

    from diffmae_video.data.images import open_image, to_rgb

    with open_image(data, options.limits) as image:
        kind, plain = image.format or "", image.format == "JPEG" and image.mode == "RGB"
        plain = plain and image.getexif().get(0x0112, 1) == 1 and min(image.size) <= options.short_side
        upright = to_rgb(image)  # also tells whether it can be decoded
    facts = {"frames": 1, "fps": 0.0, "width": upright.width, "height": upright.height}
    suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    if options.copy and suffix not in MEDIA_SUFFIXES["image"]:
        raise DataError(f"--copy keeps {', '.join(MEDIA_SUFFIXES['image'])}, not {suffix}; leave --copy out.")
    if options.copy or plain:
        return data, suffix, facts
    scale = min(1.0, options.short_side / min(upright.size))
    width, height = (max(1, round(side * scale)) for side in upright.size)
    if (width, height) != upright.size:
        upright = upright.resize((width, height), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    upright.save(sink, "JPEG", quality=options.quality)
    return sink.getvalue(), "jpg", facts | {"width": width, "height": height}


def _enough(frames: int, options: TranscodeOptions) -> None:
    if frames < options.min_frames:
        raise DataError(f"The video has {frames} frames, fewer than --min-frames {options.min_frames}.")
