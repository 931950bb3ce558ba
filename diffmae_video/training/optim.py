"""The optimizer: parameter groups, timm's factory, learning rate, and the moving average of the weights."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

import diffmae_video.compat  # noqa: F401 - before timm, which imports torchvision

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import Tensor, nn

from diffmae_video.config import TrainSettings
from diffmae_video.errors import UsageError


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups of parameters: no decay on vectors (norms, biases) and on what `model.no_weight_decay()` names.

    With `layer_decay` below 1 each group carries `lr_scale` = layer_decay ** (layers above it), by the model's
    `group_matcher` (MAE, FINETUNE.md; timm's implementation).
    """
    exempt = getattr(model, "no_weight_decay", set)()
    if layer_decay < 1:
        return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)


def build_optimizer(model: nn.Module, train: TrainSettings, fused: bool = True) -> torch.optim.Optimizer:
    """`train.optimizer` over `parameter_groups`, with the learning rate of each step left to `set_learning_rate`.

    Args:
        fused: let PyTorch's Adam and AdamW update all parameters in one kernel.

    Raises:
        UsageError: timm has no optimizer of that name, or it needs more than gradients.
    """
    name = train.optimizer
    if name not in list_optimizers():
        near = difflib.get_close_matches(name, list_optimizers(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(
            f"train.optimizer = {name} is no optimizer of timm{hint}; timm.optim.list_optimizers() has all."
        )
    known = get_optimizer_info(name)
    if known.second_order:
        raise UsageError(f"train.optimizer = {name} needs second derivatives, which training does not compute.")
    options: dict[str, Any] = {}
    if known.has_betas and known.num_betas == 2:
        options["betas"] = train.betas
    if known.opt_class in (torch.optim.AdamW, torch.optim.Adam):
        options["fused"] = fused
    groups = parameter_groups(model, train.weight_decay, train.layer_decay)
    return create_optimizer_v2(groups, name, lr=peak_learning_rate(train), weight_decay=train.weight_decay, **options)


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
