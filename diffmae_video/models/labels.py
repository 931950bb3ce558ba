"""Labels that the decoder is told of: withheld at random in training, followed or exaggerated in sampling."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffmae_video.config import ModelSettings
from diffmae_video.errors import UsageError
from diffmae_video.models.decoder import Encoding

_APART = 0x5DEECE66D
"""Sets the generator that withholds labels apart from the one that draws timestep and noise of the same seed."""


def drop_labels(labels: Tensor, seeds: Tensor | Sequence[int], model: ModelSettings) -> Tensor:
    """Labels as a training step tells them: each withheld with probability `model.label_drop`, by its own seed.

    Args:
        labels: int64 (B,), -1 where there is none.
        seeds: B integers.

    Returns:
        int64 (B,), `model.labels` where none is told.
    """
    told = check_labels(labels, model)
    chances = [
        torch.rand((), generator=torch.Generator().manual_seed(seed ^ _APART))
        for seed in torch.as_tensor(seeds).tolist()
    ]
    return told.where(torch.stack(chances).to(told.device) >= model.label_drop, int(model.labels))


def check_labels(labels: Tensor | Sequence[int], model: ModelSettings) -> Tensor:
    """Labels int64 (B,) with `model.labels` in place of -1 (none).

    Raises:
        UsageError: the model is told of no labels, or not of these.
    """
    told, count = torch.as_tensor(labels).long(), int(model.labels)
    if not count:
        raise UsageError("This model knows no labels: train one with model.labels = data, or give none.")
    if int(told.max()) >= count or int(told.min()) < -1:
        raise UsageError(f"Labels from {int(told.min())} to {int(told.max())}: this model knows 0 to {count - 1}.")
    return told.where(told >= 0, count)


def find_label(model: Any, name: str) -> int:
    """The label of a class by the name that it had in training (`model.info`).

    Args:
        model: a DiffMAE.

    Raises:
        UsageError: the model knows no labels, or none of that name.
    """
    classes = [str(known) for known in model.info.get("classes") or ()]
    if not model.settings.labels or not classes:
        raise UsageError(
            f"--label {name}: the model was trained without labels; take one trained with --set model.labels=data."
        )
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=3, cutoff=0.0)
        raise UsageError(f"--label {name}: no class of the model; did you mean {' or '.join(near)}?")
    return classes.index(name)


def guided(
    denoise: Callable[[Tensor, Tensor, Encoding], Tensor],
    noisy: Tensor,
    timestep: Tensor,
    encoding: Encoding,
    guidance: float,
) -> Tensor:
    """x_0 (B, M, P) by classifier-free guidance (arXiv 2207.12598): free + guidance * (told - free).

    x_0 is an affine function of the noise at given x_t, so guiding it is guiding the noise.
    """
    if encoding.label is None or guidance == 1:
        return denoise(noisy, timestep, encoding)
    free = denoise(noisy, timestep, encoding._replace(label=None))
    return free if guidance == 0 else free + guidance * (denoise(noisy, timestep, encoding) - free)
