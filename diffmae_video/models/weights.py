"""Saved models: `weights.safetensors` beside `model.json`, which says how to build the module they fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from pydantic import ValidationError
from torch import Tensor, nn

from diffmae_video.config import DiffusionSettings, ModelSettings
from diffmae_video.errors import DataError, UsageError
from diffmae_video.files import sha256_of, write_atomic
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.presets import resolve
from diffmae_video.models.tensors import tensor_problems

FORMAT = 1
_ODD = (AttributeError, KeyError, TypeError, ValueError, AssertionError, OSError, OverflowError, RuntimeError)
"""What odd values in a model.json make the code that builds a module raise."""
WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"


def save_model(
    model: DiffMAE | Classifier,
    directory: Path | str,
    info: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
) -> Path:
    """Write weights.safetensors and model.json into `directory`, each whole or not at all.

    Args:
        info: free facts for whoever uses the model: classes, data set, recipe, metrics. `model.info` by default.
        state: tensors to write in place of the model's own (an average of them, a copy from an earlier moment).

    Returns:
        The weights' path.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    description: dict[str, Any] = {
        "format": FORMAT,
        "kind": "classifier" if isinstance(model, Classifier) else "diffmae",
        "model": model.settings.model_dump(mode="json"),
    }
    if isinstance(model, Classifier):
        description["classifier"] = {
            "num_classes": model.num_classes,
            "pool": model.pool,
            "dropout": model.dropout,
            "head_init": model.head_init,
        }
    else:
        description["diffusion"] = model.diffusion.model_dump(mode="json")
    description["info"] = {**model.info, **(info or {}), "kind": description["kind"]}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in (state or model.state_dict()).items()}
    write_atomic(directory / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_atomic(directory / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    return directory / WEIGHTS


def saved_step(directory: Path) -> int | None:
    """The optimizer step that the weights in a run's folder are of; None without weights, or where nothing says so."""
    try:
        return json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))["info"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def saved_sha256(path: Path | str) -> str:
    """SHA-256 of the weights that `load_model` reads for this path: the same weights, the same digest."""
    return sha256_of(_directory(path) / WEIGHTS)


def _directory(path: Path | str) -> Path:
    path = Path(path)
    return path if path.is_dir() else path.parent


def load_model(path: Path | str) -> DiffMAE | Classifier:
    """Build the model that `save_model` wrote; its `info` dict comes back as an attribute.

    Args:
        path: a run's or export's directory, or a file in it.

    Raises:
        UsageError: there is no saved model.
        DataError: the files are damaged, or do not fit each other.
    """
    directory = _directory(path)
    for name in (DESCRIPTION, WEIGHTS):
        if not (directory / name).is_file():
            raise UsageError(
                f"{path} holds no {name}: give the folder of a run, an export or an import (`diffmae import` "
                "turns other projects' files into one)."
            )
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] > FORMAT:
            raise DataError(f"{directory / DESCRIPTION} was written by a newer version; update diffmae-video.")
        _check_size(description, directory / WEIGHTS)
        model = build_model(description)
        tensors = safetensors.torch.load_file(directory / WEIGHTS)
    except ValidationError as error:
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise DataError(f"{directory / DESCRIPTION} is not valid: {key}: {message}; copy or save it again.") from error
    except (*_ODD, safetensors.SafetensorError) as error:
        raise DataError(f"{directory} cannot be read as a model ({error}); copy or save it again.") from error
    check_tensors(model, tensors, str(directory / WEIGHTS))
    model.load_state_dict(tensors)
    return model


def _check_size(description: dict[str, Any], weights: Path) -> None:
    """Refuse a description of more parameters than the weights hold, before the module takes memory.

    Counts the matrices alone: what an honest model surely has.

    Raises:
        ValueError: it describes more.
    """
    model = ModelSettings.model_validate(description["model"])
    size, patch = resolve(model), 3 * model.tubelet * model.patch**2
    described = size.depth * int(size.width**2 * (4 + 2 * model.mlp_ratio)) + size.width * patch
    if description["kind"] == "classifier":
        described += int(description["classifier"]["num_classes"]) * size.width
    elif description["kind"] == "diffmae":
        described += model.decoder_depth * model.decoder_width**2 * 4
    else:
        return  # said where the module is built
    with safetensors.safe_open(weights, framework="pt") as file:
        held = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    if described > held:
        raise ValueError(f"{DESCRIPTION} describes at least {described} parameters, {WEIGHTS} holds {held}")


def build_model(description: dict[str, Any]) -> DiffMAE | Classifier:
    """The module a model.json describes, with its initial weights."""
    settings = ModelSettings.model_validate(description["model"])
    if description["kind"] == "classifier":
        model: DiffMAE | Classifier = Classifier(Encoder(settings), **description["classifier"])
    elif description["kind"] == "diffmae":
        if settings.teacher is not None and settings.teacher.width is None:
            raise ValueError("its teacher has no width, which every saved model tells")
        model = DiffMAE(settings, DiffusionSettings.model_validate(description["diffusion"]))
        if model.feature_decoder is not None:  # a description may not name what is loaded or run
            model.feature_decoder.detached = True
    else:
        raise ValueError(f"kind {description['kind']!r} is not one of diffmae, classifier")
    model.info = dict(description.get("info", {}))
    return model


def check_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Raise DataError with the whole list unless the tensors fit the module exactly, and hold numbers."""
    problems = tensor_problems(model, tensors)
    if problems:
        raise DataError(f"{source} does not fit its model.json: {'; '.join(problems)}; copy or save it again.")
    odd = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if odd:
        raise DataError(
            f"{source} holds values that are no numbers in {len(odd)} of {len(tensors)} tensors, the first is "
            f"{odd[0]}: its training diverged or the file is damaged; take an earlier checkpoint."
        )
