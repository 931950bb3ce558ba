"""Frames in, frames out: sources with exact times, and writers that keep size, times and audio.

A source yields upright RGB frames one at a time, whatever the length. Every writer makes its file under a temporary
name and moves it into place when it is whole.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from diffmae_video.data.decode import Video
from diffmae_video.data.images import read_image
from diffmae_video.data.media import Limits, read_head, sniff
from diffmae_video.errors import DataError, UsageError
from diffmae_video.files import replacing, sync_path
from diffmae_video.rendering.masks import list_images

BT709 = 1  # ISO 23091-2 code points of colour primaries, transfer and matrix; also FFmpeg's numbers
NARROW_RANGE = 1
_ANY_LENGTH = 1 << 31  # frames; they are read one at a time
COPIED_IN_MP4 = ("aac", "mp3", "ac3", "eac3", "opus", "flac", "alac")


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
        pixel_aspect: width of a displayed pixel by its height; frames keep the grid of pixels that the file has.

    Raises:
        DataError: the file is none of these, or damaged beyond use.
    """

    def __init__(self, path: Path | str, fps: float = 24.0) -> None:
        self.path = Path(path)
        self.pixel_aspect = Fraction(1)
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
        self.has_audio = info.has_audio
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


class VideoWriter:
    """An H.264 (MP4) or FFV1 (Matroska) file; frames keep the times they are given.

    Args:
        path: where the file appears once it is whole.
        size: height and width; odd sizes become 4:4:4 in H.264, since 4:2:0 has no half pixel.
        time_base: unit of the times.
        fps: nominal frame rate.
        codec: `h264` or `ffv1`; FFV1 keeps RGB bit for bit, and Matroska rounds times to milliseconds.
        crf: H.264 quality.
        source: a source whose audio is copied beside, and whose pixels' aspect is kept.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        time_base: Fraction,
        fps: Fraction,
        *,
        codec: str = "h264",
        crf: int = 17,
        source: VideoSource | None = None,
    ) -> None:
        self.path, self.temporary = Path(path), _temporary(Path(path))
        self.codec = codec
        height, width = size
        container = {"h264": "mp4", "ffv1": "matroska"}[codec]
        options = {"fflags": "+bitexact"}  # no random identifiers
        if codec == "h264":
            options["movflags"] = "+faststart"
        self.container = av.open(str(self.temporary), "w", format=container, options=options)
        encoder = {"h264": "libx264", "ffv1": "ffv1"}[codec]
        choices = {"level": "3", "slicecrc": "1"}
        if codec == "h264":  # the macroblock tree makes bytes depend on leftovers in memory (docs/decisions.md)
            choices = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
        self.stream = self.container.add_stream(encoder, rate=fps.limit_denominator(1_000_000), options=choices)
        self.time_base = time_base  # Matroska rounds to milliseconds
        context = self.stream.codec_context
        self.stream.width, self.stream.height = width, height
        if source is not None and source.pixel_aspect != 1:
            context.sample_aspect_ratio = source.pixel_aspect
        even = height % 2 == 0 and width % 2 == 0
        self.format = "bgr0" if codec == "ffv1" else "yuv420p" if even else "yuv444p"
        self.stream.pix_fmt = self.format
        context.thread_count = 1  # the same bytes on any machine
        context.time_base, self.stream.time_base = time_base, time_base
        if codec == "h264":
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = NARROW_RANGE
        self.reformatter = VideoReformatter()
        self.sound = _Sound(self.container, source, codec) if source is not None and source.has_audio else None
        self.frames = 0

    def write(self, rgb: np.ndarray, pts: int) -> None:
        """Add a frame uint8 (H, W, 3) that is shown at `pts` units of the time base."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        colours = {"dst_colorspace": "ITU709"} if self.codec == "h264" else {}
        frame = self.reformatter.reformat(frame, format=self.format, threads=1, **colours)
        frame.pts, frame.time_base = pts, self.time_base
        self.container.mux(self.stream.encode(frame))
        if self.sound is not None:
            self.sound.copy_until(pts * self.time_base)
        self.frames += 1

    def close(self) -> None:
        """Finish the file and move it into place."""
        self.container.mux(self.stream.encode())
        if self.sound is not None:
            self.sound.copy_until(None)
            self.sound.close()
        self.container.close()
        _settle(self.temporary, self.path)

    def abort(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(FFmpegError, OSError, ValueError):
            self.container.close()
        if self.sound is not None:
            self.sound.close()
        self.temporary.unlink(missing_ok=True)


class _Sound:
    """Audio packets of the source, muxed as they are where the container takes the codec, as AAC otherwise."""

    def __init__(self, output: av.container.OutputContainer, source: VideoSource, codec: str) -> None:
        self.output, self.source, self.input = output, source, None
        opened = source.audio()
        if opened is None:
            return
        self.input, stream = opened
        self.copies = codec != "h264" or stream.codec_context.name in COPIED_IN_MP4
        if self.copies:
            self.stream = output.add_stream_from_template(stream)
        else:
            rate = stream.codec_context.sample_rate or 48000
            layout = "mono" if stream.codec_context.channels == 1 else "stereo"
            self.stream = output.add_stream("aac", rate=rate, layout=layout, format="fltp")
            self.resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate, frame_size=1024)
        self.packets = self._copied(stream) if self.copies else self._encoded(stream)
        self.waiting: av.Packet | None = None

    def copy_until(self, time: Fraction | None) -> None:
        """Mux the packets up to a time in seconds; all that are left for None."""
        if self.input is None:
            return
        while True:
            packet = self.waiting or next(self.packets, None)
            self.waiting = None
            if packet is None:
                return
            stamp = packet.dts if packet.dts is not None else packet.pts
            if time is not None and stamp is not None and stamp * packet.time_base > time:
                self.waiting = packet
                return
            self.output.mux(packet)

    def _copied(self, stream: av.AudioStream) -> Iterator[av.Packet]:
        for packet in _demux(self.input, stream):
            if packet.dts is None or packet.size == 0:
                continue
            shift = round(self.source.start / packet.time_base)
            packet.dts -= shift
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.stream = self.stream
            yield packet

    def _encoded(self, stream: av.AudioStream) -> Iterator[av.Packet]:
        for packet in _demux(self.input, stream):
            try:
                frames = packet.decode()
            except FFmpegError:
                continue
            for frame in frames:
                if frame.pts is not None:
                    frame.pts -= round(self.source.start / frame.time_base)
                for part in self.resampler.resample(frame):
                    yield from self.stream.encode(part)
        for part in self.resampler.resample(None):
            yield from self.stream.encode(part)
        yield from self.stream.encode()

    def close(self) -> None:
        if self.input is not None:
            self.input.close()


