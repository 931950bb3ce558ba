"""Masks written as text: one grammar for rendering, evaluation and training.

KIND[:RATIO]                      a masker by its name, `random:0.75`
frames:FIRST-LAST                 whole frames, both included
box:X,Y,WIDTH,HEIGHT[@START-END]  a rectangle in pixels or percent, of some frames (`30-60`, `1s-2.5s`)
FILE[@START-END]                  a picture, a folder of pictures, a video or an array, of some frames

To follow an object (`MaskRequest.follow`), the text after @ names the frame that was marked: `object.png@12`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from diffmae_video.registry import maskers

FORMS = (
    "random:R, tube:R, block:R, center:R, frames:R, frames:FIRST-LAST, future:R, box:X,Y,W,H[@START-END] or the path "
    "of a picture, a folder of pictures, a video or a .npy array, FILE[@START-END]"
)
"""What `render-inpaint --mask` takes."""
FOLLOWED_GROWTH = 4
"""Pixels by which a followed object grows where nothing else is asked: its edge is blurred."""
Corners = tuple[float, float, float, float]
"""Left, top, width and height of a rectangle, in pixels."""


@dataclass(frozen=True)
class MaskRequest:
    """What a user wants hidden: the union of `texts` and `track`, then inverted, then grown."""

    texts: tuple[str, ...] = ()
    """Masks as text, or paths; see FORMS."""
    track: str | None = None
    """A box with key frames, `FRAME:x,y,w,h;FRAME:x,y,w,h`; it moves linearly in between and is absent outside."""
    dilate: int | None = None
    """Pixels by which the hidden area grows on every side; see `growth` for what holds without it."""
    invert: bool = False
    """Hide what the masks show, and show what they hide."""
    follow: bool = False
    """Texts are an object marked in one frame or more, `object.png@12` or `box:X,Y,W,H@1.5s`, which is followed."""
    sam: str | None = None
    """Follow by these weights of SAM 2 (a folder or a name on a hub) instead of by flow and colours."""

    @property
    def generated(self) -> bool:
        """Whether a part of it is drawn by a masker or hides whole frames: it shows what a model does, and removes
        nothing."""
        return any(is_generated(text) for text in self.texts)

    @property
    def growth(self) -> int:
        """Pixels by which it grows: `dilate`, or else FOLLOWED_GROWTH for what is followed and 0 for all others."""
        if self.dilate is not None:
            return self.dilate
        return FOLLOWED_GROWTH if self.follow and not self.invert else 0

    def names(self) -> list[str]:
        """The masks as they were written."""
        return [*self.texts, *([f"track {self.track}"] if self.track else [])]

    def files(self) -> list[Path]:
        """The files and folders among the masks."""
        return [path for path in (file_of(text)[0] for text in self.texts) if path.exists()]

    def __str__(self) -> str:
        return ", ".join(self.names())


@dataclass(frozen=True)
class Extent:
    """What a mask must fit."""

    frames: int
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    fps: float | None = None
    """Frames a second; without it times in seconds are refused."""


@dataclass(frozen=True)
class Generated:
    """A mask that a masker draws."""

    kind: str
    ratio: float


@dataclass(frozen=True)
class Region:
    """A rectangle that is hidden from frame `first` to frame `last`, both included."""

    rows: slice
    columns: slice
    first: int
    last: int


def is_generated(text: str) -> bool:
    """Whether a mask in words is drawn by a masker or hides whole frames: no box, no file."""
    return text.partition(":")[0] in (*maskers.names(), "frames")


def read_mask_text(text: str, extent: Extent) -> Generated | Region | None:
    """What a text hides, checked against the extent; None where it does not begin with a kind of mask.

    Kinds are `frames`, `box` and the names of `registry.maskers`, each with its own default ratio.

    Raises:
        ValueError: what is wrong, and what to write.
    """
    kind, colon, value = text.partition(":")
    if kind == "box" and colon:
        place, at, when = value.partition("@")
        rows, columns = region_of(read_corners(place, extent))
        return Region(rows, columns, *(read_span(when, extent) if at else (0, extent.frames - 1)))
    if kind == "frames" and re.fullmatch(r"\d+-\d+", value):
        first, last = (int(number) for number in value.split("-"))
        if not first <= last < extent.frames:
            raise ValueError(f"the clip has frames 0 to {extent.frames - 1}; name frames among them")
        return Region(slice(0, extent.height), slice(0, extent.width), first, last)
    if kind not in maskers.names():
        return None
    default = maskers.fact(kind, "ratio", 0.75)
    try:
        ratio = float(value) if value else default
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < 1:
        raise ValueError(f"the ratio must lie between 0 and 1, for example {kind}:{default}")
    return Generated(kind, ratio)


def file_of(text: str) -> tuple[Path, str]:
    """Path and what stands behind its `@`: `mask.png@12-30` -> (mask.png, 12-30).

    A file that is named so goes first.
    """
    name, at, when = text.rpartition("@")
    if not at or not name or Path(text).exists():
        return Path(text), ""
    return Path(name), when


def read_span(text: str, extent: Extent) -> tuple[int, int]:
    """First and last frame of `START-END`, frame numbers or seconds; without an end the clip's last frame.

    Raises:
        ValueError: it is none, or does not lie in the clip.
    """
    first, dash, last = text.partition("-")
    start = read_frame(first, extent)
    end = read_frame(last, extent, end=True) if dash and last.strip() else extent.frames - 1
    if not 0 <= start <= end < extent.frames:
        seconds = f" ({extent.frames / extent.fps:.4g}s)" if extent.fps else ""
        raise ValueError(f"this span does not lie in the clip's frames 0 to {extent.frames - 1}{seconds}; make it fit")
    return start, end


def read_corners(text: str, extent: Extent) -> Corners:
    """`x,y,width,height` in pixels or percent of the frame.

    Raises:
        ValueError: it is none, or does not lie inside the frame.
    """
    try:
        left, top, width, height = (
            float(n[:-1]) / 100 * size if n.endswith("%") else float(n)
            for n, size in zip(text.replace(" ", "").split(","), (extent.width, extent.height) * 2, strict=True)
        )
    except ValueError:
        raise ValueError("write a box as x,y,width,height in pixels or percent of the frame") from None
    fits = left + width <= extent.width + 1e-6 and top + height <= extent.height + 1e-6
    if not (fits and left >= 0 and top >= 0 and width >= 1 and height >= 1):
        raise ValueError(f"this box does not lie inside the clip's {extent.width}x{extent.height} pixels; make it fit")
    return left, top, width, height


def region_of(corners: Corners) -> tuple[slice, slice]:
    """Rows and columns of a rectangle; halves round up, so that its size does not depend on its place."""
    left, top, width, height = corners
    rows, columns = ([math.floor(n + 0.5) for n in ends] for ends in ((top, top + height), (left, left + width)))
    return slice(*rows), slice(*columns)


def read_frame(text: str, extent: Extent, end: bool = False) -> int:
    """A frame by its number, or by its time in seconds (`1.5s`); an `end` in seconds is excluded.

    Raises:
        ValueError: it is neither.
    """
    try:
        if text.strip().endswith("s") and extent.fps is not None:
            frame = Fraction(text.strip()[:-1]) * Fraction(extent.fps).limit_denominator(1_000_000)
            return max(0, -(-frame.numerator // frame.denominator) - (1 if end else 0))
        return int(text)
    except (ValueError, ZeroDivisionError):
        seconds = " or seconds (1.5s)" if extent.fps is not None else ""
        raise ValueError(f"write times as frame numbers (30){seconds}") from None
