"""Clips to patch vectors and back, and pixels to the model's scale and back.

A patch vector is ordered (t, p, p, C); tokens are ordered time, row, column. An image is a clip of one frame and fills
one tubelet by repetition.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIXEL_NORMS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "kinetics": ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),
}
"""Mean and standard deviation of each way to scale pixels, for values in [0, 1]."""


def grid_shape(frames: int, height: int, width: int, tubelet: int, patch: int) -> tuple[int, int, int]:
    """Token grid (T/t, H/p, W/p) of a clip; one frame makes one tubelet.

    Raises:
        ValueError: the clip is not a whole number of tubelets or patches.
    """
    if (frames != 1 and frames % tubelet) or height % patch or width % patch:
        raise ValueError(
            f"a clip of {frames} x {height} x {width} does not divide into patches of {tubelet} x {patch} x {patch}"
        )
    return max(1, frames // tubelet), height // patch, width // patch


def patchify(x: Tensor, tubelet: int, patch: int) -> Tensor:
    """Clips (B, C, T, H, W) to patch vectors (B, N, P); T = 1 is repeated to one tubelet."""
    if x.shape[2] == 1 and tubelet > 1:
        x = x.expand(-1, -1, tubelet, -1, -1)
    batch, channels, frames, height, width = x.shape
    shape = grid_shape(frames, height, width, tubelet, patch)
    # channels last first: the second copy then moves whole rows of patches, three times as fast as one of all axes
    x = x.permute(0, 2, 3, 4, 1).contiguous()  #              (B, T, H, W, C)
    x = x.view(batch, shape[0], tubelet, shape[1], patch, shape[2], patch * channels)
    x = x.permute(0, 1, 3, 5, 2, 4, 6)  #                     (B, T/t, H/p, W/p, t, p, p * C)
    return x.reshape(batch, shape[0] * shape[1] * shape[2], -1)  # (B, N, P)


def unpatchify(patches: Tensor, shape: tuple[int, int, int], tubelet: int, patch: int) -> Tensor:
    """Patch vectors (B, N, P) of a grid (T/t, H/p, W/p) to clips (B, C, T, H, W)."""
    x = patches.unflatten(2, (tubelet, patch, patch, -1)).unflatten(1, shape)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  #                  (B, C, T/t, t, H/p, p, W/p, p)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)  #     (B, C, T, H, W)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of tokens (B or 1, N, D) at index (B, K): (B, K, D)."""
    if tokens.shape[0] == 1:
        return tokens[0][index]
    first = torch.arange(len(tokens), device=index.device)[:, None] * tokens.shape[1]  # of each sample
    rows = tokens.flatten(0, 1).index_select(0, (index + first).flatten())  # whole rows: several times `gather`'s speed
    return rows.unflatten(0, index.shape)


def scatter_tokens(tokens: Tensor, index: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
    """A copy of tokens (B, N, D) with values (B, K, D) at index (B, K), where valid (B, K)."""
    if valid is not None:
        values = values.where(valid.unsqueeze(-1), gather_tokens(tokens, index))
        # padding repeats index 0 after its real entry, if it has one: send it to an extra row instead
        index = index.where(valid, torch.full_like(index, tokens.shape[1]))
        tokens = torch.cat([tokens, tokens[:, :1]], 1)
    out = tokens.scatter(1, index.unsqueeze(-1).expand_as(values), values.to(tokens.dtype))
    return out if valid is None else out[:, :-1]


def _statistics(pixel_norm: str, like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mean, std = PIXEL_NORMS[pixel_norm]
    options = {"dtype": torch.float32, "device": like.device}
    return torch.tensor(mean, **options).view(shape), torch.tensor(std, **options).view(shape)


def normalize_pixels(clips: Tensor, pixel_norm: str) -> Tensor:
    """uint8 clips (B, T, C, H, W) to float (B, C, T, H, W), (x / 255 - mean) / std."""
    mean, std = _statistics(pixel_norm, clips, (3, 1, 1, 1))
    return (clips.transpose(1, 2).float() - mean * 255) / (std * 255)


def denormalize_pixels(clips: Tensor, pixel_norm: str) -> Tensor:
    """float (B, C, T, H, W) to uint8 clips (B, T, C, H, W), rounded and clipped; inverts `normalize_pixels` exactly."""
    mean, std = _statistics(pixel_norm, clips, (3, 1, 1, 1))
    pixels = (clips.float() * (std * 255) + mean * 255).round().clamp(0, 255)
    return pixels.to(torch.uint8).transpose(1, 2).contiguous()


def pixel_bounds(pixel_norm: str, values: int) -> tuple[Tensor, Tensor]:
    """What black and white become in a patch vector: two float tensors (P,), channel last."""
    mean, std = _statistics(pixel_norm, torch.empty(0), (3,))
    return ((0 - mean) / std).repeat(values // 3), ((1 - mean) / std).repeat(values // 3)


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over tokens (B,) of values (B, K), where valid (B, K)."""
    if valid is None:
        return values.mean(1)
    return (values * valid).sum(1) / valid.sum(1).clamp(min=1)
