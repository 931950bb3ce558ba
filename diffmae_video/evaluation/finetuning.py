"""Fine-tuning as a task for the training loop: soft targets, mixed clips, frozen layers, quick validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffmae_video.compat  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmae_video.config import FinetuneSettings
from diffmae_video.data.transforms import MixVideo


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy (B,) of logits (B, K) against target distributions (B, K), in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1)


def freeze_first(model: nn.Module, blocks: int) -> int:
    """Freeze the embedding and the first blocks of a classifier's encoder; returns the parameters frozen.

    Layers are told apart by timm's `group_matcher`: layer 0 is the embedding, layer i + 1 is block i.

    Raises:
        ValueError: more blocks than the encoder has.
    """
    from timm.models import group_parameters

    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    depth = len(model.encoder.blocks)
    if blocks > depth:
        raise ValueError(f"finetune.freeze = {blocks}, but the encoder has {depth} blocks")
    frozen = 0
    for name, parameter in model.named_parameters():
        if blocks and layers[name] <= blocks:
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


class FinetuneTask:
    """Classification on top of the encoder, for `training.loop.train`.

    Args:
        model: a Classifier; `model(clips float (B, C, T, H, W)) -> logits (B, K)`.
        settings: smoothing, mixup, cutmix, freeze.
        normalize: uint8 (B, T, C, H, W) -> float (B, C, T, H, W).
        describe: what model.json says about the run (classes, data set, recipe).
        evaluate: `(model, step) -> metrics`, the quick validation.
        seed: mixed into the draws of each batch.
    """

    monitor = ("val_top1", "max")  # which checkpoint counts as the best

    def __init__(
        self,
        model: nn.Module,
        settings: FinetuneSettings,
        *,
        classes: int,
        normalize: Callable[[Tensor], Tensor],
        describe: dict[str, Any],
        evaluate: Callable[[nn.Module, int], dict[str, float]],
        seed: int = 0,
    ) -> None:
        self.model = model
        self.normalize, self.evaluate, self.seed = normalize, evaluate, seed
        self._describe = describe
        self._mix = MixVideo(classes, settings.mixup, settings.cutmix, settings.smoothing)
        freeze_first(model, settings.freeze)

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> Any:
        """Soft cross entropy of a batch; top-1 is counted against each clip's own label, mixed or not."""
        from diffmae_video.training.loop import LossOutput

        clips = self.normalize(batch.clips.to(device, non_blocking=True))  # (B, C, T, H, W)
        labels = batch.labels.to(device, non_blocking=True)
        mixed, targets = self._mix(clips, labels, int(batch.seeds[0]) ^ self.seed)
        logits = model(mixed)  # (B, K)
        per_sample = soft_cross_entropy(logits, targets)
        top1 = (logits.detach().argmax(dim=-1) == labels).float().mean()
        return LossOutput(loss=per_sample.mean(), per_sample=per_sample.detach(), metrics={"train_top1": top1})

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Top-1 and top-5 on the evaluation split, one view a video."""
        return self.evaluate(model, step)

    def pictures(self, model: nn.Module, step: int) -> dict[str, Any]:
        """Fine-tuning has none."""
        return {}

    def info(self) -> dict[str, Any]:
        """For model.json."""
        return dict(self._describe)
