"""One optimizer step: micro-batches cut to what the memory holds, loss scaling, and losses that are no numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffmae_video.config import Settings
from diffmae_video.data.batches import Batch
from diffmae_video.errors import DiffmaeError
from diffmae_video.files import write_atomic
from diffmae_video.training import optim, parallel
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.hardware import autocast
from diffmae_video.training.meter import Meter
from diffmae_video.training.run import Run
from diffmae_video.training.signals import StopRequest
from diffmae_video.training.task import Task


class Gradients(NamedTuple):
    """What the backward passes of a step leave beside the gradients."""

    loss: Tensor  # scalar, mean over the clips of this process
    metrics: dict[str, Tensor]


class Stepper:
    """Computes gradients of the batches of a step and takes the step.

    Args:
        task: what is trained; its model is on the device.
        settings: `train` and `seed`.
        here: the run: its folder, its processes, how to tell the user.
        meter: gets losses, metrics and times.
        total: optimizer steps of the run.
        warmup: clips until the learning rate is at its peak.
    """

    def __init__(self, task: Task, settings: Settings, here: Run, meter: Meter, total: int, warmup: float) -> None:
        self.task, self.model, self.train, self.seed = task, task.model, settings.train, settings.seed
        self.here, self.meter, self.total, self.warmup = here, meter, total, warmup
        self.distributed = here.processes or Distributed()
        self.device = self.distributed.device
        self.wrapped: nn.Module = parallel.parallelize(self.model, self.train, self.distributed)
        self.optimizer = optim.build_optimizer(self.model, self.train, fused=self.device.type != "mps")
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.average = optim.MovingAverage(named, self.train.ema) if self.train.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.train.precision == "fp16")
        self.parts = 1  # in which each batch is computed
        if self.train.accumulate == "auto":
            self.parts = here.parts
        self.skipped = self.overflows = 0
        self.rate = 0.0
        self.bad: dict[str, int] = {}  # unreadable samples by reason

    def state(self) -> dict[str, Any]:
        """Numbers for a checkpoint, the same on all ranks."""
        scaler = self.scaler.state_dict()
        return {"skipped": self.skipped, "overflows": self.overflows, "parts": self.parts, "scaler": scaler}

    def load(self, saved: dict[str, Any], same_world: bool) -> None:
        """Continue from `state`; parts are of a number of processes."""
        self.skipped, self.overflows = saved["skipped"], saved["overflows"]
        self.scaler.load_state_dict(saved["scaler"])
        if same_world and self.train.accumulate == "auto":
            self.parts = saved["parts"]

    def step(self, batches: Iterator[Batch], number: int, request: StopRequest) -> bool:
        """Take optimizer step `number` (from 0); returns whether any rank was asked to stop. A collective.

        Raises:
            DiffmaeError: the loss is no number, and no more steps may be skipped.
            torch.OutOfMemoryError: a single clip at a time does not fit, or `train.accumulate` is a number.
        """
        drawn = []
        for _ in range(self.train.micro_batches):
            with self.meter.waiting():
                drawn.append(next(batches))
            for reason, count in drawn[-1].bad.items():
                self.bad[reason] = self.bad.get(reason, 0) + count
        with self.meter.computing():
            generators = self._random_state()
            while True:
                try:
                    found = self._gradients(drawn)
                    break
                except RuntimeError as error:
                    if not out_of_memory(error) or not self._halve(max(len(batch.clips) for batch in drawn)):
                        raise
                self._begin_again(*generators)  # after the frames that held activations are gone
            self.scaler.unscale_(self.optimizer)
            norm = parallel.gradient_norm(self.model, self.train.clip_grad)
            overflow, bad, stop = self.distributed.any(*self._not_finite(found.loss, norm), bool(request))
            if bad or overflow:
                self._leave_out(number, drawn, found.loss, norm, curable=overflow and not bad)
            else:
                self._update(number)
                self.meter.add({**found.metrics, "loss": found.loss, "grad_norm": norm})
                self.meter.steps += 1
            self.optimizer.zero_grad(set_to_none=True)
        return stop

    # --- gradients --------------------------------------------------------------------------------------------------

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        """Of the generators that layers draw from."""
        return torch.get_rng_state(), None if self.device.type != "cuda" else torch.cuda.get_rng_state()

    def _begin_again(self, state: Tensor, cuda_state: Tensor | None) -> None:
        """Nothing of a step that ran out of memory stays."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(state)
        if cuda_state is not None:
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state(cuda_state)

    def _halve(self, clips: int) -> bool:
        """Twice the parts from now on; whether this step can be tried again.

        With several processes the others would wait for this one in the middle of an exchange: there the run ends.
        """
        if self.train.accumulate != "auto" or self.parts >= clips or self.distributed.world > 1:
            return False
        self.parts *= 2
        self.here.say(f"Out of memory: each batch is computed in {self.parts} parts from now on.")
        return True

    def _gradients(self, drawn: Sequence[Batch]) -> Gradients:
        loss = torch.zeros((), device=self.device)
        metrics: dict[str, Tensor] = {}
        pieces = [(part, share / len(drawn)) for batch in drawn for part, share in cut(batch, self.parts)]
        for count, (batch, share) in enumerate(pieces, 1):
            with parallel.synchronized(self.wrapped, count == len(pieces)):
                with autocast(self.device, self.train.precision):
                    output = self.task.loss(self.wrapped, batch, self.device)
                self.scaler.scale(output.loss * share).backward()
            loss += output.loss.detach() * share
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, 0) + value.detach() * share
        return Gradients(loss, metrics)

    # --- the step ---------------------------------------------------------------------------------------------------

    def _update(self, number: int) -> None:
        train = self.train
        samples = (number + 0.5) * train.batch_size  # at the middle of the step: neither end is wasted on 0
        peak, whole = optim.peak_learning_rate(train), self.total * train.batch_size
        self.rate = optim.learning_rate(samples, whole, self.warmup, peak, min(train.min_lr, peak))
        optim.set_learning_rate(self.optimizer, self.rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(number)

    def _not_finite(self, loss: Tensor, norm: Tensor) -> tuple[bool, bool]:
        """Whether the gradients are beyond fp16's range (and a smaller scale may cure it); whether a step is lost."""
        if bool(torch.isfinite(loss + norm)):
            return False, False
        curable = self.scaler.is_enabled() and self.scaler.get_scale() > 1 and bool(torch.isfinite(loss))
        return curable, not curable

    def _leave_out(self, number: int, batches: Sequence[Batch], loss: Tensor, norm: Tensor, curable: bool) -> None:
        """A loss or gradient that is no number: note the batch; stop unless some may be skipped.

        In fp16 gradients may overflow because the loss was scaled too far: the scale is halved and the step left out.
        """
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() / 2)
            self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})
        if curable:
            self.overflows += 1
            return
        path = self._note(number + 1, batches, loss, norm)
        self.skipped += 1
        if self.skipped > self.train.skip_nonfinite:
            raise DiffmaeError(
                f"Loss or gradient of step {number + 1} is not finite (loss {loss.item()}); the weights are as before "
                f"it, {path} names its clips: lower train.base_lr or set train.clip_grad, then run the command again."
            )
        self.here.say(f"Step {number + 1} is skipped: its loss or gradient is not finite ({path.name}).")

    def _note(self, step: int, batches: Sequence[Batch], loss: Tensor, norm: Tensor) -> Path:
        note = {
            "step": step,
            "rank": self.distributed.rank,
            "seed": self.seed,
            "loss": str(loss.item()),
            "grad_norm": str(norm.item()),
            "keys": [key for batch in batches for key in batch.keys],
            "seeds": [seed for batch in batches for seed in batch.seeds.tolist()],
        }
        path = self.here.directory / f"nonfinite-{step:08d}-rank{self.distributed.rank}.json"
        write_atomic(path, json.dumps(note, indent=1) + "\n")
        return path


def cut(batch: Batch, parts: int) -> Iterator[tuple[Batch, float]]:
    """A batch again and again, each time with another part of about equal size to compute, and the share in it."""
    if parts == 1:
        yield batch, 1.0
        return
    clips = len(batch.clips)
    size = math.ceil(clips / parts)
    for start in range(0, clips, size):
        yield replace(batch, part=slice(start, start + size)), min(size, clips - start) / clips


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or (a RuntimeError of the allocator) on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
