"""Masks that users drew or computed: pictures, folders of pictures, videos, NumPy arrays.

Tools write masks in many ways. What hides is read from what the file holds (`MaskReading.note` says which rule it was):

    alpha that varies        alpha above THRESHOLD hides, whatever the colour under it
    palette                  every index but 0 (DAVIS, SAM tools); every colour but black where that is not index 0
    flat values              every pixel that is not black: 0/1 masks, label maps, objects in colours
    soft edges, JPEG, video  pixels whose brightest channel is above THRESHOLD
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from diffmae_video.data.images import open_image
from diffmae_video.data.media import read_head
from diffmae_video.errors import DataError, UsageError
from diffmae_video.files import UNREADABLE_ARRAY
from diffmae_video.mask_text import Extent
from diffmae_video.rendering.source import VideoSource, list_images

FrameMask = Callable[[int], np.ndarray]
"""Frame number -> bool (H, W), True = hidden. Called with rising numbers; the array is not written to."""
THRESHOLD = 63
"""Of 255: what compression and soft edges leave of black stays below it, dark object colours are above."""
LOSSY_PICTURES = ("JPEG", "WEBP")
LOSSLESS_VIDEOS = ("ffv1", "png", "apng", "gif", "huffyuv", "ffvhuff", "utvideo", "qtrle", "rawvideo", "bmp", "tiff")
SAME_LENGTH = 0.02
"""Largest relative difference of the duration at which a mask video of another frame rate is matched by time."""
SAME_SHAPE = 0.02
"""Largest relative difference of width / height at which a mask of another size is scaled."""


@dataclass(frozen=True)
class MaskReading:
    """One picture of a mask."""

    hidden: np.ndarray
    """bool (H, W)."""
    note: str
    """Which pixels hide, in words."""


def read_mask_file(path: Path, shape: Extent, notes: list[str]) -> FrameMask:
    """A picture for all frames, a folder with one for each, a video, or a .npy array.

    Args:
        notes: gets a sentence on how the file was read.

    Raises:
        UsageError: it does not fit the clip.
        DataError: it is no picture, video or array.
    """
    if path.is_dir():
        files = list_images(path)
        if len(files) != shape.frames:
            raise UsageError(
                f"--mask {path}: {len(files)} pictures for a clip of {shape.frames} frames; give one for each frame."
            )
        _fitted(path, read_mask_picture(files[0]), shape, notes)
        return lambda number: _fitted(files[number], read_mask_picture(files[number]), shape)
    read_head(path)  # a pipe or device is refused
    if path.suffix.lower() == ".npy":
        return _read_array(path, shape)
    try:
        reading = read_mask_picture(path)
    except DataError as error:
        try:
            return _MaskVideo(path, shape, notes)
        except DataError:
            raise error from None
    hidden = _fitted(path, reading, shape, notes)
    return lambda number: hidden


def read_object(path: Path, shape: Extent, notes: list[str]) -> np.ndarray:
    """An object marked in one picture, at the clip's size: bool (H, W).

    Args:
        notes: gets a sentence on how the picture was read.

    Raises:
        UsageError: it does not fit the clip.
        DataError: it is no picture.
    """
    return _fitted(path, read_mask_picture(path), shape, notes)


def read_mask_picture(path: Path) -> MaskReading:
    """What one picture hides, upright.

    Raises:
        DataError: it is no picture that can be read.
    """
    with open_image(path) as opened:
        kind = opened.format
        try:
            image = ImageOps.exif_transpose(opened)
            return _read_alpha(image) or _read_palette(image) or _read_values(image, lossy=kind in LOSSY_PICTURES)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path} cannot be decoded ({error}); replace it.") from error


def _read_alpha(image: Image.Image) -> MaskReading | None:
    if not image.has_transparency_data:
        return None
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    if alpha.min() == alpha.max():  # opaque, or empty: the colours tell
        return None
    return MaskReading(alpha > THRESHOLD, f"alpha above {THRESHOLD} of 255 hides")


def _read_palette(image: Image.Image) -> MaskReading | None:
    if image.mode != "P":
        return None
    index = np.asarray(image)
    colours = np.asarray(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    black = [number for number in np.unique(index).tolist() if number < len(colours) and not colours[number].any()]
    if black and colours[0].any():  # a picture that was brought to few colours in any order
        return MaskReading(~np.isin(index, black), "a palette, every colour but black hides")
    return MaskReading(index > 0, "a palette, every index but 0 hides")


def _read_values(image: Image.Image, lossy: bool) -> MaskReading:
    if image.mode not in ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"):
        image = image.convert("RGB")
    values = np.asarray(image).astype(np.float32)
    values = values if values.ndim == 2 else values.max(-1)  # the brightest channel: red hides as white does
    highest = 65535.0 if image.mode.startswith("I;16") else 255.0
    if image.mode in ("I", "F", "1"):
        highest = max(float(values.max()), 1.0)
    if lossy or is_soft(values):
        why = "compressed with loss" if lossy else "soft edges"
        return MaskReading(values > highest * THRESHOLD / 255, f"{why}, above {THRESHOLD} of 255 hides")
    return MaskReading(values > 0, f"every pixel that is not black hides (brightest value {values.max():.4g})")


def is_soft(values: np.ndarray) -> bool:
    """Whether values float (H, W) between black and the brightest lie on slopes, and not on flat areas as labels do."""
    between = (values > 0) & (values < values.max())
    if not between.any():
        return False
    down, right = np.diff(values, axis=0) == 0, np.diff(values, axis=1) == 0
    beside = np.zeros((2, *values.shape), dtype=bool)
    beside[0, 1:] |= down
    beside[0, :-1] |= down
    beside[1, :, 1:] |= right
    beside[1, :, :-1] |= right
    return bool(np.asarray(beside.all(axis=0))[between].mean() < 0.5)


def _fitted(path: Path, reading: MaskReading, shape: Extent, notes: list[str] | None = None) -> np.ndarray:
    """The reading at the clip's size; `notes` gets what was done."""
    hidden, scaled = reading.hidden, ""
    if hidden.shape != (shape.height, shape.width):
        size = f"{hidden.shape[1]}x{hidden.shape[0]} pixels"
        clip = f"a clip of {shape.width}x{shape.height}"
        if abs(hidden.shape[1] * shape.height / (hidden.shape[0] * shape.width) - 1) > SAME_SHAPE:
            raise UsageError(f"--mask {path}: {size} for {clip}; make them equal.")
        picture = np.ascontiguousarray(hidden).view(np.uint8)
        hidden = cv2.resize(picture, (shape.width, shape.height), interpolation=cv2.INTER_NEAREST).view(bool)
        scaled = f" Warning: {size} are scaled for {clip}."
    if notes is not None:
        notes.append(f"Mask {path}: {reading.note}.{scaled}")
    return hidden


