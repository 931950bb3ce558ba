"""Encoder sizes by name."""

from __future__ import annotations

from typing import NamedTuple

from diffmae_video.config import ModelSettings


class Size(NamedTuple):
    """Width D, blocks and attention heads of a plain ViT."""

    width: int
    depth: int
    heads: int


PRESETS: dict[str, Size] = {
    "nano": Size(128, 4, 4),
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
}


def resolve(model: ModelSettings) -> Size:
    """Width, depth and heads of the encoder: the preset's, unless a field overrides one.

    Raises:
        ValueError: the width does not divide into the heads, or is not a multiple of 4 (sine-cosine positions).
    """
    preset = PRESETS[model.preset]
    size = Size(model.width or preset.width, model.depth or preset.depth, model.heads or preset.heads)
    for name, width, heads in (
        ("model.width", size.width, size.heads),
        ("model.decoder_width", model.decoder_width, model.decoder_heads),
    ):
        if width % heads or width % 4:
            raise ValueError(f"{name} = {width} must be a multiple of 4 and of its {heads} heads")
    return size
