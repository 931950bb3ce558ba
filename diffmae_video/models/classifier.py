"""A head on the encoder of pre-training: the same module, no second definition of the network.

K counts classes here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmae_video.models.checkpointing import Checkpointing
from diffmae_video.models.encoder import Encoder, drop_path_rates
from diffmae_video.models.hub import HubModel
from diffmae_video.models.layers import DropPath, seeded

POOLS = ("mean", "class", "attentive")


class AttentivePool(nn.Module):
    """One learned query attends over the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, D)."""
        # not len(x): torch.export would fix the batch
        q = self.query.expand(x.shape[0], -1, -1).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, 1, d)
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).transpose(1, 3).unbind(2)  #           (B, heads, N, d)
        pooled = F.scaled_dot_product_attention(q.to(k.dtype), k, v)
        return self.proj(pooled.transpose(1, 2).flatten(2))[:, 0]


class Classifier(HubModel, nn.Module):
    """Encoder, pooling, dropout and a linear head.

    Args:
        encoder: shared, not copied; with `mean` its last norm acts behind the pooling (`fc_norm` of MAE and VideoMAE).
        num_classes: K; 0 gives pooled features.
        pool: `mean` of the patch tokens, the `class` token, or `attentive`.
        dropout: before the head.
        drop_path: stochastic depth of the last block, rising linearly from 0; the encoder's own when None.
        head_init: standard deviation of the head's weights.
        seed: of the head's weights.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        pool: str = "mean",
        dropout: float = 0.0,
        drop_path: float | None = None,
        head_init: float = 2e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool {pool!r} is not one of {', '.join(POOLS)}")
        if pool == "class" and encoder.cls_token is None:
            raise ValueError("pool = 'class' needs an encoder with a class token (model.class_token = true)")
        self.encoder, self.pool, self.num_classes = encoder, pool, num_classes
        self.settings, self.num_features = encoder.settings, encoder.width
        self.dropout, self.head_init, self.seed = dropout, head_init, seed
        self.info: dict[str, Any] = {}
        with seeded(seed):
            self.attention = AttentivePool(encoder.width, encoder.heads) if pool == "attentive" else None
            self.head_drop = nn.Dropout(dropout)
            self.head: nn.Module = nn.Identity()
            self.reset_classifier(num_classes)
        if drop_path is not None:
            for block, rate in zip(encoder.blocks, drop_path_rates(drop_path, encoder.depth), strict=True):
                block.drop_path = DropPath(rate) if rate else nn.Identity()

    def forward_features(self, clips: Tensor) -> Tensor:
        """Tokens (B, N, D), class token first where there is one, of clips float (B, C, T, H, W)."""
        return self.encoder(clips, norm=self.pool != "mean")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of tokens (B, N, D); pooled features (B, D) with `pre_logits`."""
        classes = 0 if self.encoder.cls_token is None else 1
        if self.pool == "class":
            x = x[:, 0]
        elif self.attention is not None:
            x = self.attention(x)
        else:
            x = x[:, classes:].mean(1)
        x = self.encoder.norm(x) if self.pool == "mean" else x
        return x if pre_logits else self.head(self.head_drop(x))

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, K) of clips float (B, C, T, H, W), normalised."""
        return self.forward_head(self.forward_features(clips))

    def get_classifier(self) -> nn.Module:
        """The head (timm's name)."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes`; 0 removes it."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            generator = torch.Generator().manual_seed(self.seed)
            with seeded(self.seed):  # its own initial weights are drawn and replaced: outside, no random state moves
                self.head = nn.Linear(self.num_features, num_classes)
            # MAE truncates at -2 and 2, which no draw of this deviation reaches
            nn.init.normal_(self.head.weight, std=self.head_init, generator=generator)
            nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must not touch."""
        names = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return names | ({"attention.query"} if self.attention is not None else set())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer of each parameter, for layer-wise decay."""
        groups = self.encoder.group_matcher(coarse, prefix="encoder.")
        if self.pool == "mean":  # the norm stands behind the pooling: it belongs to the head, as timm's fc_norm does
            groups["blocks"] = groups["blocks"][:1]
        return groups

    def set_grad_checkpointing(self, enable: Checkpointing = True) -> None:
        """Recompute blocks in the backward pass, or with `selective` what is cheap in them."""
        self.encoder.set_grad_checkpointing(enable)
