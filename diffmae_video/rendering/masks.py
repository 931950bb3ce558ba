"""What is hidden in each frame of a video: a function of the frame's number, in pixels of the displayed frame.

A mask is written as text (`random:0.75`, `box:10%,10%,30%,40%@1s-3s`, see mask_text), drawn by the user (see drawn),
or a box that moves between key frames. Several are united.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from diffmae_video.errors import UsageError
from diffmae_video.mask_text import (
    FORMS,
    Corners,
    Extent,
    Generated,
    MaskRequest,
    Region,
    file_of,
    read_corners,
    read_frame,
    read_mask_text,
    read_span,
    region_of,
)
from diffmae_video.masking import make_mask
from diffmae_video.registry import maskers
from diffmae_video.rendering.drawn import FrameMask, read_mask_file
from diffmae_video.rendering.motion import ellipse


@dataclass(frozen=True)
class ClipShape:
    """What a mask must fit: the displayed frame, the clip's length, and the model's token grid."""

    height: int
    """Pixels of the displayed frame."""
    width: int
    """Pixels of the displayed frame."""
    frames: int
    """Frames of the clip."""
    fps: float
    """Frames a second, for times in seconds."""
    grid: tuple[int, int, int]
    """Token grid (T/t, H/p, W/p) of the model, laid over the whole frame."""
    span: int
    """Source frames that one window of the model covers: its frames times the stride."""
    seed: int = 0
    """Seed of generated masks."""

    @property
    def extent(self) -> Extent:
        """What mask texts are read for."""
        return Extent(self.frames, self.height, self.width, self.fps)


class ClipMask:
    """A mask over all frames of a clip.

    Attributes:
        notes: sentences on how files were read, for the user.

    Args:
        followed: what is hidden instead of the request's texts, which mark an object in single frames.
    """

    def __init__(self, request: MaskRequest, shape: ClipShape, followed: FrameMask | None = None) -> None:
        self.request, self.notes = request, list[str]()
        self.parts = [followed] if followed else [_read(text, shape, self.notes) for text in request.texts]
        if request.track:
            self.parts.append(_read_track(request.track, shape))
        if not self.parts:
            raise UsageError(f"No mask was given; write --mask {FORMS}.")
        self.kernel = ellipse(request.growth) if request.growth else None

    def __call__(self, number: int) -> np.ndarray:
        """What is hidden in a frame: bool (H, W)."""
        hidden = self.parts[0](number)
        for part in self.parts[1:]:
            hidden = hidden | part(number)
        if self.request.invert:
            hidden = ~hidden
        if self.kernel is not None:
            hidden = cv2.dilate(np.ascontiguousarray(hidden).view(np.uint8), self.kernel).view(bool)
        return hidden


def build_mask(request: MaskRequest | Sequence[str], shape: ClipShape) -> ClipMask:
    """The mask that was asked for.

    Args:
        request: what to hide; texts alone hide their union.
        shape: what it must fit.

    Raises:
        UsageError: a text that is no mask, or does not fit the clip.
        DataError: a file that is no picture, video or array.
    """
    return ClipMask(request if isinstance(request, MaskRequest) else MaskRequest(tuple(request)), shape)


def grid_edges(length: int, cells: int) -> np.ndarray:
    """Where the cells of a token axis begin and end on a stretch of `length` pixels: int64 (cells + 1,)."""
    return np.floor(np.arange(cells + 1) * (length / cells) + 0.5).astype(np.int64)


def cells_to_pixels(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge bool (H/p, W/p) to bool (H, W) of any size; the edges are those of `grid_edges`."""
    rows = np.repeat(np.arange(cells.shape[0]), np.diff(grid_edges(height, cells.shape[0])))
    columns = np.repeat(np.arange(cells.shape[1]), np.diff(grid_edges(width, cells.shape[1])))
    return cells[rows][:, columns]


