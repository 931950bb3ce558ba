"""What a training would take, from shapes alone: `--dry-run` of pretrain and finetune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmae_video.config import Settings, TrainSettings
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import grid_shape
from diffmae_video.pipelines import console
from diffmae_video.training.hardware import peak_flops

ASSUMED_UTILIZATION = 0.4  # of peak; what a plain ViT reaches with SDPA in bf16


@dataclass(frozen=True)
class Cost:
    """Size of a model and of one training step of one clip."""

    parameters: int
    encoder_parameters: int
    forward_flops: float  # a clip
    train_flops: float  # a clip, forward and backward
    activation_bytes: float  # a clip, kept for the backward pass


@dataclass(frozen=True)
class Plan:
    """A training before it is run."""

    cost: Cost
    samples: int  # videos or images of the training split
    clips_per_epoch: int
    steps: int
    memory_gib: float  # a process
    data_gib: float  # read over the whole run
    hours: float
    basis: str  # where the hours come from


def measure(settings: Settings) -> Cost:
    """Cost of pre-training on one clip, on the meta device."""
    model_settings = settings.model.model_copy(update={"teacher": None})
    with torch.device("meta"):
        model = DiffMAE(model_settings, settings.diffusion).train().to("meta")  # the schedule is made on the CPU
    shape = grid_shape(model_settings.frames, *model_settings.size, model.tubelet, model.patch)
    mask = make_mask(settings.mask.kind, settings.mask.ratio, shape, [0])
    draw = model.draw([0], mask).to("meta")
    mask = mask.to("meta")
    clips = torch.empty(1, 3, model_settings.frames, *model_settings.size, device="meta")  # (B, C, T, H, W)
    return measure_step(model, lambda: model(clips, mask, draw).loss, settings.train)


def measure_step(model: nn.Module, loss: Callable[[], Tensor], train: TrainSettings) -> Cost:
    """Count parameters, FLOPs (torch.utils.flop_counter) and saved activations of one training step.

    Args:
        model: with an `encoder`; on the meta device nothing is computed.
        loss: the forward pass on one clip.
        train: precision and gradient checkpointing.
    """
    from torch.utils.flop_counter import FlopCounterMode

    saved: dict[int, int] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # alive, so that no other storage takes its address
        return tensor

    kept: list[torch.Tensor] = []
    half = train.precision == "bf16"
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        value = loss()
        forward = counter.get_total_flops()
        value.backward()
    activations = sum(saved.values()) * (0.6 if half else 1.0)  # matrix products keep bf16, norms and losses fp32
    if train.grad_checkpointing:
        activations /= 6
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        encoder_parameters=sum(parameter.numel() for parameter in model.encoder.parameters()),
        forward_flops=forward,
        train_flops=counter.get_total_flops(),
        activation_bytes=activations,
    )


def make_plan(
    settings: Settings,
    samples: int,
    data_bytes: int,
    *,
    world: int,
    device: torch.device,
    throughput: float | None = None,
    cost: Cost | None = None,
) -> Plan:
    """Predict a run.

    Args:
        samples: videos or images of the training split.
        data_bytes: their size on disk.
        world: processes.
        device: of each process.
        throughput: clips a second over all processes, where it is known.
        cost: of one clip; that of pre-training without it.
    """
    train = settings.train
    cost = cost or measure(settings)
    clips = samples * settings.data.repeats
    steps = train.steps or max(1, round(train.epochs * clips / train.batch_size))
    shards = world if train.sharding == "fsdp" else 1
    states = 4 + (1 if train.ema else 0)  # weight, gradient, two moments, average
    micro = train.batch_size / (world * train.accumulate)
    memory = (cost.parameters * 4 * states / shards + micro * cost.activation_bytes) / 2**30
    if throughput:
        rate, basis = throughput, f"{throughput:g} clips/s as given"
    else:
        peak = peak_flops(str(device), train.precision)
        rate = world * peak * ASSUMED_UTILIZATION / cost.train_flops
        basis = f"{ASSUMED_UTILIZATION:.0%} of {peak / 1e12:.3g} TFLOP/s x {world} {device.type}, assumed"
    passes = steps * train.batch_size / clips
    return Plan(
        cost=cost,
        samples=samples,
        clips_per_epoch=clips,
        steps=steps,
        memory_gib=memory,
        data_gib=passes * data_bytes / 2**30,
        hours=steps * train.batch_size / rate / 3600,
        basis=basis,
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
        ("memory a process", f"{plan.memory_gib:.2f} GiB (estimate)"),
        ("data read", f"{plan.data_gib:.2f} GiB"),
        ("time", f"{console.format_seconds(plan.hours * 3600)} ({plan.basis})"),
        ("device hours", f"{plan.hours * world:.2f}"),
    ]
    console.table("Plan", ("what", "value"), rows)