def _read_array(path: Path, shape: Extent) -> FrameMask:
    """A .npy file: bool (T, H, W) for each frame or (H, W) for all, True = hidden; it stays on disk."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE_ARRAY as error:
        raise DataError(f"--mask {path} is no NumPy array ({error}); write it with numpy.save.") from error
    try:
        return mask_of_array(array, shape.frames, (shape.height, shape.width))
    except ValueError as error:
        raise UsageError(f"--mask {path}: {error}; convert it.") from error


def mask_of_array(mask: torch.Tensor | np.ndarray, frames: int, size: tuple[int, int]) -> FrameMask:
    """A mask handed over as a tensor or a NumPy array: bool (T, H, W) or (H, W), True = hidden.

    Raises:
        ValueError: the mask has another type or shape than the video.
    """
    hidden = mask.cpu().numpy() if isinstance(mask, torch.Tensor) else mask
    if hidden.dtype != bool or hidden.shape not in ((frames, *size), tuple(size)):
        wanted = f"bool {(frames, *size)} or {tuple(size)}"
        raise ValueError(f"a mask for this video is {wanted}, not {hidden.dtype} {(*hidden.shape,)}")
    return lambda number: np.asarray(hidden[number] if hidden.ndim == 3 else hidden)


class _MaskVideo:
    """A mask video read forwards, frame by frame; going back opens it again.

    One of as many frames as the clip goes by their numbers; one of another rate that lasts as long goes by time.
    """

    def __init__(self, path: Path, shape: Extent, notes: list[str]) -> None:
        self.path, self.shape = path, shape
        self.notes: list[str] | None = notes
        self._rewind()
        count, video = self.reader.frames, self.reader.video
        self.times: list[float] | None = None  # seconds at which each of its frames comes, where it goes by time
        if count != shape.frames:
            self._match_times()
        self.threshold, self.note = THRESHOLD, f"a compressed video, above {THRESHOLD} of 255 hides"
        if video is not None and video.info.codec in LOSSLESS_VIDEOS:
            self.threshold, self.note = 0, "every pixel that is not black hides"

    def _rewind(self) -> None:
        self.reader = VideoSource(self.path)
        self.frames, self.number, self.hidden = iter(self.reader), -1, np.zeros(0, dtype=bool)

    def _match_times(self) -> None:
        count, own, clip = self.reader.frames, float(self.reader.fps), self.shape
        lasts, wanted = count / own, clip.frames / clip.fps if clip.fps else math.inf
        same_rate = clip.fps is not None and abs(own / clip.fps - 1) < 1e-3
        if count < 2 or same_rate or abs(lasts - wanted) > max(1 / own + 1 / (clip.fps or 1), SAME_LENGTH * wanted):
            self.reader.close()
            raise UsageError(
                f"--mask {self.path}: {count} frames for a clip of {clip.frames}; give a mask for each frame, or a "
                "video that lasts as long as the clip."
            )
        self.times = [float(frame.pts * self.reader.time_base) for frame in self.reader]
        self.reader.close()
        self._rewind()
        if self.notes is not None:
            self.notes.append(
                f"Mask {self.path}: {count} frames at {own:.4g} a second are matched by time to {clip.frames} at "
                f"{clip.fps:.4g}."
            )

    def __call__(self, number: int) -> np.ndarray:
        if self.times is not None:  # the one shown when this frame of the clip is
            assert self.shape.fps is not None
            number = max(0, bisect.bisect_right(self.times, number / self.shape.fps + 1e-4) - 1)
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
            reading = MaskReading(frame.rgb.max(2) > self.threshold, self.note)
            self.hidden = _fitted(self.path, reading, self.shape, self.notes)
            self.number, self.notes = self.number + 1, None
        return self.hidden
