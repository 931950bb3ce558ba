"""Turn decoded frames into uint8 (T, C, H, W): crop and scale inside swscale, into planes of the output array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import cast

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import VideoReformatter

from diffmae_video.data.display import EXACT, Display

Box = tuple[int, int, int, int]
"""A crop in pixels of the displayed frame: left, top, width, height."""


class ClipFrames:
    """The clips of one video while its frames come in; frames may come in any order and more than once.

    Args:
        indices: frame numbers of each clip, in any order, repeats allowed.
        crops: a box for each clip, or None for whole frames.
        size: height and width to scale each crop to; None keeps the crop's own.
        display: what is done to frames before they are shown.
    """

    def __init__(
        self,
        indices: Sequence[Sequence[int]],
        crops: Sequence[Box | None],
        size: tuple[int, int] | None,
        display: Display,
    ):
        self.lengths = [len(numbers) for numbers in indices]
        self.wanted: dict[int, list[tuple[int, int]]] = {}  # frame -> places (clip, slot)
        for clip, numbers in enumerate(indices):
            for slot, number in enumerate(numbers):
                self.wanted.setdefault(int(number), []).append((clip, slot))
        self.painters = [Painter(crop, size, display) for crop in crops]
        self.frames: list[np.ndarray | None] = [None] * len(indices)
        if size and len(set(self.lengths)) == 1:  # one block: many large arrays would be mapped anew for every video
            self.frames = [*np.empty((len(indices), self.lengths[0], 3, *size), np.uint8)]  # (clips, T, C, H, W)
        self.times = [np.full(length, np.nan) for length in self.lengths]
        self.missing = set(self.wanted)

    def clips(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Frames and times of each clip, once nothing is missing."""
        for frames, times in zip(self.frames, self.times, strict=True):
            assert frames is not None
            yield frames, times

    def take(self, number: int, frame: av.VideoFrame, time: float, stands_for: int | None = None) -> None:
        """Paint frame `number` wherever it is wanted, or where the frame it stands in for is."""
        number = number if stands_for is None else stands_for
        for clip, slot in self.wanted.get(number, ()):
            self.frames[clip] = self.painters[clip].paint(frame, self.frames[clip], self.lengths[clip], slot)
            self.times[clip][slot] = time
        self.missing.discard(number)


class Painter:
    """Crop, scale and convert the frames of one clip to planar RGB, in one swscale context for all of them."""

    def __init__(self, crop: Box | None, size: tuple[int, int] | None, display: Display):
        self.crop, self.size, self.display = crop, size, display
        self.reformatter, self.rare = VideoReformatter(), VideoReformatter()
        self.graph: Graph | None = None
        self.graph_key: tuple[object, ...] = ()

    def paint(self, frame: av.VideoFrame, out: np.ndarray | None, length: int, slot: int) -> np.ndarray:
        """Write a frame into `out[slot]`; without `out`, make the array of `length` frames first."""
        if not self.display.plain:  # rare: shards hold frames as they are shown
            frame = av.VideoFrame.from_ndarray(self.display.rgb(frame, self.rare), format="rgb24")
        left, top, width, height = self.crop or (0, 0, frame.width, frame.height)
        if self.crop and (left < 0 or top < 0 or left + width > frame.width or top + height > frame.height):
            raise ValueError(f"crop {self.crop} does not fit a frame of {frame.width}x{frame.height}")
        rows, columns = self.size or ((height, width) if out is None else out.shape[-2:])
        if out is None:
            out = np.empty((length, 3, rows, columns), np.uint8)
        y, x = 0, 0
        if (rows, columns) == (height, width):
            if left + width > frame.width - frame.width % 32:  # swscale leaves the tail of gbrp rows unwritten
                rgb = self.reformatter.reformat(frame, format="rgb24", interpolation=EXACT, threads=1).to_ndarray()
                out[slot] = rgb[top : top + rows, left : left + columns].transpose(2, 0, 1)
                return out
            planar, y, x = self.reformatter.reformat(frame, format="gbrp", interpolation=EXACT, threads=1), top, left
        elif self.crop is None:
            planar = self.reformatter.reformat(frame, columns, rows, "gbrp", threads=1)
        else:
            planar = self._through_graph(frame, self.crop, (rows, columns))
        for channel, plane in enumerate((planar.planes[2], planar.planes[0], planar.planes[1])):  # G, B, R in memory
            pixels = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
            out[slot, channel] = pixels[y : y + rows, x : x + columns]
        return out

    def _through_graph(self, frame: av.VideoFrame, crop: Box, size: tuple[int, int]) -> av.VideoFrame:
        """Crop and scale in one pass: FFmpeg's crop moves pointers, so only the box is converted."""
        left, top, width, height = crop
        if min(width, height) < 2:  # less than a chroma sample wide, which FFmpeg's crop makes nothing of
            rgb = self.reformatter.reformat(frame, format="rgb24", interpolation=EXACT, threads=1).to_ndarray()
            box = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(rgb[top : top + height, left : left + width], np.uint8), "rgb24"
            )
            return VideoReformatter().reformat(box, size[1], size[0], "gbrp", threads=1)
        key = (frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range))
        if self.graph is None or key != self.graph_key:
            graph = Graph()
            graph.threads = 1
            layout = f"video_size={key[0]}x{key[1]}:pix_fmt={key[2]}:colorspace={key[3]}:range={key[4]}"
            nodes = [
                graph.add("buffer", f"{layout}:time_base=1/1000"),
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
        return cast(av.VideoFrame, self.graph.vpull())
