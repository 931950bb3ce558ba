"""The training loop: one for pre-training and fine-tuning, which differ in their `Task` alone."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffmae_video.config import Settings, settings_toml, with_overrides
from diffmae_video.errors import DiffmaeError, Stopped, UsageError
from diffmae_video.files import write_atomic
from diffmae_video.training.checkpoint import Checkpoint, fetch_from_mirror, newest_checkpoint, read_checkpoint
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.hardware import choose_precision, peak_memory
from diffmae_video.training.logging import read_metrics
from diffmae_video.training.meter import profile_steps
from diffmae_video.training.run import Run, identity_difference, write_status
from diffmae_video.training.signals import stop_on_signal
from diffmae_video.training.stepper import out_of_memory
from diffmae_video.training.task import Task, TrainResult
from diffmae_video.training.trainer import Trainer


def train(task: Task, settings: Settings, here: Run) -> TrainResult:
    """Train a task to its end, continuing what the run's directory holds. A collective.

    Args:
        task: model, loss, batches, validation and pictures.
        settings: `train`, `data`, `seed`; all of them are saved.
        here: the run; its directory is held by the caller (`training.run.claim`).

    Raises:
        Stopped: a signal came; the state is saved.
        DiffmaeError: non-finite loss, no memory, no disk space.
        UsageError: the directory holds this run and `resume` is `never`, or there is no checkpoint to start from.
    """
    distributed, directory, earlier = here.processes or Distributed(), here.directory, here.earlier
    if earlier and here.resume == "never":
        raise UsageError(f"--resume never: {directory} holds this run already; name another --out.")
    if earlier.get("status") == "finished" and not identity_difference(earlier["identity"], here.identity):
        here.say(f"{directory} holds this run, finished at step {earlier['step']}: nothing to do.")
        last = (read_metrics(directory / "metrics.jsonl") or [{}])[-1]
        return TrainResult(directory, earlier["step"], earlier["total"], last, earlier["step"], 0.0, True)
    found = _find(directory, here.resume, settings.train.mirror, distributed, here.say)
    settings = _settle_precision(settings, found.state["identity"] if found else None, distributed, here.say)
    table = {**here.identity["settings.train"], "precision": settings.train.precision}
    here = replace(here, identity={**here.identity, "settings.train": table})
    if distributed.main:
        write_atomic(directory / "config.toml", settings_toml(settings))
        write_status(directory, identity=here.identity)
    began = time.perf_counter()
    trainer = Trainer(task, settings, here, distributed)
    with stop_on_signal() as request, trainer:
        try:
            trainer.start(found)
            batches = trainer.batches()
            trainer.settle()
            with _progress(here, trainer) as bar, _profiler(trainer, settings.train.profile) as tick:
                while trainer.step < trainer.total:
                    stop = trainer.stepper.step(batches, trainer.step, request)
                    trainer.step += 1
                    tick()
                    trainer.at_intervals(stop)
                    bar(1)
                    if stop:
                        trainer.files.wait()
                        raise Stopped(
                            f"Stopped by {request.name or 'a signal'} at step {trainer.step} of {trainer.total} and "
                            f"saved in {directory}; run the same command again to continue."
                        )
            trainer.finish()
        except Stopped:
            trainer.mark("stopped")
            raise
        except Exception as error:
            trainer.mark("failed")
            if out_of_memory(error):
                raise _memory_error(settings, trainer) from error
            raise
    seconds = time.perf_counter() - began
    return TrainResult(directory, trainer.step, trainer.total, trainer.last, trainer.resumed_from, seconds)


def _profiler(trainer: Trainer, steps: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
    return profile_steps(steps, trainer.directory, trainer.device, trainer.say, trainer.meter)


@contextlib.contextmanager
def _progress(here: Run, trainer: Trainer) -> Iterator[Callable[[int], None]]:
    """Counts steps on the bar of rank 0; those of an earlier try are counted already."""
    if here.progress is None or not here.main:
        yield lambda count: None
        return
    with here.progress(trainer.total, here.identity["kind"], "steps") as bar:

        def advance(count: int) -> None:
            bar.update(count, **trainer.figures())

        if trainer.step:
            bar.update(trainer.step)
        yield advance


def _settle_precision(
    settings: Settings, before: dict[str, Any] | None, distributed: Distributed, say: Callable[[str], None]
) -> Settings:
    """`train.precision = "auto"` settled: as the run began, where it is continued, else by rank 0's device."""
    precision = settings.train.precision
    if precision != "auto":
        return settings
    if before is not None:
        precision, why = before["settings.train"]["precision"], "as this run began"
    else:
        precision, why = choose_precision(distributed.device)
    precision, why = distributed.broadcast([precision, why])
    say(f"Precision: {precision} ({why}).")
    return with_overrides(settings, train={"precision": precision})


def _memory_error(settings: Settings, trainer: Trainer) -> DiffmaeError:
    """Which setting to change, and what that would need."""
    train, world, parts = settings.train, trainer.distributed.world, trainer.stepper.parts
    size = train.batch_size // (world * train.micro_batches)  # clips of a batch of one process
    clips = math.ceil(size / parts)
    copies = 4 + (1 if train.ema else 0)  # weights, gradients, two moments, average
    shards = world if train.sharding == "fsdp" else 1
    fixed = copies * sum(p.numel() * p.element_size() for p in trainer.model.parameters()) / shards / 2**30
    activations = max(0.0, peak_memory(trainer.device) - fixed)
    half = f"train.accumulate={2 * parts * train.micro_batches} (about {activations / 2:.1f} GiB of them then)"
    if clips < 2:
        half = "train.grad_checkpointing=true, or a smaller model.preset"
    return DiffmaeError(
        f"Out of memory with {clips} clips a process at once: {fixed:.1f} GiB of weights, gradients and optimizer, "
        f"{activations:.1f} GiB beside them: add --set {half}; train.grad_checkpointing=true saves more."
    )


def _find(
    directory: Path, resume: str, mirror: str | None, distributed: Distributed, say: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint to continue from: rank 0 looks, all read the same one."""
    found = None
    if distributed.main:
        if resume not in ("auto", "never"):
            path = Path(resume)
            if not path.is_dir():
                raise UsageError(f"--resume {resume}: there is no such folder; give a run or one of its checkpoints.")
            found = read_checkpoint(path) if (path / "state.json").exists() else None
            found = found or newest_checkpoint(path / "checkpoints", say)
            if found is None:
                raise UsageError(f"--resume {resume}: no whole checkpoint there; give a run or one of its checkpoints.")
        else:
            found = newest_checkpoint(directory / "checkpoints", say)
            if found is None and mirror:
                found = fetch_from_mirror(mirror, directory / "checkpoints", say)
    told = distributed.broadcast(None if found is None else [str(found.path), found.state])
    return None if told is None else Checkpoint(Path(told[0]), told[1])
