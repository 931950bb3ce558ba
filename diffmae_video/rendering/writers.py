"""Files of frames: writers that keep size, times and audio.

Every writer makes its file under a temporary name and moves it into place when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.filter
import numpy as np
from av.error import BlockingIOError, FFmpegError
from av.video.reformatter import Colorspace, VideoReformatter
from PIL import Image

from diffmae_video.errors import UsageError
from diffmae_video.files import replacing, sync_path
from diffmae_video.rendering.source import VideoSource

BT709 = 1  # ISO 23091-2 code points of colour primaries, transfer and matrix; also FFmpeg's numbers
NARROW_RANGE = 1
COPIED_IN_MP4 = ("aac", "mp3", "ac3", "eac3", "opus", "flac", "alac")
HUNDREDTH = Fraction(1, 100)  # a GIF's unit of time
GIF_SHORTEST = 2  # hundredths of a second: browsers show shorter frames for ten


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
        stream = self.container.add_stream(encoder, rate=fps.limit_denominator(1_000_000), options=choices)
        assert isinstance(stream, av.VideoStream)
        self.stream = stream
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
        self.sound = _AudioCopy(self.container, source, codec) if source is not None and source.has_audio else None
        self.frames = 0

    def write(self, rgb: np.ndarray, pts: int) -> None:
        """Add a frame uint8 (H, W, 3) that is shown at `pts` units of the time base."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        matrix = Colorspace.ITU709 if self.codec == "h264" else None
        frame = self.reformatter.reformat(frame, format=self.format, dst_colorspace=matrix, threads=1)
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


class _AudioCopy:
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
        packets = _demux(self.input, stream)
        self.packets = self._copied(packets) if self.copies else self._encoded(packets)
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

    def _copied(self, packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
        for packet in packets:
            if packet.dts is None or packet.size == 0:
                continue
            shift = round(self.source.start / packet.time_base)
            packet.dts -= shift
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.stream = self.stream
            yield packet

    def _encoded(self, packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
        for packet in packets:
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


class PictureWriter:
    """One PNG picture."""

    def __init__(self, path: Path) -> None:
        self.path, self.frames = Path(path), 0
        self.rgb: np.ndarray | None = None

    def write(self, rgb: np.ndarray, pts: int) -> None:
        """Take the picture uint8 (H, W, 3)."""
        self.rgb, self.frames = rgb, self.frames + 1

    def close(self) -> None:
        """Write the file."""
        if self.rgb is not None:
            write_png(self.path, self.rgb)

    def abort(self) -> None:
        """Nothing was written."""


class GifWriter:
    """An animated GIF: 256 colours a frame, times in hundredths of a second, each frame written as it comes."""

    def __init__(self, path: Path, size: tuple[int, int], time_base: Fraction, fps: Fraction) -> None:
        self.path, self.temporary = Path(path), _temporary(Path(path))
        self.time_base, self.frames = time_base, 0
        self.last = -GIF_SHORTEST  # hundredths of a second at which the frame before is shown
        options = {"loop": "0", "final_delay": str(max(GIF_SHORTEST, round(100 / fps)))}
        self.container = av.open(str(self.temporary), "w", format="gif", options=options)
        self.stream = self.container.add_stream("gif", rate=fps.limit_denominator(1_000_000))
        self.stream.height, self.stream.width, self.stream.pix_fmt = *size, "pal8"
        self.stream.codec_context.time_base = self.stream.time_base = HUNDREDTH
        self.graph = av.filter.Graph()  # each frame gets a palette of its own
        rgb = av.VideoFormat("rgb24")
        source = self.graph.add_buffer(width=size[1], height=size[0], format=rgb, time_base=HUNDREDTH)
        split, palette = self.graph.add("split"), self.graph.add("palettegen", "stats_mode=single")
        use, sink = self.graph.add("paletteuse", "new=1:dither=floyd_steinberg"), self.graph.add("buffersink")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(use, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        self.graph.configure()

    def write(self, rgb: np.ndarray, pts: int) -> None:
        """Add a frame uint8 (H, W, 3) that is shown at `pts` units of the time base."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        self.last = max(self.last + GIF_SHORTEST, round(pts * self.time_base * 100))
        frame.pts, frame.time_base = self.last, HUNDREDTH
        self.graph.push(frame)
        with contextlib.suppress(BlockingIOError):  # no picture yet
            while True:
                picture = self.graph.pull()
                assert isinstance(picture, av.VideoFrame)
                picture.time_base = HUNDREDTH
                self.container.mux(self.stream.encode(picture))
        self.frames += 1

    def close(self) -> None:
        """Finish the file and move it into place."""
        self.container.mux(self.stream.encode())
        self.container.close()
        _settle(self.temporary, self.path)

    def abort(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(FFmpegError, OSError, ValueError):
            self.container.close()
        self.temporary.unlink(missing_ok=True)


Writer = VideoWriter | FolderWriter | PictureWriter | GifWriter


def open_writer(
    folder: Path, stem: str, source: VideoSource, codec: str, crf: int, size: tuple[int, int] | None = None
) -> Writer:
    """The writer of a rendered clip: `STEM.mp4` (h264), `STEM.mkv` (ffv1), `STEM.gif`, or PNG frames in `STEM`.

    A single picture becomes `STEM.png` whatever the codec, but for gif.

    Args:
        size: height and width; the source's without it.

    Raises:
        UsageError: an unknown codec.
    """
    size = size or (source.height, source.width)
    if source.kind == "image" and codec != "gif":
        return PictureWriter(folder / f"{stem}.png")
    if codec == "png":
        return FolderWriter(folder / stem)
    if codec == "gif":
        return GifWriter(folder / f"{stem}.gif", size, source.time_base, source.fps)
    suffix = {"h264": "mp4", "ffv1": "mkv"}.get(codec)
    if suffix is None:
        raise UsageError(f"--codec {codec}: choose h264, ffv1, gif or png.")
    sound = source if source.kind == "video" else None
    return VideoWriter(
        folder / f"{stem}.{suffix}", size, source.time_base, source.fps, codec=codec, crf=crf, source=sound
    )


def write_png(path: Path, rgb: np.ndarray) -> None:
    """Write a picture uint8 (H, W, 3) or (H, W), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(rgb).save(temporary, format="PNG", compress_level=3)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _settle(temporary: Path, path: Path) -> None:
    sync_path(temporary)
    os.replace(temporary, path)
