"""Which recipe a stage uses, and its resolved settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffmae_video.config import Settings, Stage, load_settings, with_overrides

if TYPE_CHECKING:
    from diffmae_video.data.shards import Manifest


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

    Raises:
        UsageError: a recipe, key or value that is not valid, or a device that is not there.
    """
    why = "chosen by --recipe"
    if recipe == "auto":
        from diffmae_video.training.hardware import pick_device

        recipe, why = choose_recipe(stage, manifest, pick_device(device).type, kind)
    settings = load_settings(recipe, stage, tuple(overrides))
    if seed is not None:
        settings = with_overrides(settings, seed=seed)
    return settings, f"Recipe: {recipe} ({why})."
