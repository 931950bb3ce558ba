"""Whether one clip of a training fits the memory, told before the first step with settings that do fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from diffmae_video.config import Settings, with_overrides
from diffmae_video.models.presets import PRESETS
from diffmae_video.training.footprint import Footprint

_SHRINK = (0.75, 0.5, 0.25)  # of the sides of a clip
_GIB = 2**30


def memory_complaint(
    settings: Settings,
    world: int,
    memory: float,
    cost: Footprint,
    measured: Callable[[Settings, int], Footprint],
    *,
    free_model: bool = True,
) -> str | None:
    """One sentence on a step that needs more memory than there is, with settings that fit; None where it fits.

    Args:
        memory: bytes that each of `world` processes has.
        cost: of a step as it would be computed: with `train.accumulate = "auto"` in as many parts as there are clips,
            where fewer do not fit.
        measured: cost of a step with so many clips in a micro-batch.
        free_model: the size of the network may be changed; weights to start from decide it.
    """
    train = settings.train
    shards = world if train.sharding == "fsdp" else 1
    if cost.memory(shards) <= memory:
        return None
    needed, what = cost.memory(shards), "a single clip at once"
    if train.accumulate != "auto":
        what = f"train.accumulate={train.accumulate}"
    told = f"A step with {what} takes {needed / _GIB:.2f} GiB of memory, {memory / _GIB:.2f} are free"
    single = max(1, train.batch_size // world)  # parts of one clip
    for texts, changed in _smaller(settings, free_model):
        then = measured(with_overrides(changed, train={"accumulate": single}), 1).memory(shards)
        if then <= memory:
            return f"{told}; set {' and '.join(texts)}, which takes {then / _GIB:.2f}."
    return f"{told}; take a device with more memory, or a smaller model."


def _smaller(settings: Settings, free_model: bool) -> Iterator[tuple[list[str], Settings]]:
    """Settings that take less memory, with the words of `--set`, from what changes the result least."""
    if settings.train.accumulate != "auto":
        yield ["train.accumulate=auto"], with_overrides(settings, train={"accumulate": "auto"})
        settings = with_overrides(settings, train={"accumulate": "auto"})
    model, texts = settings.model, []
    if settings.train.grad_checkpointing is not True:
        texts.append("train.grad_checkpointing=true")
        settings = with_overrides(settings, train={"grad_checkpointing": True})
        yield list(texts), settings
    for share in _SHRINK:
        sides = [max(model.patch, int(side * share) // model.patch * model.patch) for side in model.size]
        size: dict[str, Any] = {"size": sides}
        yield [*texts, f"model.size={sides}"], with_overrides(settings, model=size)
    if free_model and model.preset in PRESETS:
        names = list(PRESETS)
        for name in reversed(names[: names.index(model.preset)]):
            yield [*texts, f"model.preset={name}"], with_overrides(settings, model={"preset": name})
