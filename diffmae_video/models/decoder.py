"""Decoders of the paper's Figure 3: joint, cross-self and cross attention between masked and visible tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmae_video.config import ModelSettings
from diffmae_video.masking import Mask
from diffmae_video.models.checkpointing import Checkpointing, run_block
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.layers import (
    AdaLN,
    Attention,
    CrossAttention,
    Mlp,
    Positions,
    RotaryAttention,
    RotaryCrossAttention,
    TimestepEmbedding,
    attention_mask,
    initialize,
)
from diffmae_video.models.patches import gather_tokens
from diffmae_video.models.rotary import Rotary, rotary_angles
from diffmae_video.registry import decoders


class Encoding(NamedTuple):
    """What the decoder needs of the visible patches; it is the same at every diffusion step."""

    mask: Mask
    latents: Tensor
    """(B, V, D) after the last norm, class token first where there is one."""
    features: dict[int, Tensor]
    """Outputs (B, V, D) of the linked encoder blocks."""
    valid: Tensor | None
    """bool like the tokens of `latents`, False on padding."""
    label: Tensor | None = None
    """int64 (B,) classes that the decoder is told of, `model.labels` for none; None for none at all."""

    def repeat_interleave(self, times: int) -> Encoding:
        """Every sample `times` times in a row."""
        return Encoding(
            self.mask.repeat_interleave(times),
            self.latents.repeat_interleave(times, 0),
            {block: feature.repeat_interleave(times, 0) for block, feature in self.features.items()},
            *(None if x is None else x.repeat_interleave(times, 0) for x in (self.valid, self.label)),
        )


def link_blocks(links: str, encoder_depth: int, decoder_depth: int) -> list[int]:
    """Encoder block that each decoder block reads, top-down: the last encoder block feeds the first decoder block.

    `even` spreads the links over the encoder (24 and 8 blocks: 23, 20, 17, ...; equal depths: one to one, reversed);
    `last` reads the final block everywhere. Blocks are counted from 0.
    """
    if links == "last":
        return [encoder_depth - 1] * decoder_depth
    return [encoder_depth - 1 - i * encoder_depth // decoder_depth for i in range(decoder_depth)]


# --- kinds of blocks -------------------------------------------------------------------------------------------------
#
# A new kind is one class under a name of `registry.decoders`, built as Block(model, context_width, adaln) and called as
# block(x, context, attn_mask, context_mask, condition): x (B, L, E), context (B, K, D), masks of what is attended to in
# x (B, 1, 1, L) and context (B, 1, 1, K) or None, condition (B, E) or None -> (B, L, E); with positions = "rotary" two
# more, the angles of x (B, L, d/2) and of context (B, K, d/2). Facts at registration:
# `links`, the block reads the visible tokens as context and x holds the masked ones alone (without it, x is all tokens
# in one sequence, and context None); `apart`, no token of x reads another, so that a subset may be predicted.


def attention(model: ModelSettings) -> type[Attention]:
    """Self-attention of a decoder block."""
    return RotaryAttention if model.positions == "rotary" else Attention


def cross_attention(model: ModelSettings) -> type[CrossAttention]:
    """Attention of a decoder block to its context."""
    return RotaryCrossAttention if model.positions == "rotary" else CrossAttention


@decoders.register("joint")
class JointBlock(nn.Module):
    """Self-attention among visible and masked tokens, as in MAE."""

    def __init__(self, model: ModelSettings, context_width: int, adaln: bool) -> None:
        super().__init__()
        width, eps = model.decoder_width, model.layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = attention(model)(width, model.decoder_heads, qkv_bias=model.qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * model.mlp_ratio))
        self.modulation = AdaLN(width, parts=2) if adaln else None

    def forward(
        self,
        x: Tensor,
        context: None,
        attn_mask: Tensor | None,
        context_mask: None,
        condition: Tensor | None,
        *angles: Tensor,
    ) -> Tensor:
        """x (B, V + M, E)."""
        if self.modulation is None:
            x = x + self.attn(self.norm1(x), attn_mask, *angles[:1])
            return x + self.mlp(self.norm2(x))
        one, two = self.modulation(condition)
        x = x + one.gate * self.attn(one(self.norm1(x)), attn_mask, *angles[:1])
        return x + two.gate * self.mlp(two(self.norm2(x)))


@decoders.register("cross_self", links=True)
class CrossSelfBlock(nn.Module):
    """Cross-attention to the visible tokens, then self-attention among the masked ones."""

    def __init__(self, model: ModelSettings, context_width: int, adaln: bool) -> None:
        super().__init__()
        width, heads, eps = model.decoder_width, model.decoder_heads, model.layer_norm_eps
        self.context_norm = nn.LayerNorm(context_width, eps=eps)
        self.norm0 = nn.LayerNorm(width, eps=eps)
        self.cross_attn = cross_attention(model)(width, context_width, heads, model.qkv_bias)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = attention(model)(width, heads, qkv_bias=model.qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * model.mlp_ratio))
        self.modulation = AdaLN(width, parts=3) if adaln else None

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        attn_mask: Tensor | None,
        context_mask: Tensor | None,
        condition: Tensor | None,
        *angles: Tensor,
    ) -> Tensor:
        """x (B, M, E), context (B, V, D)."""
        context = self.context_norm(context)
        if self.modulation is None:
            x = x + self.cross_attn(self.norm0(x), context, context_mask, *angles)
            x = x + self.attn(self.norm1(x), attn_mask, *angles[:1])
            return x + self.mlp(self.norm2(x))
        one, two, three = self.modulation(condition)
        x = x + one.gate * self.cross_attn(one(self.norm0(x)), context, context_mask, *angles)
        x = x + two.gate * self.attn(two(self.norm1(x)), attn_mask, *angles[:1])
        return x + three.gate * self.mlp(three(self.norm2(x)))


@decoders.register("cross", links=True, apart=True)
class CrossBlock(nn.Module):
    """Cross-attention to the visible tokens alone (CrossMAE)."""

    def __init__(self, model: ModelSettings, context_width: int, adaln: bool) -> None:
        super().__init__()
        width, eps = model.decoder_width, model.layer_norm_eps
        self.context_norm = nn.LayerNorm(context_width, eps=eps)
        self.norm0 = nn.LayerNorm(width, eps=eps)
        self.cross_attn = cross_attention(model)(width, context_width, model.decoder_heads, model.qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * model.mlp_ratio))
        self.modulation = AdaLN(width, parts=2) if adaln else None

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        attn_mask: None,
        context_mask: Tensor | None,
        condition: Tensor | None,
        *angles: Tensor,
    ) -> Tensor:
        """x (B, M, E), context (B, V, D)."""
        context = self.context_norm(context)
        if self.modulation is None:
            x = x + self.cross_attn(self.norm0(x), context, context_mask, *angles)
            return x + self.mlp(self.norm2(x))
        one, two = self.modulation(condition)
        x = x + one.gate * self.cross_attn(one(self.norm0(x)), context, context_mask, *angles)
        return x + two.gate * self.mlp(two(self.norm2(x)))


class Decoder(nn.Module):
    """Predicts a vector for every masked token from visible tokens, and from noisy patches where there are any.

    Args:
        model: kind, size and links.
        encoder: whose tokens it reads.
        outputs: values predicted per token.
        inputs: values of a noisy patch; None for a decoder of mask tokens only.
        timestep: `add`, `adaln` or `none`.
    """

    def __init__(self, model: ModelSettings, encoder: Encoder, outputs: int, inputs: int | None, timestep: str) -> None:
        super().__init__()
        width, depth = model.decoder_width, model.decoder_depth
        linked = decoders.fact(model.decoder, "links", False)
        self.links = link_blocks(model.links, encoder.depth, depth) if linked else []
        self.timestep = timestep
        self.noisy_embed = None if inputs is None else nn.Linear(inputs, width)
        # among visible tokens a learned vector marks the masked ones; alone, it would be one more bias (D8)
        marked = inputs is None or not linked
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if marked else None
        self.latent_embed = None if linked else nn.Linear(encoder.width, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if model.decoder_class else None
        self.class_position = nn.Parameter(torch.zeros(1, 1, width)) if model.decoder_class_position else None
        self.positions = Positions(model.positions, encoder.shape, width, model.position_period)
        rotary = model.positions == "rotary"
        self.rotary = Rotary(encoder.shape, width // model.decoder_heads) if rotary else None
        self.time_embed = TimestepEmbedding(width) if timestep != "none" else None
        assert not isinstance(model.labels, str), "model.labels = 'data' is settled by the shards, before training"
        self.label_embed = nn.Embedding(model.labels + 1, width) if model.labels else None  # the last: no label
        block = decoders.get(model.decoder)
        self.blocks = nn.ModuleList(block(model, encoder.width, timestep == "adaln") for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=model.decoder_norm_eps or model.layer_norm_eps)
        self.head = nn.Linear(width, outputs)
        self.checkpointing: Checkpointing = False
        initialize(self)

    def forward(
        self,
        noisy: Tensor | None,
        timestep: Tensor | None,
        index: Tensor,
        valid: Tensor | None,
        encoding: Encoding,
    ) -> Tensor:
        """Predictions (B, M, outputs).

        Args:
            noisy: noisy patches (B, M, P), of which it reads the first `inputs` values; None for mask tokens only.
            timestep: (B,) 0-based diffusion steps, or None.
            index: int64 (B, M) places of the masked tokens.
            valid: bool (B, M), False on padding.
            encoding: of the visible tokens.
        """
        positions = self.positions(encoding.mask.shape)  #                 (1, N, E)
        x = gather_tokens(positions, index)  #                             (B, M, E)
        if self.mask_token is not None:
            x = x + self.mask_token
        if self.noisy_embed is not None and noisy is not None:
            x = x + self.noisy_embed(noisy[..., : self.noisy_embed.in_features])
        condition = None if self.time_embed is None else self.time_embed(timestep)  # (B, E)
        if self.label_embed is not None:
            told = self._told(encoding.label, len(x))
            condition = told if condition is None else condition + told
        if self.timestep != "adaln" and condition is not None:
            x = x + condition[:, None]
            condition = None
        masked, shape = x.shape[1], encoding.mask.shape
        angles = rotary_angles(self.rotary, shape, index)  #               (B, M, d/2), or none
        seen = rotary_angles(self.rotary, shape, encoding.mask.visible)  # (B, V, d/2), or none
        seen = [F.pad(angle, (0, 0, encoding.latents.shape[1] - angle.shape[1], 0)) for angle in seen]
        if self.latent_embed is not None:
            x, valid = self._join(self._seen(encoding, positions), x, encoding.valid, valid)  # (B, V + M, E)
            angles = [torch.cat(pair, 1) for pair in zip(seen, angles, strict=True)]
        attn_mask, context_mask = attention_mask(valid), attention_mask(encoding.valid)
        contexts = [encoding.features[link] for link in self.links] or [None] * len(self.blocks)  # (B, V, D) each
        for block, context in zip(self.blocks, contexts, strict=True):
            x = run_block(block, self.checkpointing, x, context, attn_mask, context_mask, condition, *angles, *seen)
        return self.head(self.norm(x[:, -masked:]))  #                     (B, M, outputs)

    def _told(self, label: Tensor | None, batch: int) -> Tensor:
        """Embedded labels (B, E)."""
        assert self.label_embed is not None
        table = self.label_embed.weight
        none = len(table) - 1
        return table[none].expand(batch, -1) if label is None else self.label_embed(label)

    def _seen(self, encoding: Encoding, positions: Tensor) -> Tensor:
        """Visible tokens in the decoder's width, at their places (B, V, E); a class token has none."""
        assert self.latent_embed is not None
        seen = self.latent_embed(encoding.latents)
        places = gather_tokens(positions, encoding.mask.visible)
        places = F.pad(places, (0, 0, seen.shape[1] - places.shape[1], 0))
        if self.cls_token is not None:
            seen = torch.cat([self.cls_token.expand(len(seen), -1, -1).to(seen.dtype), seen[:, 1:]], 1)
        seen = seen + places
        if self.class_position is None:
            return seen
        return torch.cat([seen[:, :1] + self.class_position, seen[:, 1:]], 1)

    @staticmethod
    def _join(seen: Tensor, x: Tensor, seen_valid: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Visible and masked tokens in one sequence, and which of them are real."""
        if seen_valid is not None or valid is not None:
            seen_valid = seen.new_ones(seen.shape[:2], dtype=torch.bool) if seen_valid is None else seen_valid
            valid = x.new_ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
            valid = torch.cat([seen_valid, valid], 1)
        return torch.cat([seen, x], 1), valid
