"""The optimizer: parameter groups, AdamW, learning rate, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import diffmae_video.compat  # noqa: F401 - before timm, which imports torchvision

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from diffmae_video.config import TrainSettings


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for AdamW: no decay on vectors (norms, biases) and on what `model.no_weight_decay()` names.

    With `layer_decay` below 1 each group carries `lr_scale` = layer_decay ** (layers above it), by the model's
    `group_matcher` (MAE, FINETUNE.md; timm's implementation).
    """
    exempt = getattr(model, "no_weight_decay", set)()
    if layer_decay < 1:
        return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)


def build_optimizer(model: nn.Module, train: TrainSettings, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, with the learning rate left to `set_learning_rate`."""
    groups = parameter_groups(model, train.weight_decay, train.layer_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=train.betas, fused=fused)


def peak_learning_rate(train: TrainSettings) -> float:
    """lr = base_lr x batch / 256 (MAE; the batch counts every clip of an optimizer step, repeats included)."""
    return train.base_lr * train.batch_size / 256


def learning_rate(samples: float, total: float, warmup: float, peak: float, minimum: float = 0.0) -> float:
    """Linear warm-up from 0 over `warmup` samples, then half a cosine from `peak` to `minimum` at `total` samples."""
    if samples < warmup:
        return peak * samples / warmup
    share = min(1.0, (samples - warmup) / max(1e-9, total - warmup))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group `value` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


class MovingAverage:
    """Exponential moving average of parameters: average = decay * average + (1 - decay) * parameter.

    The decay of update n is at most (1 + n) / (10 + n) (TensorFlow's `ExponentialMovingAverage`): a short run would
    otherwise end with an average that still holds a good part of the random weights it began with.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.source = dict(named)
        self.average = {name: parameter.detach().clone() for name, parameter in self.source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters as they are after optimizer step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.source.values()], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and parameters; call it again to change back."""
        for name, parameter in self.source.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)