def _read(text: str, shape: ClipShape, notes: list[str]) -> FrameMask:
    try:
        found = read_mask_text(text, shape.extent)
        if isinstance(found, Region):
            return _region(found, shape)
        if isinstance(found, Generated):
            return _generated(found, shape)
    except ValueError as error:
        raise UsageError(f"--mask {text}: {error}.") from error
    path, when = file_of(text)
    if path.exists():
        try:
            first, last = read_span(when, shape.extent) if when else (0, shape.frames - 1)
        except ValueError as error:
            raise UsageError(f"--mask {text}: {error}.") from error
        drawn, none = read_mask_file(path, shape.extent, notes), np.zeros((shape.height, shape.width), dtype=bool)
        return lambda number: drawn(number) if first <= number <= last else none
    if all(part.partition(":")[0] in maskers.names() for part in text.split(",")):
        raise UsageError(f"--mask {text}: give each mask its own --mask; their union counts.")
    if "/" in text or re.search(r"\.[a-z]\w*$", path.name.lower()):  # box:... and ratios end in digits
        raise UsageError(f"--mask {text}: there is no such file; check the path.")
    raise UsageError(f"--mask {text}: this is no mask and no file; write {FORMS}.")


def _region(region: Region, shape: ClipShape) -> FrameMask:
    none = np.zeros((shape.height, shape.width), dtype=bool)
    hidden = none.copy()
    hidden[region.rows, region.columns] = True
    return lambda number: hidden if region.first <= number <= region.last else none


def _generated(asked: Generated, shape: ClipShape) -> FrameMask:
    if asked.kind == "future":  # of the whole clip, not of each window
        if shape.frames < 2:
            raise ValueError("a clip of one frame has no future; choose another mask")
        first = max(1, round(shape.frames * (1 - asked.ratio)))
        return _region(Region(slice(0, shape.height), slice(0, shape.width), first, shape.frames - 1), shape)
    length = max(1, shape.span // shape.grid[0])  # source frames of one cell
    drawn: dict[int, np.ndarray] = {}

    def mask(number: int) -> np.ndarray:
        segment = number // shape.span
        if segment not in drawn:
            drawn.clear()
            seed = shape.seed if asked.kind == "tube" else shape.seed + segment
            grid = make_mask(asked.kind, asked.ratio, shape.grid, [seed]).grid[0]
            drawn[segment] = grid.view(shape.grid).numpy()
        cell = min(number % shape.span // length, shape.grid[0] - 1)
        return cells_to_pixels(drawn[segment][cell], shape.height, shape.width)

    try:
        mask(0)  # refuse now what would fail later
    except ValueError as error:
        raise ValueError(f"{error}; choose another mask for this model") from error
    return mask


def _read_track(text: str, shape: ClipShape) -> FrameMask:
    keys: list[tuple[int, Corners]] = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        when, colon, place = part.partition(":")
        if not colon:
            raise UsageError(f"--track {text}: write key frames as FRAME:x,y,w,h;FRAME:x,y,w,h.")
        try:
            keys.append((read_frame(when, shape.extent), read_corners(place, shape.extent)))
        except ValueError as error:
            raise UsageError(f"--track {part}: {error}.") from error
    keys.sort()
    numbers = [key[0] for key in keys]
    if len(keys) < 2 or len(set(numbers)) < len(numbers):
        raise UsageError(f"--track {text}: give at least two key frames, each of another frame.")
    if numbers[0] < 0 or numbers[-1] >= shape.frames:
        raise UsageError(f"--track {text}: the clip has frames 0 to {shape.frames - 1}; put all key frames there.")
    boxes = np.array([key[1] for key in keys])

    def mask(number: int) -> np.ndarray:
        hidden = np.zeros((shape.height, shape.width), dtype=bool)
        if numbers[0] <= number <= numbers[-1]:
            left, top, width, height = (float(np.interp(number, numbers, boxes[:, axis])) for axis in range(4))
            hidden[region_of((left, top, width, height))] = True
        return hidden

    return mask
