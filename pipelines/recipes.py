"""Which recipe a stage uses, and its resolved settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffmae_video.config import Settings, Stage, load_settings, with_overrides
from diffmae_video.errors import UsageError

if TYPE_CHECKING:
    from diffmae_video.data.shards import Manifest


def pick_device(name: str) -> str:
    """Turn `auto` into the best device here; check that a named one is there.

    Raises:
        UsageError: the named device does not exist on this machine.
    """
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if name not in available:
        raise UsageError(f"--device {name} is not one of auto, cpu, cuda, mps; choose one of them.")
    if not available[name]:
        raise UsageError(
            f"--device {name} is not available on this machine; use --device auto or see `diffmae doctor`."
        )
    return name


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
    because = "a GPU is present" if device == "cuda" else f"the device is {device}"
    return f"{kind}-{size}", because


def resolve_settings(
    recipe: str,
    stage: Stage,
    overrides: Sequence[str] = (),
    *,
    seed: int | None = None,
    manifest: Manifest | None = None,
    device: str = "auto",
    kind: str = "video",
) -> tuple[Settings, str]:
    """Settings of a stage, and the line that tells the user where they come from.

    Args:
        recipe: a name, a path, or `auto`.
        overrides: `section.field=value` texts of `--set`.
        seed: replaces the recipe's seed where given.
    """
    why = "chosen by --recipe"
    if recipe == "auto":
        recipe, why = choose_recipe(stage, manifest, pick_device(device), kind)
    settings = load_settings(recipe, stage, tuple(overrides))
    if seed is not None:
        settings = with_overrides(settings, seed=seed)
    return settings, f"Recipe: {recipe} ({why})."
