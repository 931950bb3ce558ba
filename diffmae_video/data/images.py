"""Open and decode single images from untrusted bytes: magic bytes name the reader, sizes are checked first."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffmae_video.data.media import DEFAULT_LIMITS, IMAGE_FORMATS, Limits, describe, read_bytes, sniff
from diffmae_video.errors import DataError, LimitError

if TYPE_CHECKING:  # sharding workers run without torch
    from PIL import Image
    from torch import Tensor


def open_image(source: bytes | str | Path, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Open an image with the reader that its first bytes name; pixels are not decoded yet.

    Raises:
        DataError: not an image of a known kind, or beyond the limits.
    """
    from PIL import Image

    name = "The image" if isinstance(source, (bytes, bytearray, memoryview)) else str(source)
    data = read_bytes(source, limits)
    kind = sniff(data[:1024])
    kind = "GIF" if kind == "gif" else kind.removeprefix("image:") if kind and kind.startswith("image:") else None
    if kind not in IMAGE_FORMATS:
        raise DataError(f"{name} is not a readable image: it is {describe(data[:1024])}; replace or remove it.")
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
    except Image.DecompressionBombError as error:
        raise LimitError(f"{name} has too many pixels; leave it out.") from error
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise DataError(f"{name} cannot be decoded ({_reason(error)}); replace or remove it.") from error
    limits.check_size(name, image.width, image.height)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image: upright, RGB with 8 bits (alpha dropped, palettes and grey expanded).

    16 bits are scaled to 8; float pixels are taken for 0..1.

    Raises:
        DataError: it is damaged, or its pixels have no known scale.
    """
    from PIL import Image, ImageOps

    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):
            values = np.asarray(upright)
            return Image.fromarray(_to_8_bits(values, upright.mode)).convert("RGB")
        return upright.convert("RGB")
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"The image cannot be decoded ({_reason(error)}); replace or remove it.") from error


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """uint8 from the pixels (H, W) of Pillow's modes I;16, I (32 bits) and F (float)."""
    low, high = float(values.min()), float(values.max())
    top = 1.0 if mode == "F" else 65535.0
    if not 0 <= low <= high <= top:  # also NaN
        told = f"its pixels go from {low:g} to {high:g}, of which black and white are not known"
        raise DataError(f"The image cannot be used: {told}; convert it to 8 or 16 bits.")
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)


def read_image(source: bytes | str | Path, limits: Limits = DEFAULT_LIMITS) -> Tensor:
    """Decode an image to uint8 (C, H, W); see `to_rgb`.

    Raises:
        DataError: not an image of a known kind, damaged, of no known scale, or beyond the limits.
    """
    import torch

    with open_image(source, limits) as image:
        return torch.from_numpy(np.asarray(to_rgb(image)).transpose(2, 0, 1).copy())  # (C, H, W)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.split("\n")[0]
