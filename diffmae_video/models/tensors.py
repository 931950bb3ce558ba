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


CONTAINERS = ("model", "model_state", "module", "state_dict", "state_dict_ema", "model_ema")
"""Keys under which training code keeps its weights, the usual first."""


def read_tensors(path: Path | str, key: str | None = None) -> Tensors:
    """Tensors of a .safetensors file or a PyTorch file, read so that no code in it can run.

    Args:
        path: the file, or a Hugging Face folder.
        key: table to take of a PyTorch file, for example `model_ema`; the first of CONTAINERS without it.

    Raises:
        UsageError: there is no such file, or no such table in it.
        DataError: the file holds more than tensors and plain values, or is damaged.
    """
    return read_tables(path, key)[0]


def read_tables(path: Path | str, key: str | None = None) -> tuple[Tensors, str | None, list[str]]:
    """`read_tensors`, the key of the table that was taken (None: the file is one), and the keys of other tables."""
    path = tensor_file(path)
    if path.suffix == ".safetensors":
        try:
            tensors = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} is not a safetensors file ({error}); download it again.") from error
        if key is not None:
            raise UsageError(f"--key {key}: {path} is one table of tensors; leave --key out.")
        return tensors, None, []
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # mae keeps its command line; it holds no code
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises what the bytes make it raise
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{path} was refused: it holds more than tensors, or is damaged ({reason}); ask its author for safetensors."
        ) from error
    taken, others = None, []
    while isinstance(content, dict) and not _is_table(content):
        tables = [name for name, value in content.items() if isinstance(value, dict) and _holds_tensors(value)]
        known = [name for name in CONTAINERS if name in tables]
        if taken is None:
            if key is not None and key not in tables:
                raise UsageError(
                    f"--key {key}: {path} holds the tables {', '.join(tables) or 'none'}; name one of them."
                )
            name = key or next(iter(known), None)
            others = [other for other in tables if other != name]
        else:
            name = next(iter(known), None)
        if name is None:
            break
        taken, content = taken or name, content[name]
    if not isinstance(content, dict) or not _is_table(content):
        raise DataError(f"{path} holds no table of tensors; give a checkpoint of a model.")
    if key is not None and taken is None:
        raise UsageError(f"--key {key}: {path} is one table of tensors; leave --key out.")
    return content, taken, others


def _is_table(content: dict) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _holds_tensors(content: dict) -> bool:
    """Whether a table of tensors stands here or one level below (a Lightning or DeepSpeed container)."""
    return _is_table(content) or any(isinstance(value, dict) and _is_table(value) for value in content.values())


def tensor_file(path: Path | str) -> Path:
    """The file that `read_tensors` reads for a path; Hugging Face's names are looked for in a folder.

    Raises:
        UsageError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise UsageError(f"{path} holds neither model.safetensors nor pytorch_model.bin: name the weights' file.")
        path = found[0]
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; give the weights you downloaded.")
    return path


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
