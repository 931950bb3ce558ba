"""What a training would take, from shapes alone: `--dry-run` of pretrain and finetune."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffmae_video.config import Settings, with_overrides
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE, Draw
from diffmae_video.models.patches import grid_shape
from diffmae_video.pipelines import console
from diffmae_video.training.footprint import Footprint, measure_step, shapes_only
from diffmae_video.training.hardware import choose_precision, peak_flops

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
    hours: float
    basis: str  # where the hours come from
    precision: str  # `bf16`, `fp16` or `fp32`, and why in brackets


def measure(settings: Settings, clips: int = 1) -> Footprint:
    """Cost of a pre-training step with `clips` clips in a micro-batch (without a teacher)."""
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


def make_plan(
    settings: Settings,
    samples: int,
    data_bytes: int,
    *,
    world: int,
    device: torch.device,
    throughput: float | None = None,
    cost: Footprint | None = None,
) -> Plan:
    """Predict a run.

    Args:
        samples: videos or images of the training split.
        data_bytes: their size on disk.
        world: processes.
        device: of each process.
        throughput: clips a second over all processes, where it is known.
        cost: of a step; that of pre-training without it.
    """
    train = settings.train
    precision, why = choose_precision(device) if train.precision == "auto" else (train.precision, "train.precision")
    settings = with_overrides(settings, train={"precision": precision})
    micro = max(1, train.batch_size // (world * train.accumulate))
    cost = cost or measure(settings, micro)
    clips = samples * settings.data.repeats
    steps = train.steps or max(1, round(train.epochs * clips / train.batch_size))
    if throughput:
        rate, basis = throughput, f"{throughput:g} clips/s as given"
    else:
        peak = peak_flops(str(device), precision)
        rate = world * peak * ASSUMED_UTILIZATION / cost.train_flops
        basis = f"{ASSUMED_UTILIZATION:.0%} of {peak / 1e12:.3g} TFLOP/s x {world} {device.type}, assumed"
    passes = steps * train.batch_size / clips
    return Plan(
        cost=cost,
        samples=samples,
        clips_per_epoch=clips,
        steps=steps,
        memory_gib=cost.memory(world if train.sharding == "fsdp" else 1) / 2**30,
        data_gib=passes * data_bytes / 2**30,
        hours=steps * train.batch_size / rate / 3600,
        basis=basis,
        precision=f"{precision} ({why})",
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
        ("data read", f"{plan.data_gib:.2f} GiB"),
        ("time", f"{console.format_seconds(plan.hours * 3600)} ({plan.basis})"),
        ("device hours", f"{plan.hours * world:.2f}"),
    ]
    console.table("Plan", ("what", "value"), rows)
