"""Which recipe a stage uses, and its resolved settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffmae_video.config import Settings, Stage, load_settings, with_overrides
from diffmae_video.training.distributed import ranks_from_environment
from diffmae_video.training.hardware import pick_device

if TYPE_CHECKING:
    from diffmae_video.data.manifest import Manifest
    from diffmae_video.pipelines.job import Job


def planned_device(job: Job) -> torch.device:
    """The device of a job; with `device_memory` it need not be on this machine.

    Raises:
        UsageError: it is not there.
    """
    if job.device_memory is not None and job.device != "auto":
        return torch.device(job.device)
    return pick_device(job.device)


def planned_world(job: Job) -> int:
    """Processes of a job: those it will launch, or those that were launched around it."""
    return max(job.nproc, ranks_from_environment()[1])


def choose_recipe(stage: Stage, manifest: Manifest | None, device: str, kind: str = "video") -> tuple[str, str]:
    """Choose a built-in recipe by data and device.

    Args:
        stage: the stage that asks.
        manifest: the data it will read, where known.
        device: `cpu`, `cuda` or `mps`.
        kind: `video`, `image` or `joint`.

    Returns:
        The recipe's name, and a few words on why it was chosen.
    """
    if manifest is not None and manifest.dataset == "demo":
        return "demo", "the data set is the embedded demo"
    size = "base" if device == "cuda" else "tiny"
    because = "the device is a GPU" if device == "cuda" else f"the device is {device}"
    return f"{kind}-{size}", because


def resolve_settings(
    job: Job, stage: Stage, *, manifest: Manifest | None = None, kind: str = "video"
) -> tuple[Settings, str]:
    """Settings of a stage, and the line that tells the user where they come from.

    Args:
        job: `recipe`, a name, a path, or `auto`; `overrides`, `seed`, `device`.
        manifest: the data it will read, where known.
        kind: `video`, `image` or `joint`.

    Raises:
        UsageError: a recipe, key or value that is not valid, or a device that is not there.
    """
    recipe, why = job.recipe, "chosen by --recipe"
    if recipe == "auto":
        recipe, why = choose_recipe(stage, manifest, planned_device(job).type, kind)
    settings = load_settings(recipe, stage, job.overrides)
    if job.seed is not None:
        settings = with_overrides(settings, seed=job.seed)
    return settings, f"Recipe: {recipe} ({why})."
