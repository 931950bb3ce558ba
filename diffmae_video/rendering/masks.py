"""What is hidden in each frame of a video: a function of the frame's number, in pixels of the displayed frame.

A mask is written as text (`random:0.75`, `box:10%,10%,30%,40%@1s-3s`), drawn by the user (a picture, a folder of
pictures, a mask video; white is hidden), computed (a NumPy array in a .npy file), or a box that moves between key
frames. Several are united.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch

from diffmae_video.data.decode import VideoReader
from diffmae_video.data.images import read_image
from diffmae_video.errors import DataError, UsageError
from diffmae_video.masking import DEFAULT_RATIOS, MASK_KINDS, make_mask

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMS = (
    "random:R, tube:R, block:R, center:R, frames:R, frames:FIRST-LAST, future:R, box:X,Y,W,H[@START-END] or the path "
    "of a picture, a folder of pictures, a video or a .npy array"
)


@dataclass(frozen=True)
class Canvas:
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


FrameMask = Callable[[int], np.ndarray]
"""Frame number -> bool (H, W), True = hidden. Called with rising numbers; the array is not written to."""


def build_mask(
    texts: Sequence[str], canvas: Canvas, *, track: str | None = None, dilate: int = 0, invert: bool = False
) -> FrameMask:
    """Unite masks given as text or paths, then invert, then dilate.

    Args:
        texts: masks; see FORMS.
        canvas: what they must fit.
        track: a box with key frames, `FRAME:x,y,w,h;FRAME:x,y,w,h`; moves linearly in between, absent outside.
        dilate: pixels by which the hidden area grows on every side.
        invert: hide what the masks show, and show what they hide.

    Raises:
        UsageError: a text that is no mask, or does not fit the clip.
        DataError: a file that is no picture and no video.
    """
    parts = [_parse(text, canvas) for text in texts]
    if track:
        parts.append(_track(track, canvas))
    if not parts:
        raise UsageError(f"No mask was given; write --mask {FORMS}.")
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * dilate + 1, 2 * dilate + 1)) if dilate else None

    def mask(number: int) -> np.ndarray:
        hidden = parts[0](number)
        for part in parts[1:]:
            hidden = hidden | part(number)
        if invert:
            hidden = ~hidden
        if kernel is not None:
            hidden = cv2.dilate(np.ascontiguousarray(hidden).view(np.uint8), kernel).view(bool)
        return hidden

    return mask


def grid_edges(length: int, cells: int) -> np.ndarray:
    """Where the cells of a token axis begin and end on a stretch of `length` pixels: int64 (cells + 1,)."""
    return np.floor(np.arange(cells + 1) * (length / cells) + 0.5).astype(np.int64)


def cells_to_pixels(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge bool (H/p, W/p) to bool (H, W) of any size; the edges are those of `grid_edges`."""
    rows = np.repeat(np.arange(cells.shape[0]), np.diff(grid_edges(height, cells.shape[0])))
    columns = np.repeat(np.arange(cells.shape[1]), np.diff(grid_edges(width, cells.shape[1])))
    return cells[rows][:, columns]


def _parse(text: str, canvas: Canvas) -> FrameMask:
    kind, colon, value = text.partition(":")
    if kind == "box" and colon:
        return _box(text, value, canvas)
    if kind == "frames" and re.fullmatch(r"\d+-\d+", value):
        return _frame_range(text, value, canvas)
    if kind in MASK_KINDS:
        return _generated(text, kind, value, canvas)
    if Path(text).exists():
        return _drawn(Path(text), canvas)
    if all(part.partition(":")[0] in MASK_KINDS for part in text.split(",")):
        raise UsageError(f"--mask {text}: give each mask its own --mask; their union counts.")
    if "/" in text or re.search(r"\.[a-z]\w*$", text.lower()):  # box:... and ratios end in digits
        raise UsageError(f"--mask {text}: there is no such file; check the path.")
    raise UsageError(f"--mask {text}: this is no mask and no file; write {FORMS}.")


