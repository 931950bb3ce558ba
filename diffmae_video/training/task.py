"""What the loop trains and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diffmae_video.config import Settings, TrainSettings
from diffmae_video.errors import UsageError
from diffmae_video.training.distributed import Distributed


class LossOutput(NamedTuple):
    """What a task computes of clips; means over them."""

    loss: Tensor  # scalar
    per_sample: Tensor  # (B,)
    metrics: dict[str, Tensor]  # scalars, detached; averaged over the steps between two lines of metrics.jsonl


@dataclass(frozen=True)
class TaskSetup:
    """What a task is built from."""

    settings: Settings
    processes: Distributed = field(default_factory=Distributed)
    facts: dict[str, Any] = field(default_factory=dict)  # for model.json: dataset, classes, recipe, ...
    init: str | None = None  # weights to start from: a run, an export or an import; None from scratch
    say: Callable[[str], None] = lambda text: None  # one line for the user

    @property
    def classes(self) -> list[str]:
        """Class names of the data; empty where it has no labels."""
        return list(self.facts.get("classes") or [])


class Task(Protocol):
    """What is trained. `model` is the plain module; `loss` gets it wrapped (DDP, compile) and calls that one.

    A task registers under its name, which `train.task` takes::

        @tasks.register("pretrain")
        class PretrainTask: ...
    """

    model: nn.Module
    monitor: tuple[str, str]  # the metric by which a checkpoint is the best, and `min` or `max`

    @classmethod
    def build(cls, setup: TaskSetup) -> Task:
        """The task before its first step; the same on every rank."""
        ...

    def open_stream(self, rank: int, world: int) -> Any:
        """An endless stream of this rank's batches, with `state_dict`, `load_state_dict`, `samples_per_epoch`."""
        ...

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> LossOutput:
        """Loss of the clips `batch.part`; what is drawn for a clip must not depend on how the batch is cut.

        A task that always computes all clips of the batch is right as well, and saves no memory.
        """
        ...

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
    parts = world * train.micro_batches
    if batch_size % parts:
        raise UsageError(
            f"train.batch_size = {batch_size} does not divide into {world} processes x train.accumulate = "
            f"{train.micro_batches}; make it a multiple of {parts}."
        )
    return batch_size // parts


def largest_batch(settings: Settings, clips: int, world: int) -> int:
    """The largest batch that `clips` clips fill and that divides among processes, micro-batches and repeats: their
    product times a power of two, as recipes have it; 0 where there is none."""
    least = world * settings.train.micro_batches * settings.data.repeats
    return least << ((clips // least).bit_length() - 1) if clips >= least else 0


def need_clips(settings: Settings, clips: int, world: int) -> None:
    """Refuse a batch that is larger than an epoch: it would hold clips twice.

    Args:
        clips: of an epoch, repeats included.
        world: processes that share the batch.

    Raises:
        UsageError: with a batch size that works.
    """
    train = settings.train
    if clips >= train.batch_size:
        return
    batch = largest_batch(settings, clips, world)
    remedy = f"set train.batch_size={batch}" if batch else f"take fewer than {world} processes"
    if not batch and train.micro_batches > 1:
        remedy = "set train.accumulate=auto"
    raise UsageError(
        f"The split {settings.data.split} has {clips} clips an epoch, fewer than train.batch_size = "
        f"{train.batch_size}; {remedy}, or add data."
    )
