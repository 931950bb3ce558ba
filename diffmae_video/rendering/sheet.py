"""Labelled pictures: panels side by side, contact sheets, and the uncertainty of several samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, PAPER, SOFT = (28, 32, 36), (252, 252, 253), (96, 100, 108)
MAX_WIDTH = 1920
"""Pixels of the widest comparison; panels shrink to fit."""
MIN_PANEL = 176
"""Smaller panels are enlarged in whole pixels, so that labels fit and patches are seen."""


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def label_strip(texts: Sequence[str], widths: Sequence[int], height: int = 30, gap: int = 0) -> np.ndarray:
    """A row of centred labels, each above a panel of its width: uint8 (height, sum of widths and gaps, 3)."""
    total = sum(widths) + gap * (len(widths) - 1)
    image = Image.new("RGB", (total, height), PAPER)
    draw = ImageDraw.Draw(image)
    left = 0
    for text, width in zip(texts, widths, strict=True):
        size = height // 2 + 1
        while size > 8 and draw.textlength(text, font=_font(size)) > width - 8:
            size -= 1
        draw.text((left + width / 2, height / 2), text, fill=INK, font=_font(size), anchor="mm")
        left += width + gap
    return np.asarray(image)


def panel_size(height: int, width: int, count: int) -> tuple[int, int]:
    """Height and width at which `count` panels of a video stand side by side; both even."""
    scale = min(1.0, MAX_WIDTH / (count * width), 1080 / height)
    if min(height, width) < MIN_PANEL // 2 or width < MIN_PANEL:
        scale = max(scale, -(-MIN_PANEL // width)) if height * -(-MIN_PANEL // width) <= 1080 else scale
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def fit(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale a picture uint8 (H, W, 3); enlarged ones keep their pixels as squares."""
    if rgb.shape[:2] == size:
        return rgb
    shrinks = size[0] < rgb.shape[0] or size[1] < rgb.shape[1]
    return cv2.resize(rgb, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST)


class Panels:
    """Pictures of one video side by side under labels; every frame has the same even size."""

    def __init__(self, labels: Sequence[str], height: int, width: int) -> None:
        self.panel = panel_size(height, width, len(labels))
        self.strip = label_strip(labels, [max(self.panel[1], MIN_PANEL)] * len(labels))
        self.cell = (self.panel[0], max(self.panel[1], MIN_PANEL))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the composed frame."""
        return self.strip.shape[0] + self.cell[0], self.strip.shape[1]

    def compose(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """One frame from pictures uint8 (H, W, 3)."""
        row = [_pad(fit(picture, self.panel), self.cell) for picture in pictures]
        return np.concatenate([self.strip, np.concatenate(row, axis=1)], axis=0)


def _pad(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if rgb.shape[:2] == size:
        return rgb
    out = np.full((*size, 3), PAPER, dtype=np.uint8)
    top, left = (size[0] - rgb.shape[0]) // 2, (size[1] - rgb.shape[1]) // 2
    out[top : top + rgb.shape[0], left : left + rgb.shape[1]] = rgb
    return out


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str], title: str = "", cell_width: int = 208
) -> np.ndarray:
    """A grid of pictures: a labelled row for each kind, a labelled column for each frame.

    Args:
        rows: label, also of several lines, and pictures uint8 (H, W, 3), all of one size.
        columns: labels such as `frame 12`.
        title: line above the grid.
        cell_width: pixels of one picture.
    """
    height, width = rows[0][1][0].shape[:2]
    scale = cell_width / width
    if scale > 1:
        scale = max(1, int(scale))  # whole pixels
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    gap, head, font = 6, 26, _font(16)
    step = max(size[1], 72) + gap  # room for a column's label
    left = max(int(font.getlength(line)) for label, _ in rows for line in label.split("\n")) + 24
    top = (36 if title else 0) + head
    title_font = _font(18)
    total = (
        top + len(rows) * (size[0] + gap) + gap,
        max(left + len(columns) * step + gap, int(title_font.getlength(title)) + 24),
    )
    sheet = Image.new("RGB", (total[1], total[0]), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((12, 20), title, fill=INK, font=title_font, anchor="lm")
    for j, label in enumerate(columns):
        draw.text((left + j * step + (step - gap) / 2, top - head / 2), label, fill=SOFT, font=_font(14), anchor="mm")
    for i, (label, pictures) in enumerate(rows):
        y = top + i * (size[0] + gap)
        draw.multiline_text((left - 12, y + size[0] / 2), label, fill=INK, font=font, anchor="rm", align="right")
        for j, picture in enumerate(pictures):
            x = left + j * step + (step - gap - size[1]) // 2
            sheet.paste(Image.fromarray(fit(picture, size)), (x, y))
    return np.asarray(sheet)


def captioned_grid(
    pictures: Sequence[np.ndarray | None], captions: Sequence[str], columns: int = 8, side: int = 128
) -> np.ndarray:
    """A grid of pictures of any size, each above its caption.

    Args:
        pictures: uint8 (H, W, 3), scaled to fit a square, upwards by a whole number; None where one could not be read.
        captions: of each.
        columns: pictures in a row, at most.
        side: pixels of a square.
    """
    cells = []
    for picture, caption in zip(pictures, captions, strict=True):
        if picture is None:
            square = label_strip(["unreadable"], [side], side)
        else:
            scale = side / max(picture.shape[:2])
            scale = scale if scale < 1 else int(scale)  # whole pixels
            height, width = (max(1, round(n * scale)) for n in picture.shape[:2])
            square = _pad(fit(picture, (height, width)), (side, side))
        cells.append(np.concatenate([square, label_strip([caption], [side], 18)]))
    columns = min(columns, len(cells))
    cells += [np.full_like(cells[0], PAPER)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


def clip_strips(clips: Sequence[Tensor], captions: Sequence[str], frames: int = 6) -> np.ndarray:
    """A contact sheet with a row for each clip uint8 (T, C, H, W): evenly spread frames beside a caption."""
    rows = []
    for clip, caption in zip(clips, captions, strict=True):
        chosen = np.linspace(0, len(clip) - 1, frames).round().astype(int).tolist()
        rows.append((caption, [np.ascontiguousarray(clip[n].permute(1, 2, 0).numpy()) for n in chosen]))
    return contact_sheet(rows, [""] * frames)


def spread(samples: Sequence[np.ndarray]) -> np.ndarray:
    """Standard deviation of K pictures uint8 (H, W, 3), root mean square over channels: float32 (H, W), 0 to 127.5."""
    stack = np.stack([sample.astype(np.float32) for sample in samples])
    return np.sqrt(stack.var(axis=0).mean(axis=-1))


def heat(values: np.ndarray, highest: float) -> np.ndarray:
    """A map float (H, W) in false colours, black at 0 and yellow at `highest`: uint8 (H, W, 3)."""
    scaled = np.clip(values / max(highest, 1e-6) * 255, 0, 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def colour_bar(width: int, highest: float, unit: str) -> np.ndarray:
    """A legend for `heat`: uint8 (48, width, 3)."""
    image = Image.new("RGB", (width, 48), PAPER)
    bar_width = min(320, width // 2)
    bar = heat(np.tile(np.linspace(0, highest, bar_width, dtype=np.float32), (14, 1)), highest)
    left = (width - bar_width) // 2
    image.paste(Image.fromarray(bar), (left, 17))
    draw = ImageDraw.Draw(image)
    draw.text((left - 8, 24), "0", fill=INK, font=_font(14), anchor="rm")
    draw.text((left + bar_width + 8, 24), f"{highest:.3g} {unit}", fill=INK, font=_font(14), anchor="lm")
    return np.asarray(image)
