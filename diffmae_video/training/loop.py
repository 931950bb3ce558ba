"""The training loop: one for pre-training and fine-tuning, which differ in their `Task` alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffmae_video.config import Settings, with_overrides
from diffmae_video.errors import DiffmaeError, Stopped, UsageError
from diffmae_video.training import run
from diffmae_video.training.checkpoint import Found, fetch_from_mirror, newest_checkpoint, read_checkpoint
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.hardware import choose_precision, peak_memory
from diffmae_video.training.logging import read_metrics
from diffmae_video.training.signals import stop_on_signal
from diffmae_video.training.task import LossOutput, Task, TrainResult, micro_batch_size
from diffmae_video.training.trainer import Trainer

__all__ = ["LossOutput", "Task", "TrainResult", "micro_batch_size", "train"]


def train(
    task: Task,
    settings: Settings,
    stream_factory: Callable[[int, int], Any],
    directory: Path,
    *,
    kind: str = "pretrain",
    data_hash: str = "",
    resume: str = "auto",
    distributed: Distributed | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, str, str], Any] | None = None,
    report: Callable[[Path], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    flops_per_clip: float | None = None,
    profile: int = 0,
) -> TrainResult:
    """Train a task to its end, continuing what the directory holds of the same run.

    Args:
        task: model, loss, validation and pictures.
        settings: `train`, `data`, `seed`; all of them are saved and identify the run.
        stream_factory: (rank, world) -> an endless stream of batches with `state_dict` and `load_state_dict`.
        directory: of the run; new, or holding the same run.
        kind: `pretrain` or `finetune`, part of the run's identity.
        data_hash: of the manifest; a run is not continued on other data.
        resume: `auto` continues from the newest whole checkpoint here, `never` refuses a folder that holds a run, a
            path (run or checkpoint) starts from that checkpoint.
        distributed: the processes (`distributed.start`); one process on `device` without it.
        progress: (total, label, unit) -> context manager with `update(count, **figures)`.
        report: called on rank 0 with the directory whenever there is something new to show.
        say: one line for the user.
        flops_per_clip: forward and backward, for `mfu`.
        profile: trace this many steps with torch's profiler.

    Raises:
        Stopped: a signal came; the state is saved.
        DiffmaeError: non-finite loss, no memory, no disk space.
        UsageError: the directory holds another run or is in use.
    """
    distributed = distributed or Distributed(device=torch.device(device))
    directory = Path(directory)
    wanted = run.run_identity(settings, kind, data_hash)
    with contextlib.ExitStack() as stack:
        status = run.check_directory(directory, wanted) if distributed.main else None
        if distributed.main:
            stack.enter_context(run.lock(directory))
            status = run.check_directory(directory, wanted)
        status = distributed.broadcast(status)
        if status is not None and resume == "never":
            raise UsageError(f"--resume never: {directory} holds this run already; name another --out.")
        if status is not None and status.get("status") == "finished":
            say(f"{directory} holds this run, finished at step {status['step']}: nothing to do.")
            last = (read_metrics(directory / "metrics.jsonl") or [{}])[-1]
            return TrainResult(directory, status["step"], status["total"], last, status["step"], 0.0, True)
        found = _find(directory, resume, settings.train.mirror, distributed, say)
        settings = _settle_precision(settings, found.state["identity"] if found else None, distributed, say)
        wanted = run.run_identity(settings, kind, data_hash)
        if distributed.main:
            run.write_status(directory, identity=wanted, status="running", step=(status or {}).get("step", 0))
            run.write_settings(directory, settings)
        trainer = Trainer(task, settings, stream_factory, directory, distributed, say, report, flops_per_clip)
        request = stack.enter_context(stop_on_signal())
        stack.enter_context(trainer)
        try:
            trainer.start(found, wanted)
            return trainer.fit(request, progress, profile)
        except Stopped:
            trainer.mark("stopped")
            raise
        except torch.OutOfMemoryError as error:
            trainer.mark("failed")
            raise out_of_memory(settings, distributed, trainer.model) from error
        except Exception as error:
            trainer.mark("failed")
            if "can't allocate memory" in str(error):  # the CPU allocator's RuntimeError
                raise out_of_memory(settings, distributed, trainer.model) from error
            raise


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


def out_of_memory(settings: Settings, distributed: Distributed, model: nn.Module) -> DiffmaeError:
    """Which setting to change, and what that would need."""
    train = settings.train
    clips = train.batch_size // (distributed.world * train.accumulate)
    copies = 4 + (1 if train.ema else 0)  # weights, gradients, two moments, average
    shards = distributed.world if train.sharding == "fsdp" else 1
    fixed = copies * sum(p.numel() * p.element_size() for p in model.parameters()) / shards / 2**30
    activations = max(0.0, peak_memory(distributed.device) - fixed)
    half = f"train.accumulate={2 * train.accumulate} (about {activations / 2:.1f} GiB of them then)"
    if clips < 2:
        half = "train.grad_checkpointing=true, or a smaller model.preset"
    return DiffmaeError(
        f"Out of memory with {clips} clips a process at once: {fixed:.1f} GiB of weights, gradients and optimizer, "
        f"{activations:.1f} GiB beside them: add --set {half}; train.grad_checkpointing=true saves more."
    )


def _find(
    directory: Path, resume: str, mirror: str | None, distributed: Distributed, say: Callable[[str], None]
) -> Found | None:
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
    return None if told is None else Found(Path(told[0]), told[1])
