"""What a checkpoint holds: every tensor of a run under one flat name."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffmae_video.training.optim import MovingAverage

_SLOTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of one parameter


def run_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None) -> dict[str, Tensor]:
    """The tensors of a run, not copied: `model.NAME`, `optimizer.NAME.SLOT`, `ema.NAME`.

    AdamW makes its state at the first step; here it is made at once (zeros, as AdamW would), so that a checkpoint can
    be read into it.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            state = optimizer.state[parameter]
            if "step" not in state:
                place = parameter.device if group.get("fused") else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=place)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            for slot in _SLOTS:
                tensors[f"optimizer.{names[parameter]}.{slot}"] = state[slot]
    if average is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in average.average.items()}
    return tensors


def random_tensors(rank: int, device: torch.device) -> dict[str, Tensor]:
    """The global generators of this rank as tensors, `rng.RANK.LIBRARY`.

    Masks, noise and augmentation never use them; dropout and stochastic depth do.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - third parties may draw from it
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
