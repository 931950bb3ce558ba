"""Parts of every Transformer here: attention, blocks, positions, the timestep's embedding.

Letters: B batch, L query tokens, K context tokens, N tokens of a grid, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from diffmae_video.masking import GridShape
from diffmae_video.models.attention import attend
from diffmae_video.models.fused import Linear, Mlp


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise modules from `seed`, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def initialize(module: nn.Module) -> None:
    """MAE's initialisation, for `Module.apply`: Xavier-uniform matrices, zero biases, identity LayerNorms."""
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention with timm's parameter names."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.proj = Linear(width, width)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm | None = None, valid: Tensor | None = None, last: int | None = None
    ) -> Tensor:
        """Attend among x (B, L, D).

        Args:
            x: tokens.
            norm: of the tokens, before anything else.
            valid: bool (B, L), False on tokens that are not attended to.
            last: how many of the last tokens ask; all by default.

        Returns:
            (B, L or last, D).
        """
        if last is None:
            q, k, v = self.qkv(x, norm).unflatten(2, (3, self.heads, -1)).unbind(2)  # (B, L, heads, D/heads) each
        else:
            x, width = x if norm is None else norm(x), x.shape[2]
            bias = (None, None) if self.qkv.bias is None else self.qkv.bias.split((width, 2 * width))
            weight = self.qkv.weight.split((width, 2 * width))
            q = F.linear(x[:, -last:], weight[0], bias[0]).unflatten(2, (self.heads, -1))
            k, v = F.linear(x, weight[1], bias[1]).unflatten(2, (2, self.heads, -1)).unbind(2)
        return self.proj(attend(q, k, v, valid))


class CrossAttention(nn.Module):
    """Queries from one stream, keys and values from a context of another width."""

    def __init__(self, width: int, context_width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width, bias=qkv_bias)
        self.kv = Linear(context_width, 2 * width, bias=qkv_bias)
        self.proj = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        norm: nn.LayerNorm | None = None,
        context_norm: nn.LayerNorm | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """x (B, L, D) attends to context (B, K, context width), where valid (B, K); both normed first."""
        q = self.q(x, norm).unflatten(2, (self.heads, -1))  #                 (B, L, heads, D/heads)
        k, v = self.kv(context, context_norm).unflatten(2, (2, self.heads, -1)).unbind(2)  # (B, K, heads, D/heads) each
        return self.proj(attend(q, k, v, valid))  #                           (B, L, D)


class Block(nn.Module):
    """Pre-norm ViT block with timm's parameter names."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        x = x + self.drop_path(self.attn(x, self.norm1, valid))
        return x + self.drop_path(self.mlp(x, self.norm2))


# --- positions ------------------------------------------------------------------------------------------------------


def sincos_1d(width: int, positions: Tensor, period: float = 10000.0) -> Tensor:
    """[sin, cos] of positions (n,) at width / 2 frequencies period^(-k / (width / 2)): (n, width), float32."""
    omega = period ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def sincos_2d(width: int, height: int, columns: int, period: float = 10000.0) -> Tensor:
    """MAE's table: the first half encodes the column, the second the row: (height * columns, width)."""
    rows, cols = (x.flatten() for x in torch.meshgrid(torch.arange(height), torch.arange(columns), indexing="ij"))
    return torch.cat([sincos_1d(width // 2, cols, period), sincos_1d(width // 2, rows, period)], 1)


def sinusoid_flat(width: int, count: int) -> Tensor:
    """VideoMAE's table: one sinusoid over the flattened grid, sine and cosine interleaved: (count, width)."""
    channel = torch.arange(width, dtype=torch.float64)
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos()).float()


def resize_spatial(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions (R, h * w, D) on another grid, bicubic with antialiasing as timm's `resample_abs_pos_embed`."""
    if old == new:
        return table
    grid = table.float().unflatten(1, old).permute(0, 3, 1, 2)  # (R, D, h, w)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)  #     (R, h' * w', D)


def resize_temporal(table: Tensor, new: int) -> Tensor:
    """Positions (R, n, D) at `new` times, linear; a single one (an image) is the first."""
    if new in (1, table.shape[1]):
        return table[:, :new]
    return F.interpolate(table.float().transpose(1, 2), size=new, mode="linear").transpose(1, 2).to(table.dtype)


class Positions(nn.Module):
    """Position embeddings of a token grid, at its native shape or resized to another.

    Args:
        kind: `sincos` and `learned` add a spatial (1, S, D) and a temporal (1, T/t, D) table; `joint` learns and
            `flat` computes (VideoMAE) one table over all tokens (1, N, D).
        period: of `sincos`, see `ModelSettings.position_period`.
    """

    def __init__(self, kind: str, shape: GridShape, width: int, period: float = 10000.0) -> None:
        super().__init__()
        times, height, columns = self.shape = shape
        self.kind = kind
        if kind == "sincos":
            self.register_buffer("spatial", sincos_2d(width, height, columns, period)[None], persistent=False)
            self.register_buffer("temporal", sincos_1d(width, torch.arange(times), period)[None], persistent=False)
        elif kind == "learned":
            self.spatial = nn.Parameter(torch.randn(1, height * columns, width) * 0.02)
            self.temporal = nn.Parameter(torch.randn(1, times, width) * 0.02)
        elif kind == "joint":
            self.joint = nn.Parameter(torch.randn(1, math.prod(shape), width) * 0.02)
        elif kind == "flat":
            self.register_buffer("joint", sinusoid_flat(width, math.prod(shape))[None], persistent=False)
        else:
            raise ValueError(f"positions {kind!r} is not one of sincos, learned, joint, flat")

    def forward(self, shape: GridShape) -> Tensor:
        """Embeddings (1, N, D) of the grid `shape`."""
        if self.kind in ("sincos", "learned"):
            spatial = resize_spatial(self.spatial, self.shape[1:], shape[1:])  #  (1, S, D)
            temporal = resize_temporal(self.temporal, shape[0])  #                (1, T/t, D)
            return (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)  #     (1, N, D)
        if tuple(shape) == self.shape:
            return self.joint
        table = self.joint.unflatten(1, (self.shape[0], -1))[0]  #                (T/t, S, D)
        table = resize_spatial(table, self.shape[1:], shape[1:]).transpose(0, 1)
        return resize_temporal(table, shape[0]).transpose(0, 1).flatten(0, 1)[None]


class TimestepEmbedding(nn.Module):
    """Sinusoid of the 0-based timestep (cosines first, as DiT and guided-diffusion), then a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        omega = torch.exp(-math.log(10000) * torch.arange(frequencies // 2, dtype=torch.float32) / (frequencies // 2))
        self.register_buffer("omega", omega, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep (B,) -> (B, D)."""
        angles = timestep.float()[:, None] * self.omega  # (B, frequencies / 2)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))
