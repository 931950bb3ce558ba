"""Tables of tensors: read from files so that nothing in them runs, and held against the module they are for."""

from __future__ import annotations

import argparse
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from diffmae_video.errors import DataError, UsageError

Tensors = dict[str, Tensor]


def read_tensors(path: Path | str) -> Tensors:
    """Tensors of a .safetensors file or a PyTorch file, read so that no code in it can run.

    Raises:
        UsageError: there is no such file.
        DataError: the file holds more than tensors and plain values, or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise UsageError(f"{path} holds neither model.safetensors nor pytorch_model.bin: name the weights' file.")
        path = found[0]
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; give the weights you downloaded.")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} is not a safetensors file ({error}); download it again.") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # mae keeps its command line; it holds no code
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises what the bytes make it raise
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{path} was refused: it holds more than tensors, or is damaged ({reason}); ask its author for safetensors."
        ) from error
    for container in ("model", "model_state", "module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DataError(f"{path} holds no table of tensors; give a checkpoint of a model.")
    return content


def tensor_problems(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """What keeps tensors from fitting a module: one line each for the missing, the unexpected and the misshapen."""
    own = model.state_dict()
    return [
        *(f"missing {name} {(*own[name].shape,)}" for name in own if name not in tensors),
        *(f"unexpected {name} {(*tensors[name].shape,)}" for name in tensors if name not in own),
        *(
            f"misshapen {name} {(*tensors[name].shape,)} instead of {(*own[name].shape,)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ),
    ]
