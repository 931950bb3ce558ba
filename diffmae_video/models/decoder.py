"""Decoders of the paper's Figure 3: joint, cross-self and cross attention between masked and visible tokens.

Letters: B batch, M masked tokens, V visible tokens, N tokens of the grid, D encoder width, E decoder width,
P = t * p * p * C values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffmae_video.config import ModelSettings
from diffmae_video.masking import GridShape
from diffmae_video.models.fused import Linear, Mlp
from diffmae_video.models.layers import (
    CrossAttention,
    Positions,
    SelfAttention,
    TimestepEmbedding,
    initialize,
)
from diffmae_video.models.patches import gather_tokens


def link_blocks(links: str, encoder_depth: int, decoder_depth: int) -> list[int]:
    """Encoder block that each decoder block reads, top-down: the last encoder block feeds the first decoder block.

    `even` spreads the links over the encoder (24 and 8 blocks: 23, 20, 17, ...; equal depths: one to one, reversed);
    `last` reads the final block everywhere. Blocks are counted from 0.
    """
    if links == "last":
        return [encoder_depth - 1] * decoder_depth
    return [encoder_depth - 1 - i * encoder_depth // decoder_depth for i in range(decoder_depth)]


class DecoderBlock(nn.Module):
    """Cross-attention to the visible tokens, self-attention among the decoder's, MLP; each part pre-normed.

    `joint` has no cross-attention (the visible tokens sit in the sequence), `cross` no self-attention. With `adaln`
    every part is shifted, scaled and gated by the timestep, the gates zero at first (DiT, arXiv 2212.09748).
    """

    def __init__(self, model: ModelSettings, context_width: int, adaln: bool) -> None:
        super().__init__()
        width, heads, eps = model.decoder_width, model.decoder_heads, model.layer_norm_eps
        self.parts = 0
        self.cross_attn = self.attn = None
        if model.decoder != "joint":
            self.context_norm = nn.LayerNorm(context_width, eps=eps)
            self.norm0 = nn.LayerNorm(width, eps=eps)
            self.cross_attn = CrossAttention(width, context_width, heads, model.qkv_bias)
            self.parts += 1
        if model.decoder != "cross":
            self.norm1 = nn.LayerNorm(width, eps=eps)
            self.attn = SelfAttention(width, heads, model.qkv_bias)
            self.parts += 1
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * model.mlp_ratio))
        self.parts += 1
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width * self.parts)) if adaln else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        valid: Tensor | None,
        context_valid: Tensor | None,
        condition: Tensor | None,
        last: int | None = None,
    ) -> Tensor:
        """x (B, L, E) with context (B, K, D) and condition (B, E) -> (B, L, E), or the `last` tokens of it."""
        parts = iter(self.modulation(condition)[:, None].chunk(self.parts, 2) if self.modulation else [None] * 3)
        if self.cross_attn is not None:

            def cross(y: Tensor, norm: nn.LayerNorm | None) -> Tensor:
                return self.cross_attn(y, context, norm, self.context_norm, context_valid)

            x = _residual(x, self.norm0, cross, next(parts))
        if self.attn is not None:
            x = _residual(x, self.norm1, lambda y, norm: self.attn(y, norm, valid, last), next(parts))
        return _residual(x, self.norm2, self.mlp, next(parts))


def _residual(x: Tensor, norm: nn.LayerNorm, part: Callable[..., Tensor], modulation: Tensor | None) -> Tensor:
    if modulation is None:
        y = part(x, norm)
    else:
        shift, scale, gate = modulation.chunk(3, 2)  # (B, 1, E) each
        y = gate * part(norm(x) * (1 + scale) + shift, None)
    return x[:, x.shape[1] - y.shape[1] :] + y  # a part may return the last tokens alone


class Decoder(nn.Module):
    """Predicts a vector for every masked token from visible tokens, and from noisy patches where there are any.

    Args:
        model: kind, size and links.
        encoder_width: D.
        encoder_depth: blocks of the encoder, for the links.
        shape: native grid (T/t, H/p, W/p).
        outputs: values predicted per token.
        inputs: values of a noisy patch; None for a decoder of mask tokens only.
        timestep: `add`, `adaln` or `none`.
    """

    def __init__(
        self,
        model: ModelSettings,
        encoder_width: int,
        encoder_depth: int,
        shape: GridShape,
        outputs: int,
        inputs: int | None,
        timestep: str,
    ) -> None:
        super().__init__()
        width = model.decoder_width
        self.kind, self.timestep = model.decoder, timestep
        self.links = link_blocks(model.links, encoder_depth, model.decoder_depth)
        self.noisy_embed = None if inputs is None else Linear(inputs, width)
        # among visible tokens a learned vector marks the masked ones; alone, it would be one more bias (D8)
        marked = inputs is None or model.decoder == "joint"
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if marked else None
        self.latent_embed = Linear(encoder_width, width) if model.decoder == "joint" else None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if model.decoder_class else None
        self.positions = Positions(model.positions, shape, width, model.position_period)
        self.time_embed = TimestepEmbedding(width) if timestep != "none" else None
        self.blocks = nn.ModuleList(
            DecoderBlock(model, encoder_width, timestep == "adaln") for _ in range(model.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=model.decoder_norm_eps or model.layer_norm_eps)
        self.head = Linear(width, outputs)
        self.grad_checkpointing = False
        self.apply(initialize)
        if self.noisy_embed is not None:  # noise must not drown the positions, by which masked tokens find visible ones
            nn.init.xavier_uniform_(self.noisy_embed.weight, gain=0.1)
        for token in (self.mask_token, self.cls_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        for block in self.blocks:
            if block.modulation is not None:
                nn.init.zeros_(block.modulation[1].weight)

    def forward(
        self,
        noisy: Tensor | None,
        timestep: Tensor | None,
        index: Tensor,
        valid: Tensor | None,
        shape: GridShape,
        latents: Tensor,
        features: dict[int, Tensor],
        visible: Tensor,
        visible_valid: Tensor | None,
    ) -> Tensor:
        """Predictions (B, M, outputs).

        Args:
            noisy: noisy patches (B, M, P), or None for mask tokens only.
            timestep: (B,) 0-based diffusion steps, or None.
            index: int64 (B, M) places of the masked tokens.
            valid: bool (B, M), False on padding.
            shape: grid (T/t, H/p, W/p).
            latents: (B, V, D) the encoder's output, class token first where it has one.
            features: outputs (B, V, D) of the encoder blocks in `links`.
            visible: int64 (B, V) places of the visible tokens.
            visible_valid: bool like latents' tokens, False on padding.
        """
        positions = self.positions(shape)  #                               (1, N, E)
        x = gather_tokens(positions, index)  #                             (B, M, E)
        if self.mask_token is not None:
            x = x + self.mask_token
        if self.noisy_embed is not None:
            x = x + self.noisy_embed(noisy)
        condition = None if self.time_embed is None else self.time_embed(timestep)  # (B, E)
        if self.timestep == "add":
            x = x + condition[:, None]
            condition = None
        masked = x.shape[1]
        if self.latent_embed is not None:
            seen = self.latent_embed(latents)  #                           (B, V, E)
            classes = latents.shape[1] - visible.shape[1]  #               1 with a class token, which has no place
            places = gather_tokens(positions, visible)
            if classes:
                places = nn.functional.pad(places, (0, 0, classes, 0))
            if self.cls_token is not None:
                seen = torch.cat([self.cls_token.expand(len(seen), -1, -1).to(seen.dtype), seen[:, 1:]], 1)
            x = torch.cat([seen + places, x], 1)  #                        (B, V + M, E)
            valid = _join(visible_valid, valid, seen, masked)
        for number, (block, link) in enumerate(zip(self.blocks, self.links, strict=True), 1):
            context = None if block.cross_attn is None else features[link]  # (B, V, D)
            # nobody reads what the last joint block makes of visible tokens
            last = masked if self.latent_embed is not None and number == len(self.blocks) else None
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, context, valid, visible_valid, condition, last, use_reentrant=False)
            else:
                x = block(x, context, valid, visible_valid, condition, last)
        return self.head(x, self.norm)  #                                  (B, M, outputs)


def _join(visible_valid: Tensor | None, valid: Tensor | None, seen: Tensor, masked: int) -> Tensor | None:
    if visible_valid is None and valid is None:
        return None
    ones = torch.ones(len(seen), seen.shape[1] + masked, dtype=torch.bool, device=seen.device)
    left = ones[:, : seen.shape[1]] if visible_valid is None else visible_valid
    right = ones[:, seen.shape[1] :] if valid is None else valid
    return torch.cat([left, right], 1)
