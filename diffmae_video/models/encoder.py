"""The encoder: a plain ViT over visible space-time patches, for images and clips, pre-training and recognition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmae_video.config import ModelSettings
from diffmae_video.models.checkpointing import Checkpointing, run_block
from diffmae_video.models.layers import Block, Positions, attention_mask, initialize, seeded
from diffmae_video.models.patches import gather_tokens, grid_shape, patchify
from diffmae_video.models.presets import resolve
from diffmae_video.models.rotary import Rotary, rotary_angles


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of each block, rising linearly from 0; plain numbers, so that models build on `meta` too."""
    return [last * block / max(1, depth - 1) for block in range(depth)]


class PatchEmbed(nn.Module):
    """Patch vectors to tokens with one matrix product; the weight keeps the shape of the Conv3d it equals."""

    def __init__(self, width: int, tubelet: int, patch: int, channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, (tubelet, patch, patch), stride=(tubelet, patch, patch))

    def forward(self, patches: Tensor) -> Tensor:
        """patches (B, K, P) ordered (t, p, p, C) -> (B, K, D)."""
        weight = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)  # (D, P)
        return F.linear(patches, weight, self.proj.bias)


class Encoder(nn.Module):
    """Plain ViT. It sees the patches it is given and nothing else: no timestep, no masked pixel.

    Args:
        model: sizes and options; only the encoder's are read.
        seed: of the initial weights.
    """

    def __init__(self, model: ModelSettings, seed: int = 0) -> None:
        super().__init__()
        self.settings = model
        self.width, self.depth, self.heads = width, depth, heads = resolve(model)
        self.num_features = self.embed_dim = width  # timm's names
        self.tubelet, self.patch = model.tubelet, model.patch
        self.shape = grid_shape(model.frames, *model.size, model.tubelet, model.patch)
        self.checkpointing: Checkpointing = False
        with seeded(seed):
            self.patch_embed = PatchEmbed(width, model.tubelet, model.patch)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if model.class_token else None
            self.positions = Positions(model.positions, self.shape, width, model.position_period)
            self.rotary = Rotary(self.shape, width // heads) if model.positions == "rotary" else None
            rates, turned = drop_path_rates(model.drop_path, depth), self.rotary is not None
            self.blocks = nn.ModuleList(
                Block(width, heads, model.mlp_ratio, model.qkv_bias, model.layer_norm_eps, rate, turned)
                for rate in rates
            )
            self.norm = nn.LayerNorm(width, eps=model.encoder_norm_eps or model.layer_norm_eps)
            initialize(self)

    def forward(
        self, clips: Tensor, visible: Tensor | None = None, valid: Tensor | None = None, norm: bool = True
    ) -> Tensor:
        """Tokens of clips.

        Args:
            clips: float (B, C, T, H, W), normalised; T = 1 is an image. Other sizes than the settings' are fine if
                they divide into patches: positions are resized.
            visible: int64 (B, V) tokens to encode; all of them by default.
            valid: bool (B, V), False on padding of `visible`.
            norm: apply the last norm.

        Returns:
            (B, V, D), or (B, 1 + V, D) with a class token.
        """
        return self.forward_patches(*self._embeddable(clips, visible), visible, valid, norm=norm)[0]

    def forward_features(self, clips: Tensor) -> Tensor:
        """All tokens of clips (B, C, T, H, W), after the last norm (timm's name)."""
        return self(clips)

    def forward_intermediates(
        self, clips: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Final tokens and the outputs of some blocks (timm's name).

        Args:
            indices: block numbers, or how many of the last ones; all by default.
            norm: pass each through the last norm.
        """
        if indices is None or isinstance(indices, int):
            indices = range(self.depth - (indices or self.depth), self.depth)
        indices = [index % self.depth for index in indices]
        patches, shape = self._embeddable(clips, None)
        tokens, features = self.forward_patches(patches, shape, None, None, indices)
        return tokens, [self.norm(features[index]) if norm else features[index] for index in indices]

    def forward_patches(
        self,
        patches: Tensor,
        shape: tuple[int, int, int],
        index: Tensor | None,
        valid: Tensor | None = None,
        keep: Sequence[int] = (),
        norm: bool = True,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Encode patch vectors that were gathered already.

        Args:
            patches: (B, V, P).
            shape: grid (T/t, H/p, W/p) they come from.
            index: int64 (B, V) their places in it; None when all are there in order.
            valid: bool (B, V), False on padding.
            keep: blocks whose outputs to return.
            norm: apply the last norm.

        Returns:
            tokens (B, V, D), with the class token first where there is one, and the outputs
            (B, V, D) of the blocks in `keep`, not normed.
        """
        positions = self.positions(shape)  #                         (1, N, D)
        if index is not None:
            positions = gather_tokens(positions, index)  #           (B, V, D)
        x = self.patch_embed(patches) + positions  #                 (B, V, D)
        angles = rotary_angles(self.rotary, shape, index)  #         (1 or B, V, D/heads/2), or none
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
            valid = None if valid is None else F.pad(valid, (1, 0), value=True)
            angles = [F.pad(angle, (0, 0, 1, 0)) for angle in angles]
        attn_mask = attention_mask(valid)
        features: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            x = run_block(block, self.checkpointing, x, attn_mask, *angles)
            if number in keep:
                features[number] = x
        return self.norm(x) if norm else x, features

    def _embeddable(self, clips: Tensor, visible: Tensor | None) -> tuple[Tensor, tuple[int, int, int]]:
        shape = grid_shape(*clips.shape[2:], tubelet=self.tubelet, patch=self.patch)
        patches = patchify(clips, self.tubelet, self.patch)  # (B, N, P)
        return patches if visible is None else gather_tokens(patches, visible), shape

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must not touch (timm's name)."""
        tables = {f"positions.{name}" for name, _ in self.positions.named_parameters()}
        return tables | ({"cls_token"} if self.cls_token is not None else set())

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict[str, Any]:
        """Which layer each parameter belongs to, for layer-wise decay and freezing (timm's name)."""
        return {
            "stem": rf"^{prefix}(?:cls_token|positions|patch_embed)",
            "blocks": [(rf"^{prefix}blocks\.(\d+)", None), (rf"^{prefix}norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: Checkpointing = True) -> None:
        """Recompute blocks in the backward pass, or with `selective` what is cheap in them (timm's name)."""
        self.checkpointing = enable
