"""Rotary positions in space and time: attention reads how far apart two tokens are, on any grid, without tuning.

d is the width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmae_video.masking import GridShape
from diffmae_video.models.patches import gather_tokens

FASTEST = 2.0
"""Radians by which neighbours differ in the fastest pair of values; the slowest turns half a circle over its axis."""


class Rotary(nn.Module):
    """Angles of every place of a token grid (RoFormer, arXiv 2104.09864, an axis for each third of the pairs).

    Args:
        shape: native grid (T/t, H/p, W/p); on another one, places are spread over the same extent.
        head_width: d; each of its d / 2 pairs turns with time, row or column.

    Raises:
        ValueError: a head too narrow for three axes, or of odd width.
    """

    def __init__(self, shape: GridShape, head_width: int) -> None:
        super().__init__()
        pairs = head_width // 2
        if head_width % 2 or pairs < 3:
            raise ValueError(f"positions = 'rotary' needs heads of an even width from 6 on, not {head_width}")
        self.shape = shape
        self.pairs = (pairs // 3, (pairs - pairs // 3) // 2, pairs - pairs // 3 - (pairs - pairs // 3) // 2)
        for axis, (length, count) in enumerate(zip(shape, self.pairs, strict=True)):
            slowest = min(FASTEST, math.pi / length)
            speeds = torch.logspace(math.log10(FASTEST), math.log10(slowest), count, dtype=torch.float64)
            self.register_buffer(f"speeds_{axis}", speeds.float(), persistent=False)

    def forward(self, shape: GridShape) -> Tensor:
        """Angles (1, N, d / 2) of the grid `shape`."""
        angles = []
        for axis, (native, length) in enumerate(zip(self.shape, shape, strict=True)):
            speeds: Tensor = getattr(self, f"speeds_{axis}")
            places = torch.arange(length, device=speeds.device, dtype=torch.float32)
            if length not in (1, native):  # the middles of equal parts of the same extent
                places = (places + 0.5) * (native / length) - 0.5
            view = [1, 1, 1, len(speeds)]
            view[axis] = length
            angles.append((places[:, None] * speeds).view(view).expand(*shape, -1))
        return torch.cat(angles, -1).flatten(0, 2)[None]


def rotary_angles(rotary: Rotary | None, shape: GridShape, index: Tensor | None) -> list[Tensor]:
    """Angles (B, L, d / 2) of the tokens at index (B, L) of a grid, or of all; an empty list where nothing turns."""
    if rotary is None:
        return []
    angles = rotary(shape)  #                                      (1, N, d / 2)
    return [angles if index is None else gather_tokens(angles, index)]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Heads x (B, heads, L, d) turned by angles (B or 1, L, d / 2): value k and k + d / 2 make a pair."""
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)  # (B, 1, L, d / 2)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