def _generated(text: str, kind: str, value: str, canvas: Canvas) -> FrameMask:
    try:
        ratio = float(value) if value else DEFAULT_RATIOS[kind]
        if not 0 < ratio < 1:
            raise ValueError
    except ValueError:
        example = f"{kind}:{DEFAULT_RATIOS[kind]}"
        raise UsageError(f"--mask {text}: the ratio must lie between 0 and 1, for example {example}.") from None
    if kind == "future":  # of the whole clip, not of each window
        if canvas.frames < 2:
            raise UsageError(f"--mask {text}: a clip of one frame has no future; choose another mask.")
        return _span(max(1, round(canvas.frames * (1 - ratio))), canvas.frames - 1, canvas)
    length = max(1, canvas.span // canvas.grid[0])  # source frames of one cell
    drawn: dict[int, np.ndarray] = {}

    def mask(number: int) -> np.ndarray:
        segment = number // canvas.span
        if segment not in drawn:
            drawn.clear()
            seed = canvas.seed if kind == "tube" else canvas.seed + segment
            try:
                grid = make_mask(kind, ratio, canvas.grid, [seed]).grid[0]
            except ValueError as error:
                raise UsageError(f"--mask {text}: {error}; choose another mask for this model.") from error
            drawn[segment] = grid.view(canvas.grid).numpy()
        cell = min(number % canvas.span // length, canvas.grid[0] - 1)
        return cells_to_pixels(drawn[segment][cell], canvas.height, canvas.width)

    mask(0)  # refuse now what would fail later
    return mask


def _frame_range(text: str, value: str, canvas: Canvas) -> FrameMask:
    start, end = (int(number) for number in value.split("-"))
    if not start <= end < canvas.frames:
        raise UsageError(f"--mask {text}: the clip has frames 0 to {canvas.frames - 1}; name frames among them.")
    return _span(start, end, canvas)


def _span(first: int, last: int, canvas: Canvas) -> FrameMask:
    whole, none = (np.full((canvas.height, canvas.width), hidden) for hidden in (True, False))
    return lambda number: whole if first <= number <= last else none


def _box(text: str, value: str, canvas: Canvas) -> FrameMask:
    place, at, when = value.partition("@")
    corners = _corners(f"--mask {text}", place, canvas)
    start, end = _when(f"--mask {text}", when, canvas) if at else (0, canvas.frames - 1)
    hidden, none = _rectangle(corners, canvas), np.zeros((canvas.height, canvas.width), dtype=bool)
    return lambda number: hidden if start <= number <= end else none


def _rectangle(corners: Sequence[float], canvas: Canvas) -> np.ndarray:
    left, top, width, height = corners
    rows, columns = ([math.floor(n + 0.5) for n in ends] for ends in ((top, top + height), (left, left + width)))
    hidden = np.zeros((canvas.height, canvas.width), dtype=bool)
    hidden[slice(*rows), slice(*columns)] = True
    return hidden


def _corners(option: str, text: str, canvas: Canvas) -> tuple[float, float, float, float]:
    """`x,y,w,h` in pixels or percent of the frame, checked to lie inside it."""
    try:
        left, top, width, height = (
            float(n[:-1]) / 100 * size if n.endswith("%") else float(n)
            for n, size in zip(text.replace(" ", "").split(","), (canvas.width, canvas.height) * 2, strict=True)
        )
    except ValueError:
        raise UsageError(f"{option}: write a box as x,y,width,height in pixels or percent of the frame.") from None
    fits = left + width <= canvas.width + 1e-6 and top + height <= canvas.height + 1e-6
    if not (fits and left >= 0 and top >= 0 and width >= 1 and height >= 1):
        raise UsageError(
            f"{option}: this box does not lie inside the clip's {canvas.width}x{canvas.height} pixels; make it fit."
        )
    return left, top, width, height


def _frame_number(option: str, text: str, canvas: Canvas, end: bool = False) -> int:
    """A frame number, or seconds with an `s`; the end of a span in seconds is excluded."""
    try:
        if text.strip().endswith("s"):
            frame = Fraction(text.strip()[:-1]) * Fraction(canvas.fps).limit_denominator(1_000_000)
            return max(0, -(-frame.numerator // frame.denominator) - (1 if end else 0))
        return int(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{option}: write times as frame numbers (30) or seconds (1.5s).") from None


def _when(option: str, text: str, canvas: Canvas) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    start = _frame_number(option, first, canvas)
    end = _frame_number(option, last, canvas, end=True) if dash and last.strip() else canvas.frames - 1
    if not 0 <= start <= end < canvas.frames:
        raise UsageError(
            f"{option}: this span does not lie in the clip's frames 0 to {canvas.frames - 1} "
            f"({canvas.frames / canvas.fps:.4g}s); make it fit."
        )
    return start, end


def _track(text: str, canvas: Canvas) -> FrameMask:
    keys: list[tuple[int, tuple[float, float, float, float]]] = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        when, colon, place = part.partition(":")
        if not colon:
            raise UsageError(f"--track {text}: write key frames as FRAME:x,y,w,h;FRAME:x,y,w,h.")
        keys.append((_frame_number(f"--track {part}", when, canvas), _corners(f"--track {part}", place, canvas)))
    keys.sort()
    numbers = [key[0] for key in keys]
    if len(keys) < 2 or len(set(numbers)) < len(numbers):
        raise UsageError(f"--track {text}: give at least two key frames, each of another frame.")
    if numbers[0] < 0 or numbers[-1] >= canvas.frames:
        raise UsageError(f"--track {text}: the clip has frames 0 to {canvas.frames - 1}; put all key frames there.")
    boxes = np.array([key[1] for key in keys])
    none = np.zeros((canvas.height, canvas.width), dtype=bool)

    def mask(number: int) -> np.ndarray:
        if not numbers[0] <= number <= numbers[-1]:
            return none
        return _rectangle([float(np.interp(number, numbers, boxes[:, axis])) for axis in range(4)], canvas)

    return mask


def _drawn(path: Path, canvas: Canvas) -> FrameMask:
    """A picture for all frames, a folder with one for each, or a video (white, above half, is hidden), or an array."""
    if path.is_dir():
        files = list_images(path)
        if len(files) != canvas.frames:
            raise UsageError(
                f"--mask {path}: {len(files)} pictures for a clip of {canvas.frames} frames; give one for each frame."
            )
        _check(path, _hidden(files[0]), canvas)
        return lambda number: _check(files[number], _hidden(files[number]), canvas)
    if path.suffix.lower() == ".npy":
        return _array(path, canvas)
    try:
        hidden = _hidden(path)
    except DataError as error:
        try:
            return _MaskVideo(path, canvas)
        except DataError:
            raise error from None
    _check(path, hidden, canvas)
    return lambda number: hidden


def _array(path: Path, canvas: Canvas) -> FrameMask:
    """A .npy file: bool (T, H, W) for each frame or (H, W) for all, True = hidden; it stays on disk."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"--mask {path} is no NumPy array ({error}); write it with numpy.save.") from error
    try:
        return masks_of_tensor(array, canvas.frames, (canvas.height, canvas.width))
    except ValueError as error:
        raise UsageError(f"--mask {path}: {error}; convert it.") from error


def _hidden(path: Path) -> np.ndarray:
    return read_image(path).float().mean(0).gt(127.5).numpy()


def _check(path: Path, hidden: np.ndarray, canvas: Canvas) -> np.ndarray:
    if hidden.shape != (canvas.height, canvas.width):
        size = f"{hidden.shape[1]}x{hidden.shape[0]}"
        raise UsageError(f"--mask {path}: {size} pixels for a clip of {canvas.width}x{canvas.height}; make them equal.")
    return hidden


class _MaskVideo:
    """A mask video read forwards, frame by frame; going back opens it again."""

    def __init__(self, path: Path, canvas: Canvas) -> None:
        self.path, self.canvas = path, canvas
        self._rewind()
        count = self.reader.info.frames
        if count != canvas.frames:
            self.reader.close()
            raise UsageError(
                f"--mask {path}: {count} frames for a clip of {canvas.frames}; give a mask for each frame."
            )

    def _rewind(self) -> None:
        self.reader = VideoReader(self.path, square=False)  # the grid of the clip, which is not stretched either
        self.frames, self.number, self.hidden = iter(self.reader), -1, np.zeros(0, dtype=bool)

    def __call__(self, number: int) -> np.ndarray:
        if number < self.number:
            self.reader.close()
            self._rewind()
        while self.number < number:
            frame = next(self.frames, None)
            if frame is None:
                raise UsageError(
                    f"--mask {self.path}: it ends after {self.number + 1} frames and the clip goes on; "
                    "give a mask for each frame."
                )
            self.hidden = _check(self.path, frame[0].mean(2) > 127.5, self.canvas)
            self.number += 1
        return self.hidden


def list_images(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names, numbers by value (2 before 10)."""

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", path.name)]

    return sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()), key=order)


def masks_of_tensor(mask: torch.Tensor | np.ndarray, frames: int, size: tuple[int, int]) -> FrameMask:
    """A mask handed over as a tensor or a NumPy array: bool (T, H, W) or (H, W), True = hidden.

    Raises:
        ValueError: the mask has another type or shape than the video.
    """
    hidden = mask.cpu().numpy() if isinstance(mask, torch.Tensor) else mask
    if hidden.dtype != bool or hidden.shape not in ((frames, *size), tuple(size)):
        wanted = f"bool {(frames, *size)} or {tuple(size)}"
        raise ValueError(f"a mask for this video is {wanted}, not {hidden.dtype} {(*hidden.shape,)}")
    return lambda number: np.asarray(hidden[number] if hidden.ndim == 3 else hidden)
