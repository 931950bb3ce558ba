"""Where the model looks: rectangles of the frame around what is hidden, and pixels in and out of its resolution."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from diffmae_video.rendering.masks import grid_edges

MAX_PARTS = 16
"""Separate holes that get a window each; more are filled in one look at the whole frame."""


@dataclass(frozen=True)
class Window:
    """A rectangle of the displayed frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: np.ndarray) -> np.ndarray:
        """The part of an image (H, W, ...) inside the window."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


def place_windows(hidden: np.ndarray, size: tuple[int, int], margin: float = 0.5, mode: str = "auto") -> list[Window]:
    """Choose windows that together cover every hidden pixel.

    Args:
        hidden: bool (H, W), the union of what is hidden in the frames of a window.
        size: height and width at which the model works.
        margin: context on each side, as a share of the hole's larger side.
        mode: `auto` puts a square around each hole where it fits into the frame, and looks at the whole frame
            otherwise; `whole` always does; `tiles` covers the frame with overlapping squares.

    Returns:
        Windows in the order in which they are filled; none where nothing is hidden.
    """
    height, width = hidden.shape
    if not hidden.any():
        return []
    whole = [Window(0, 0, height, width)]
    if mode == "whole":
        return whole
    if mode == "tiles":
        return [tile for tile in _tiles(height, width, min(max(size), min(height, width))) if tile.of(hidden).any()]
    aspect = size[1] / size[0]
    boxes = _components(hidden)
    while boxes is not None:
        around = [_around(box, (height, width), size, margin, aspect) for box in boxes]
        squares = [square for square in around if square is not None]
        if len(boxes) > MAX_PARTS or len(squares) < len(boxes):
            return whole
        merged = _merge_overlapping(boxes, squares)
        if len(merged) == len(boxes):
            return squares
        boxes = merged
    return whole


def _components(hidden: np.ndarray) -> list[tuple[int, int, int, int]] | None:
    """Boxes (top, left, bottom, right) of connected holes; None where there are too many to look at one by one."""
    count, _, statistics, _ = cv2.connectedComponentsWithStats(hidden.view(np.uint8), connectivity=8)
    if count - 1 > 64 * MAX_PARTS:
        return None
    return [(y, x, y + h, x + w) for x, y, w, h, _ in statistics[1:].tolist()]


def _around(
    box: tuple[int, int, int, int], frame: tuple[int, int], size: tuple[int, int], margin: float, aspect: float
) -> Window | None:
    """A window of the model's shape around a hole: not below the model's own size, where the frame allows that."""
    rows, columns = box[2] - box[0], box[3] - box[1]
    context = 2 * margin * max(rows, columns)
    height = max(rows + context, (columns + context) / aspect)
    largest = min(frame[0], frame[1] / aspect)
    if max(rows, columns / aspect) > largest:
        return None
    height = min(max(height, size[0]), largest)
    high, wide = round(height), min(round(height * aspect), frame[1])
    top = min(max(round((box[0] + box[2] - high) / 2), 0), frame[0] - high)
    left = min(max(round((box[1] + box[3] - wide) / 2), 0), frame[1] - wide)
    return Window(top, left, high, wide)


def _merge_overlapping(
    boxes: list[tuple[int, int, int, int]], windows: list[Window]
) -> list[tuple[int, int, int, int]]:
    """Unite the first hole whose window meets another's, so that no hole is context of another."""
    for i, one in enumerate(windows):
        for j in range(i + 1, len(windows)):
            other = windows[j]
            apart = (
                one.top + one.height <= other.top
                or other.top + other.height <= one.top
                or one.left + one.width <= other.left
                or other.left + other.width <= one.left
            )
            if not apart:
                a, b = boxes[i], boxes[j]
                union = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
                return [*(box for k, box in enumerate(boxes) if k not in (i, j)), union]
    return boxes


def _tiles(height: int, width: int, side: int) -> list[Window]:
    """Squares that cover the frame, at least a quarter of each shared with its neighbour."""

    def starts(length: int) -> list[int]:
        count = 1 + max(0, -(-(length - side) // max(1, side * 3 // 4)))
        return [round(k * (length - side) / max(1, count - 1)) for k in range(count)]

    return [Window(top, left, side, side) for top in starts(height) for left in starts(width)]


def shrink(rgb: np.ndarray, hidden: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bring a window's pixels to the model's resolution without letting hidden pixels show through.

    Each pixel of the result is the mean of the visible pixels it covers; hidden pixels are ignored. Where all are
    hidden it is black.

    Args:
        rgb: uint8 (H, W, 3).
        hidden: bool (H, W).
        size: height and width of the result.

    Returns:
        uint8 (h, w, 3).
    """
    if not hidden.any():
        return rgb.copy() if rgb.shape[:2] == size else _resize(rgb, size)
    weight = (~hidden).astype(np.float32)
    colours = rgb.astype(np.float32) * weight[..., None]
    if rgb.shape[:2] != size:
        colours, weight = _resize(colours, size), _resize(weight, size)
    mean = colours / np.maximum(weight, 1e-6)[..., None]
    return np.where(weight[..., None] > 1e-6, mean + 0.5, 0).clip(0, 255).astype(np.uint8)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    shrinks = size[0] < image.shape[0] or size[1] < image.shape[1]
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def enlarge(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bring the model's pixels uint8 (h, w, 3) to the window's resolution."""
    if rgb.shape[:2] == size:
        return rgb
    shrinks = size[0] < rgb.shape[0] and size[1] < rgb.shape[1]
    return cv2.resize(rgb, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def to_cells(hidden: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
    """Round a pixel mask bool (H, W) outwards to a grid: bool (rows, columns), True where any pixel is hidden."""
    rows, columns = grid_edges(hidden.shape[0], cells[0]), grid_edges(hidden.shape[1], cells[1])
    # more cells than pixels: an empty cell takes the pixel it lies on
    row_starts = np.minimum(rows[:-1], hidden.shape[0] - 1)
    column_starts = np.minimum(columns[:-1], hidden.shape[1] - 1)
    touched = np.logical_or.reduceat(hidden, row_starts, axis=0)
    return np.logical_or.reduceat(touched, column_starts, axis=1)
