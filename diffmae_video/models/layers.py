"""Parts of every Transformer here: attention, blocks, positions, the timestep's embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmae_video.masking import GridShape
from diffmae_video.models.rotary import rotate


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise modules from `seed`, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def initialize(model: nn.Module) -> None:
    """All first weights of an encoder or decoder but those of learned positions, drawn in the order of its modules.

    MAE's: Xavier-uniform matrices, zero biases, identity LayerNorms, tokens of deviation 0.02. Gates of adaLN are zero.
    Noise must not drown the positions, by which masked tokens find visible ones: its embedding is a tenth.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    parts = dict(model.named_children())
    if isinstance(noisy_embed := parts.get("noisy_embed"), nn.Linear):
        nn.init.xavier_uniform_(noisy_embed.weight, gain=0.1)
    for name, parameter in model.named_parameters(recurse=False):
        if name in ("mask_token", "cls_token"):
            nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if isinstance(module, AdaLN):
            nn.init.zeros_(module.project.weight)


class Modulation(NamedTuple):
    """How the timestep changes a part of a block; each (B, 1, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Normed tokens (B, L, D), scaled and shifted."""
        return x * (1 + self.scale) + self.shift


class AdaLN(nn.Sequential):
    """A `Modulation` for each part of a block from the timestep's embedding (DiT, arXiv 2212.09748)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, 3 * width * parts))
        self.parts = parts

    @property
    def project(self) -> nn.Linear:
        """The layer that is zero at first."""
        layer = self[1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, input: Any) -> list[Modulation]:
        """input (B, D), the condition."""
        parts = super().forward(input)[:, None].chunk(self.parts, 2)  # (B, 1, 3 * D) each
        return [Modulation(*part.chunk(3, 2)) for part in parts]


# Parameters are named as timm's blocks name them, and results are the same bit for bit (a test compares):
# importing timm takes as long as importing PyTorch.


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, L, D), attending where attn_mask (B, 1, 1, L) -> (B, L, D)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  #           (B, L, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  #                    (B, heads, L, D/heads) each
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training a sample's branch is left out with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_prob = rate

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D), with the same expectation."""
        if not self.training:
            return x
        kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.drop_prob)
        return x * (kept / (1 - self.drop_prob))


class CrossAttention(nn.Module):
    """Queries from one stream, keys and values from a context of another width; named as `Attention`."""

    def __init__(self, width: int, context_width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.kv = nn.Linear(context_width, 2 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, L, D) attends to context (B, K, context width), where attn_mask (B, 1, 1, K): (B, L, D)."""
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  #                (B, heads, L, D/heads)
        kv = self.kv(context).unflatten(2, (2, self.num_heads, -1))  #                     (B, K, 2, heads, D/heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  #                                      (B, heads, K, D/heads) each
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class RotaryAttention(Attention):
    """Self-attention whose queries and keys are turned by their places."""

    def forward(self, x: Tensor, attn_mask: Tensor | None, angles: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, L, D) at angles (B or 1, L, d / 2), attending where attn_mask (B, 1, 1, L) -> (B, L, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, attn_mask=attn_mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class RotaryCrossAttention(CrossAttention):
    """Cross-attention whose queries and keys are turned by their places in the same grid."""

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, attn_mask: Tensor | None, angles: Tensor, context_angles: Tensor
    ) -> Tensor:
        """x (B, L, D) attends to context (B, K, context width), where attn_mask (B, 1, 1, K): (B, L, D)."""
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  #                (B, heads, L, D/heads)
        kv = self.kv(context).unflatten(2, (2, self.num_heads, -1))  #                     (B, K, 2, heads, D/heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  #                                      (B, heads, K, D/heads) each
        q, k = rotate(q, angles), rotate(k, context_angles)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(x.transpose(1, 2).flatten(2))


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
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = (RotaryAttention if rotary else Attention)(width, heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, *angles: Tensor) -> Tensor:
        """x (B, L, D), attending where attn_mask (B, 1, 1, L), at rotary angles where it has some -> (B, L, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x), attn_mask, *angles))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def attention_mask(valid: Tensor | None) -> Tensor | None:
    """Which tokens are attended to, valid (B, K), as attention reads it: bool (B, 1, 1, K); None for all."""
    return None if valid is None else valid[:, None, None, :]


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
            `flat` computes (VideoMAE) one table over all tokens (1, N, D); `rotary` adds nothing, since attention
            turns queries and keys (rotary.py).
        period: of `sincos`, see `ModelSettings.position_period`.
    """

    def __init__(self, kind: str, shape: GridShape, width: int, period: float = 10000.0) -> None:
        super().__init__()
        times, height, columns = self.shape = shape
        self.kind = kind
        if kind == "rotary":
            self.nothing: Tensor
            self.register_buffer("nothing", torch.zeros(1, 1, width), persistent=False)
        elif kind == "sincos":
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
            raise ValueError(f"positions {kind!r} is not one of sincos, learned, joint, flat, rotary")

    def forward(self, shape: GridShape) -> Tensor:
        """Embeddings (1, N, D) of the grid `shape`."""
        if self.kind == "rotary":
            return self.nothing.expand(-1, math.prod(shape), -1)
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
        self.omega: Tensor
        omega = torch.exp(-math.log(10000) * torch.arange(frequencies // 2, dtype=torch.float32) / (frequencies // 2))
        self.register_buffer("omega", omega, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep (B,) -> (B, D)."""
        angles = timestep.float()[:, None] * self.omega  # (B, frequencies / 2)
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(dtype))
