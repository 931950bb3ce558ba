"""What one training step costs, found out without computing it: parameters, FLOPs, and memory at its peak.

The step really runs, forward, backward and optimizer, on fake tensors that have shapes and types but no data. So
autocast, activation checkpointing, accumulation and whatever a model does are counted as they are, in about a second.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from diffmae_video.config import TrainSettings
from diffmae_video.training.hardware import autocast
from diffmae_video.training.optim import MovingAverage, build_optimizer
from diffmae_video.training.state import run_tensors

# What allocators, and the libraries behind matrix products, take beyond the tensors: with these two the resident memory
# of real steps on a CPU is met within 10% (benchmarks/training.py memory)
ALLOCATOR_FACTOR = 1.1
LIBRARY_BYTES = 50 * 2**20
USABLE_SHARE = 0.9  # of the memory: the rest is for fragments and other kernels


@dataclass(frozen=True)
class Footprint:
    """Size of a model and of one training step."""

    parameters: int
    encoder_parameters: int
    forward_flops: float  # a clip
    train_flops: float  # a clip, forward and backward
    state_bytes: int  # weights, AdamW's moments, moving average
    gradient_bytes: int
    peak_bytes: int  # the most that tensors hold at once in a step of this many clips

    def memory(self, shards: int = 1) -> float:
        """Bytes that a training process needs; with `shards` processes sharing the model's state (FSDP)."""
        tensors = self.peak_bytes - (self.state_bytes + self.gradient_bytes) * (1 - 1 / shards)
        return ALLOCATOR_FACTOR * tensors + LIBRARY_BYTES


def fit(measure: Callable[[int, int], Footprint], clips: int, memory: float, shards: int = 1) -> tuple[int, Footprint]:
    """In how many parts a batch must be computed to fit into memory.

    Args:
        measure: (clips at once, parts) -> cost of a step.
        clips: of the batch in one process.
        memory: bytes that are there.
        shards: processes that share the model's state (FSDP).

    Returns:
        Parts, a power of two (as many as clips where nothing fits), and the cost of a step in them.
    """
    parts, cost = 1, measure(clips, 1)
    while cost.memory(shards) > USABLE_SHARE * memory and parts < clips:
        parts *= 2
        cost = measure(math.ceil(clips / parts), parts)
    return parts, cost


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors made inside have no data. Neither the default device nor the random state is touched.

    A dispatch mode rather than `torch.device("meta")`: that one rewrites the calls of a list of factory functions made
    at its first use, and lets pass what somebody else had replaced just then (transformers replaces `torch.linspace`
    while it loads a model), for the rest of the process.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def measure_step(model: Any, loss: Callable[[], Tensor], train: TrainSettings, clips: int = 1) -> Footprint:
    """Count one optimizer step; call it within `shapes_only`.

    Args:
        model: in training mode.
        loss: forward pass on a micro-batch.
        train: precision, accumulation, checkpointing, optimizer.
        clips: of the micro-batch; the FLOPs are divided by it.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if train.grad_checkpointing and hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(train.grad_checkpointing)
    optimizer = build_optimizer(model, train)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    average = MovingAverage(trained, train.ema) if train.ema else None
    live = _LiveBytes()
    for tensor in [*run_tensors(model, optimizer, average).values(), *model.buffers()]:
        live.watch(tensor)
    states, forward, both = live.now, 0, 0
    with live, FlopCounterMode(display=False, custom_mapping=_attention_flops()) as counter:
        for micro in range(min(train.micro_batches, 2)):  # the second one meets the gradients of the first
            with autocast(torch.device("cpu"), train.precision):
                value = loss()
            if micro == 0:
                forward = counter.get_total_flops()
            value.backward()
            if micro == 0:
                both = counter.get_total_flops()
            del value
        gradients = sum(p.grad.untyped_storage().nbytes() for _, p in trained if p.grad is not None)
        optimizer.step()
        if average is not None:
            average.update(0)
    whole, encoder = (
        sum(parameter.numel() for parameter in part.parameters()) for part in (model, getattr(model, "encoder", model))
    )
    return Footprint(whole, encoder, forward / clips, both / clips, states, gradients, live.peak)


def _attention_flops() -> dict[Any, Callable[..., int]]:
    """Formulas for attention kernels that torch's table of FLOPs lacks. Backward is twice forward, as everywhere in the
    table: the scores that a kernel computes again are no useful work."""
    from torch.utils.flop_counter import sdpa_flop_count

    def by_head(q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **more: Any) -> int:  # (B, heads, L, d)
        return sdpa_flop_count(q, k, v)

    def by_token(q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **more: Any) -> int:  # (B, L, heads, d)
        return sdpa_flop_count(*((x[0], x[2], x[1], x[3]) for x in (q, k, v)))

    aten, own = torch.ops.aten, torch.ops.diffmae_video
    formulas = {}
    for name, space, forward in (
        ("_scaled_dot_product_flash_attention_for_cpu", aten, by_head),
        ("blocked_attention", own, by_token),
    ):
        if hasattr(space, name):
            formulas[getattr(space, name)] = forward
            backward = getattr(space, f"{name}_backward")
            formulas[backward] = lambda gradient, *shapes, forward=forward, **more: 2 * forward(*shapes, **more)
    return formulas


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that exist, and the most there were, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def watch(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage until it is freed; a storage counts once, whatever views it has."""
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage.nbytes())
        return tensor

    def _freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self.watch, func(*args, **(kwargs or {})))
