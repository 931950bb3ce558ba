"""What a training would take, from shapes alone: `--dry-run` of pretrain and finetune."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffmae_video.config import Settings, with_overrides
from diffmae_video.errors import UsageError
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE, Draw
from diffmae_video.models.patches import grid_shape
from diffmae_video.pipelines import console
from diffmae_video.pipelines.batch_fit import memory_complaint
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.footprint import Footprint, fit, measure_step, shapes_only
from diffmae_video.training.hardware import choose_precision, free_memory, peak_flops, resolve_precision

ASSUMED_UTILIZATION = 0.4  # of peak; what a plain ViT reaches with SDPA in bf16


@dataclass(frozen=True)
class Plan:
    """A training before it is run."""

    cost: Footprint
    samples: int  # videos or images of the training split
    clips_per_epoch: int
    steps: int
    memory_gib: float  # a process
    data_gib: float  # read over the whole run
    hours: float | None  # None where nothing is known of the device
    basis: str  # where the hours come from
    precision: str  # `bf16`, `fp16` or `fp32`, and why in brackets
    micro_batch: int  # clips of one process at once
    parts: int  # forward and backward passes an optimizer step takes in one process
    fits: str  # what was compared with what
    given_gib: float  # memory that each process has


def measure(settings: Settings, clips: int = 1) -> Footprint:
    """Cost of a pre-training step with `clips` clips in a micro-batch (without a teacher)."""
    parts = settings.model_dump_json(include={"model", "diffusion", "mask", "train"})
    return _measure(parts, clips)


@functools.lru_cache(maxsize=256)
def _measure(parts: str, clips: int) -> Footprint:
    """Of the parts of settings that it depends on, as JSON: seconds for a large model, and plans ask again."""
    settings = Settings.model_validate_json(parts)
    model_settings = settings.model.model_copy(update={"teacher": None})
    frames, tubelet, patch = model_settings.frames, model_settings.tubelet, model_settings.patch
    shape = grid_shape(frames, *model_settings.size, tubelet, patch)
    mask = make_mask(settings.mask.kind, settings.mask.ratio, shape, [0])
    hidden = math.prod(shape) if model_settings.objective == "ddpm" else mask.masked.shape[1]
    kept = math.ceil(hidden * model_settings.loss_tokens)
    with shapes_only():
        model = DiffMAE(model_settings, settings.diffusion).train()
        pixels = torch.empty(clips, 3, frames, *model_settings.size)  # (B, C, T, H, W)
        masks = mask.repeat_interleave(clips)
        draw = Draw(
            timestep=torch.zeros(clips, dtype=torch.long),
            noise=torch.empty(clips, 0 if model_settings.objective == "mae" else kept, model.space.noised),
            keep=torch.zeros(clips, kept, dtype=torch.long) if kept < hidden else None,
        )
        return measure_step(model, lambda: model(pixels, masks, draw).loss, settings.train, clips)


def fit_batch(
    settings: Settings, world: int, memory: float, measured: Callable[[Settings, int], Footprint] = measure
) -> tuple[int, Footprint]:
    """In how many parts each of `world` processes must compute a batch, and what a step then costs.

    Where `train.accumulate` is a number it is not changed: one part.

    Args:
        memory: bytes that each process has.
        measured: cost of a step with so many clips in a micro-batch.
    """
    train = settings.train
    clips = max(1, train.batch_size // (world * train.micro_batches))
    if train.accumulate != "auto":
        return 1, measured(settings, clips)
    return fit(
        lambda size, parts: measured(with_overrides(settings, train={"accumulate": parts}), size),
        clips,
        memory,
        world if train.sharding == "fsdp" else 1,
    )


def settle_parts(
    settings: Settings,
    processes: Distributed,
    measured: Callable[[Settings, int], Footprint] = measure,
    *,
    free_model: bool = True,
) -> int:
    """`fit_batch` for a training that is about to begin: rank 0 looks at its device, all take its answer.

    Raises:
        UsageError: not even one clip at once fits. A number as `train.accumulate` is the user's word: a note tells.
    """
    parts = 1
    if processes.main:
        precision = resolve_precision(settings.train.precision, processes.device)
        memory = free_memory(processes.device, processes.local_world)
        settled = with_overrides(settings, train={"precision": precision})
        parts, cost = fit_batch(settled, processes.world, memory, measured)
        complaint = memory_complaint(settled, processes.world, memory, cost, measured, free_model=free_model)
        if complaint and settings.train.accumulate == "auto":
            raise UsageError(complaint)
        if complaint:
            console.say(f"Note: {complaint}")
        if parts > 1:
            clips = math.ceil(settings.train.batch_size / processes.world / parts)
            shown = f"{cost.memory() / 2**30:.1f} GiB of {memory / 2**30:.1f}"
            console.say(f"Micro-batches: {parts} of {clips} clips for each step and process ({shown}).")
    return int(processes.broadcast(parts))


def make_plan(
    settings: Settings,
    samples: int,
    data_bytes: int,
    *,
    world: int,
    device: torch.device,
    throughput: float | None = None,
    memory: float | None = None,
    measured: Callable[[Settings, int], Footprint] = measure,
) -> Plan:
    """Predict a run.

    Args:
        samples: videos or images of the training split.
        data_bytes: their size on disk.
        world: processes.
        device: of each process.
        throughput: clips a second over all processes, where it is known.
        memory: bytes that each process has; what is free here without it.
        measured: cost of a step with so many clips in a micro-batch.
    """
    train = settings.train
    precision, why = choose_precision(device) if train.precision == "auto" else (train.precision, "train.precision")
    settings = with_overrides(settings, train={"precision": precision})
    memory = free_memory(device, world) if memory is None else memory
    parts, cost = fit_batch(settings, world, memory, measured)
    micro = math.ceil(train.batch_size / (world * train.micro_batches) / parts)
    clips = samples * settings.data.repeats
    steps = train.steps or max(1, round(train.epochs * clips / train.batch_size))
    if throughput:
        rate, basis = throughput, f"{throughput:g} clips/s as given"
    elif device.type == "cuda" and not torch.cuda.is_available():
        rate, basis = None, "unknown for a device that is not here: give --throughput"
    else:
        peak = peak_flops(str(device), precision)
        rate = world * peak * ASSUMED_UTILIZATION / cost.train_flops
        basis = f"{ASSUMED_UTILIZATION:.0%} of {peak / 1e12:.3g} TFLOP/s x {world} {device.type}, assumed"
    shards = world if train.sharding == "fsdp" else 1
    passes = steps * train.batch_size / clips
    return Plan(
        cost=cost,
        samples=samples,
        clips_per_epoch=clips,
        steps=steps,
        memory_gib=cost.memory(shards) / 2**30,
        data_gib=passes * data_bytes / 2**30,
        hours=steps * train.batch_size / rate / 3600 if rate else None,
        basis=basis,
        precision=f"{precision} ({why})",
        micro_batch=micro,
        parts=parts * train.micro_batches,
        given_gib=memory / 2**30,
        fits=f"{cost.memory(shards) / 2**30:.2f} of {memory / 2**30:.2f} GiB",
    )


def print_plan(plan: Plan, world: int) -> None:
    """Show a plan as a table."""
    cost = plan.cost
    rows = [
        ("parameters", f"{cost.parameters / 1e6:.1f} M (encoder {cost.encoder_parameters / 1e6:.1f} M)"),
        ("FLOPs a clip, forward", f"{cost.forward_flops / 1e9:.1f} G"),
        ("FLOPs a clip, training", f"{cost.train_flops / 1e9:.1f} G"),
        ("samples", f"{plan.samples} ({plan.clips_per_epoch} clips an epoch)"),
        ("steps", str(plan.steps)),
        ("precision", plan.precision),
        ("memory a process", f"{plan.memory_gib:.2f} GiB (tensors, allocator; without data workers)"),
        ("micro-batch", f"{plan.micro_batch} clips, {plan.parts} for each step and process ({plan.fits})"),
        ("data read", f"{plan.data_gib:.2f} GiB"),
        ("time", plan.basis if plan.hours is None else f"{console.format_seconds(plan.hours * 3600)} ({plan.basis})"),
        ("device hours", "unknown" if plan.hours is None else f"{plan.hours * world:.2f}"),
    ]
    console.table("Plan", ("what", "value"), rows)


def check_plan(
    plan: Plan,
    settings: Settings,
    world: int,
    measured: Callable[[Settings, int], Footprint] = measure,
    *,
    free_model: bool = True,
) -> None:
    """Refuse a plan that does not fit the memory, as the training itself would.

    Raises:
        UsageError: with settings that fit.
    """
    settled = with_overrides(settings, train={"precision": plan.precision.partition(" ")[0]})
    memory = plan.given_gib * 2**30
    complaint = memory_complaint(settled, world, memory, plan.cost, measured, free_model=free_model)
    if complaint:
        raise UsageError(complaint)
