"""Attention in bf16 on a CPU, by plain matrix products over blocks.

H heads, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffmae_video.models.layers import Attention, CrossAttention

BLOCK = 3 * 2**18
"""Scores (queries x keys) of a block, for each thread: 1.5 MiB in bf16, about the second-level cache of a core."""


def use_cpu_bf16(model: nn.Module) -> None:
    """Let every attention of `model` compute bf16 on a CPU in blocks: twice the speed of PyTorch's fused kernel there.

    Parameters, names and everything else stay; other types, devices and masked keys go the way they went.
    """
    swaps: dict[type, type] = {Attention: BlockedAttention, CrossAttention: BlockedCrossAttention}
    for module in model.modules():
        module.__class__ = swaps.get(type(module), type(module))


class BlockedAttention(Attention):
    """Self-attention whose scores stay in the cache."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        if not _applies(x, attn_mask):
            return super().forward(x, attn_mask)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)  # (B, L, heads, D/heads) each
        return self.proj(blocked_attention(q, k, v).flatten(2))


class BlockedCrossAttention(CrossAttention):
    """Cross-attention whose scores stay in the cache."""

    def forward(self, x: Tensor, context: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, L, D) and context (B, K, context width) -> (B, L, D)."""
        if not _applies(x, attn_mask):
            return super().forward(x, context, attn_mask)
        q = self.q(x).unflatten(2, (self.num_heads, -1))  #                          (B, L, heads, D/heads)
        k, v = self.kv(context).unflatten(2, (2, self.num_heads, -1)).unbind(2)  #   (B, K, heads, D/heads) each
        return self.proj(blocked_attention(q, k, v).flatten(2))


def _applies(x: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether attention will run in bf16 on a CPU, over all keys."""
    narrow = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return attn_mask is None and x.device.type == "cpu" and (narrow or x.dtype == torch.bfloat16)


@torch.library.custom_op("diffmae_video::blocked_attention", mutates_args=())
def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by plain matrix products over blocks of queries whose scores stay in the cache.

    The backward pass computes the scores again, as FlashAttention does (arXiv 2205.14135). Scores are rounded to the
    inputs' type, as in attention that is not fused.

    Args:
        q: (B, L, H, d).
        k: (B, K, H, d).
        v: (B, K, H, d).

    Returns:
        (B, L, H, d).
    """
    if not q.numel() or not k.numel():  # no patch is visible, or none is hidden
        return q.new_zeros(q.shape)
    batch, scale = len(q), q.shape[-1] ** -0.5
    q, k, v = _by_head(q) * scale, _by_head(k), _by_head(v)
    out = torch.empty_like(q)
    for heads, queries in _blocks(q, k):
        p = torch.bmm(q[heads, queries], k[heads].mT).softmax(-1)  # (h, l, K)
        out[heads, queries] = torch.bmm(p, v[heads])
    return _by_token(out, batch)


@torch.library.custom_op("diffmae_video::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (B, L or K, H, d) by q, k and v of `blocked_attention`, given the one by its output."""
    if not q.numel() or not k.numel():
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    batch, scale = len(q), q.shape[-1] ** -0.5
    grad, q, k, v = _by_head(grad), _by_head(q) * scale, _by_head(k), _by_head(v)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    sums: list[Tensor] = []  # of dk and dv over the blocks of the same heads
    for heads, queries in _blocks(q, k):
        p = torch.bmm(q[heads, queries], k[heads].mT).softmax(-1)  #            (h, l, K)
        dp = torch.bmm(grad[heads, queries], v[heads].mT)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq[heads, queries] = torch.bmm(ds, k[heads])
        parts = [torch.bmm(ds.mT, q[heads, queries]), torch.bmm(p.mT, grad[heads, queries])]
        sums = [a.to(wide).add_(b) for a, b in zip(sums, parts, strict=True)] if queries.start else parts
        if queries.stop >= q.shape[1]:
            dk[heads], dv[heads] = sums
    return _by_token(dq.mul_(scale), batch), _by_token(dk, batch), _by_token(dv, batch)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Heads and queries of each block: a head for each thread, more where they fit, fewer queries where they do not."""
    (heads, queries, _), keys = q.shape, k.shape[1]
    threads = torch.get_num_threads()
    room = BLOCK * max(2, threads)
    together = min(heads, max(threads, room // (queries * keys)))
    size = math.ceil(queries / math.ceil(together * queries * keys / room))
    for head in range(0, heads, together):
        for query in range(0, queries, size):
            yield slice(head, head + together), slice(query, query + size)


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)  # (B, L, H, d) -> (B * H, L, d)


def _by_token(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()  # and back


@blocked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@blocked_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return blocked_attention_backward(grad, *ctx.saved_tensors)


blocked_attention.register_autograd(_backward, setup_context=_keep)
