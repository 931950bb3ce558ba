"""Open and decode single images from untrusted bytes: magic bytes name the reader, sizes are checked first."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffmae_video.data.media import DEFAULT_LIMITS, IMAGE_FORMATS, Limits, describe, read_bytes, sniff
from diffmae_video.errors import DataError

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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be decoded ({_reason(error)}); replace or remove it.") from error
    if image.width * image.height > limits.pixels:
        size = f"{image.width}x{image.height}"
        raise DataError(f"{name} has {size} pixels, beyond the limit of {limits.pixels}; leave it out.")
    return image


def read_image(source: bytes | str | Path, limits: Limits = DEFAULT_LIMITS) -> Tensor:
    """Decode an image to uint8 (C, H, W), upright, RGB (alpha dropped, palettes and grey expanded).

    Raises:
        DataError: not an image of a known kind, damaged, or beyond the limits.
    """
    import torch
    from PIL import ImageOps

    with open_image(source, limits) as image:
        try:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"The image cannot be decoded ({_reason(error)}); replace or remove it.") from error
        return torch.from_numpy(np.asarray(upright).transpose(2, 0, 1).copy())  # (C, H, W)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.split("\n")[0]
