"""Turn one input file into the bytes of one sample: scale, re-encode, keep times; runs in a process of its own.

Nothing here imports torch: a worker (worker_process.py) starts in a fraction of a second.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any

from diffmae_video.data.media import DEFAULT_LIMITS, Limits
from diffmae_video.errors import DataError


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
    return data, suffix, {"frames": info.frames, "fps": info.fps, "width": info.width, "height": info.height}


def _encode(data: bytes, options: TranscodeOptions, span: tuple[float, float] | None) -> tuple[bytes, str, dict]:
    import av

    from diffmae_video.data.decode import Video

    with Video(data, options.limits) as video:
        seconds = video.stream.duration and float(video.stream.duration * video.stream.time_base)
        if seconds and seconds > options.limits.seconds and not video.frames < options.limits.frames:
            raise DataError(f"The video lasts {seconds:.0f} s, above the limit; cut it with --trim.")
        frames = _upright(video)
        if options.trim and span:
            frames = _within(frames, *span)
        rate = video.stream.average_rate or video.stream.guessed_rate or Fraction(25)
        rate = rate if 0 < rate <= 1000 else Fraction(25)
        if options.fps:
            rate = Fraction(options.fps).limit_denominator(1001)
            frames = _resampled(frames, rate)
        sink, count, size, end = io.BytesIO(), 0, (0, 0), 0.0
        out = av.open(sink, "w", format="mp4", container_options={"fflags": "+bitexact"})
        try:
            stream = None
            for frame, time in frames:
                if stream is None:
                    size = even_size(frame.width, frame.height, options.short_side)
                    stream = _add_stream(out, size, rate, options)
                    reformatter, base, stamp = av.video.reformatter.VideoReformatter(), Fraction(1, 90_000), -1
                scaled = reformatter.reformat(frame, *size, format="yuv420p", interpolation="BICUBIC", threads=1)
                scaled.pict_type = 0  # the encoder places the key frames
                scaled.time_base = base
                stamp = scaled.pts = max(stamp + 1, round(time / base))
                out.mux(stream.encode(scaled))
                count += 1
                end = time
            if stream is None and options.trim and span:
                raise DataError(f"No frame lies between {span[0]:g} and {span[1]:g} s; is the file cut already?")
            if stream is None:
                raise DataError("The video has no frame that can be decoded; replace or remove it.")
            out.mux(stream.encode())
        finally:
            out.close()
    _enough(count, options)
    fps = float(rate) if count < 2 or end <= 0 else (count - 1) / end
    meta: dict[str, Any] = {"frames": count, "fps": round(fps, 4), "width": size[0], "height": size[1]}
    if video.errors:
        meta["decode_errors"] = video.errors
    return sink.getvalue(), "mp4", meta


def _add_stream(out: Any, size: tuple[int, int], rate: Fraction, options: TranscodeOptions) -> Any:
    settings = {"crf": str(options.crf), "preset": options.preset, "g": str(options.gop), "bf": str(options.b_frames)}
    settings |= {"keyint_min": str(options.gop), "sc_threshold": "0"}
    if options.tune:
        settings["tune"] = options.tune
    fixed = ["b-adapt=0", "b-pyramid=none"] if options.b_frames else []
    settings["x264-params"] = ":".join([*fixed, *filter(None, [options.x264])])
    stream = out.add_stream("libx264", rate=rate, options=settings)
    stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
    stream.codec_context.time_base = Fraction(1, 90_000)
    stream.codec_context.thread_count = 1  # one worker a core; the bytes do not depend on the machine
    return stream


def _upright(video: Any) -> Iterator[tuple[Any, float]]:
    """Frames with display times from 0, strictly rising; rotated ones are turned."""
    import av
    import numpy as np

    rate = video.stream.average_rate or video.stream.guessed_rate or 25
    turns = video.rotation // 90
    first, last = None, -1.0
    for number, frame in enumerate(video.decode_all()):
        time = frame.time if frame.pts is not None else None
        first = time if first is None and time is not None else first
        time = time - first if time is not None else number / float(rate)
        if time <= last:
            time = last + 1 / max(1.0, min(1000.0, float(rate)))
        last = time
        if turns:
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), -turns)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        yield frame, time


def _within(frames: Iterator[tuple[Any, float]], start: float, end: float) -> Iterator[tuple[Any, float]]:
    for frame, time in frames:
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
    from PIL import Image, ImageOps

    from diffmae_video.data.images import open_image

    with open_image(data, options.limits) as image:
        image.load()
        small = min(image.size) <= options.short_side
        plain = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
        if options.copy or (small and plain):
            upright = ImageOps.exif_transpose(image)
            suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(image.format, image.format.lower())
            return data, suffix, {"frames": 1, "fps": 0.0, "width": upright.width, "height": upright.height}
        upright = ImageOps.exif_transpose(image).convert("RGB")
        scale = min(1.0, options.short_side / min(upright.size))
        size = tuple(max(1, round(side * scale)) for side in upright.size)
        if size != upright.size:
            upright = upright.resize(size, Image.Resampling.BICUBIC)
        sink = io.BytesIO()
        upright.save(sink, "JPEG", quality=options.quality)
        return sink.getvalue(), "jpg", {"frames": 1, "fps": 0.0, "width": size[0], "height": size[1]}


def _enough(frames: int, options: TranscodeOptions) -> None:
    if frames < options.min_frames:
        raise DataError(f"The video has {frames} frames, fewer than --min-frames {options.min_frames}.")
