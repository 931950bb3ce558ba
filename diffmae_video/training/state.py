"""What a checkpoint holds: every tensor of a run under one flat name."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from diffmae_video.training.optim import MovingAverage


def run_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None) -> dict[str, Tensor]:
    """The tensors of a run, not copied: `model.NAME`, `optimizer.NAME.SLOT`, `ema.NAME`. A collective under FSDP."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, slots in _optimizer_state(model, optimizer)["state"].items():
        tensors |= {f"optimizer.{name}.{slot}": value for slot, value in slots.items() if isinstance(value, Tensor)}
    if average is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in average.average.items()}
    return tensors


def optimizer_numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer counts outside tensors (some of timm's count their steps so): JSON-like."""
    state = _optimizer_state(model, optimizer)
    slots = {
        name: {slot: value for slot, value in values.items() if not isinstance(value, Tensor)}
        for name, values in state["state"].items()
    }
    steps = [float(group["step"]) if "step" in group else None for group in state["param_groups"]]
    return {"state": {name: values for name, values in slots.items() if values}, "steps": steps}


def set_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: dict[str, Any]) -> None:
    """Make the optimizer continue from its tensors as they were loaded, and from `optimizer_numbers`."""
    state = _optimizer_state(model, optimizer)
    for name, values in numbers["state"].items():
        state["state"][name] |= values
    for group, step in zip(state["param_groups"], numbers["steps"], strict=True):
        if step is not None:
            group["step"] = torch.full_like(group["step"], step) if isinstance(group["step"], Tensor) else int(step)
    set_optimizer_state_dict(model, optimizer, state)


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by the names of parameters; made now (zeros) where no step was taken yet."""
    fresh = not optimizer.state
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)  # type: ignore[assignment]
    if fresh:  # PyTorch makes the state by a step without gradients; that step does not count
        for slots in (*state["state"].values(), *state["param_groups"], *optimizer.param_groups):
            if isinstance(slots.get("step"), Tensor):
                slots["step"].zero_()
            elif "step" in slots:
                slots["step"] = 0
        for slots in optimizer.state.values():
            if isinstance(slots.get("step"), int | float):
                slots["step"] = 0
    return state


def random_tensors(rank: int, device: torch.device) -> dict[str, Tensor]:
    """The global generators of this rank as tensors, `rng.RANK.LIBRARY`.

    Masks, noise and augmentation never use them; dropout and stochastic depth do.
    """
    legacy: Any = np.random.get_state()  # noqa: NPY002 - third parties may draw from it
    kind, keys, position, has_gauss, gauss = legacy
    python = random.getstate()
    tensors = {  # all of PyTorch, NumPy and Python, for code of others that draws from them
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.concatenate([keys.astype(np.int64), [position, has_gauss]])),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor(python[1], dtype=torch.int64),
        "python_gauss": torch.tensor([python[2] is not None, python[2] or 0.0], dtype=torch.float64),
    }
    assert kind == "MT19937"
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return {f"rng.{rank}.{name}": tensor for name, tensor in tensors.items()}


def set_random(tensors: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """Put the global generators of this rank back to what `random_tensors` saw."""
    values = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"rng.{rank}.")}
    torch.set_rng_state(values["torch"])
    keys = values["numpy"].numpy()
    numpy_state: tuple[Any, ...] = (
        "MT19937",
        keys[:-2].astype(np.uint32),
        int(keys[-2]),
        int(keys[-1]),
        float(values["numpy_gauss"]),
    )
    np.random.set_state(numpy_state)  # noqa: NPY002
    has_gauss, gauss = values["python_gauss"].tolist()
    random.setstate((3, tuple(values["python"].tolist()), gauss if has_gauss else None))
    if device.type == "cuda" and "cuda" in values:
        torch.cuda.set_rng_state(values["cuda"], device)


def seed_random(seed: int, rank: int) -> None:
    """Start the global generators of this rank from the run's seed."""
    mixed = (seed * 1_000_003 + rank) % 2**31
    torch.manual_seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002
    random.seed(mixed)
