"""What the loop trains and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diffmae_video.config import TrainSettings
from diffmae_video.errors import UsageError


class LossOutput(NamedTuple):
    """What a task computes of a micro-batch."""

    loss: Tensor  # scalar
    per_sample: Tensor  # (B,)
    metrics: dict[str, Tensor]  # scalars, detached; averaged over the steps between two lines of metrics.jsonl


class Task(Protocol):
    """What is trained. `model` is the plain module; `loss` gets it wrapped (DDP, compile) and calls that one."""

    model: nn.Module

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> LossOutput: ...

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Metrics of the validation split; called on every rank, the same result on all."""
        ...

    def pictures(self, model: nn.Module, step: int) -> dict[str, np.ndarray]:
        """Images uint8 (H, W, 3) and videos uint8 (T, H, W, 3) by name."""
        ...

    def info(self) -> dict[str, Any]:
        """Facts for model.json."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    directory: Path
    step: int
    total: int
    metrics: dict[str, Any] = field(default_factory=dict)  # the last line of metrics.jsonl
    resumed_from: int = 0
    seconds: float = 0.0
    already_finished: bool = False


def micro_batch_size(train: TrainSettings, world: int, batch_size: int | None = None) -> int:
    """Clips of one rank in one micro-batch.

    Raises:
        UsageError: the batch does not divide among processes and micro-batches.
    """
    batch_size = batch_size or train.batch_size
    parts = world * train.accumulate
    if batch_size % parts:
        raise UsageError(
            f"train.batch_size = {batch_size} does not divide into {world} processes x train.accumulate = "
            f"{train.accumulate}; make it a multiple of {parts}."
        )
    return batch_size // parts