def _demux(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.Packet]:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, FFmpegError):  # a cut file ends here
            return
        yield packet


class FolderWriter:
    """PNG frames `00000.png`, `00001.png`, ... in a folder that appears once it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary, self.frames = Path(path), _temporary(Path(path)), 0
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)

    def write(self, rgb: np.ndarray, pts: int) -> None:
        """Add a frame uint8 (H, W, 3); its time is not kept."""
        write_png(self.temporary / f"{self.frames:05d}.png", rgb)
        self.frames += 1

    def close(self) -> None:
        """Move the folder into place."""
        if self.path.exists():
            shutil.rmtree(self.path)
        os.replace(self.temporary, self.path)

    def abort(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.temporary, ignore_errors=True)


class GifWriter:
    """An animated GIF: 256 colours a frame, times in hundredths of a second, each frame written as it comes."""

    def __init__(self, path: Path, time_base: Fraction, fps: Fraction) -> None:
        self.path, self.temporary = Path(path), _temporary(Path(path))
        self.time_base, self.fps = time_base, fps
        self.file = open(self.temporary, "wb")  # noqa: SIM115 - open as long as the writer
        self.waiting: tuple[np.ndarray, int] | None = None
        self.frames = 0
        self.shown = 0  # hundredths of a second that the frames so far take

    def write(self, rgb: np.ndarray, pts: int) -> None:
        """Add a frame uint8 (H, W, 3) that is shown at `pts` units of the time base."""
        if self.waiting is not None:
            self._emit(pts)
        self.waiting = (rgb, pts)
        self.frames += 1

    def _emit(self, end: float) -> None:
        from PIL import Image
        from PIL.GifImagePlugin import getdata, getheader

        rgb, _ = self.waiting
        # each frame ends at its rounded time, so that rounding does not add up; below 2 browsers slow down to 10
        hundredths = max(2, round(end * self.time_base * 100) - self.shown)
        self.shown += hundredths
        image = Image.fromarray(rgb).quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
        if self.file.tell() == 0:
            for block in getheader(image, info={"loop": 0})[0]:
                self.file.write(block)
        for block in getdata(image, duration=hundredths * 10, include_color_table=True):
            self.file.write(block)

    def close(self) -> None:
        """Finish the file and move it into place."""
        if self.waiting is not None:
            self._emit(self.waiting[1] + 1 / self.fps / self.time_base)
        self.file.write(b";")
        self.file.close()
        _settle(self.temporary, self.path)

    def abort(self) -> None:
        """Leave nothing behind."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


Writer = VideoWriter | FolderWriter | GifWriter


def open_writer(
    folder: Path, stem: str, source: VideoSource, codec: str, crf: int, size: tuple[int, int] | None = None
) -> Writer:
    """The writer of a rendered clip: `STEM.mp4`, `STEM.mkv` (ffv1), `STEM.gif`, or PNG frames in the folder `STEM`."""
    size = size or (source.height, source.width)
    if codec == "png":
        return FolderWriter(folder / stem)
    if codec == "gif":
        return GifWriter(folder / f"{stem}.gif", source.time_base, source.fps)
    suffix = {"h264": "mp4", "ffv1": "mkv"}.get(codec)
    if suffix is None:
        raise UsageError(f"--codec {codec}: choose h264, ffv1, gif or png.")
    sound = source if source.kind == "video" else None
    return VideoWriter(
        folder / f"{stem}.{suffix}", size, source.time_base, source.fps, codec=codec, crf=crf, source=sound
    )


def write_png(path: Path, rgb: np.ndarray) -> None:
    """Write a picture uint8 (H, W, 3) or (H, W), whole or not at all."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(rgb).save(temporary, format="PNG", compress_level=3)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _settle(temporary: Path, path: Path) -> None:
    sync_path(temporary)
    os.replace(temporary, path)
