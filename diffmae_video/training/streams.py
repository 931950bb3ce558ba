"""The streams of a training: batches of one folder of shards or of a mix, and passes over the validation split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffmae_video.config import Settings, with_overrides
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.stream import build_stream
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.mix import MixedStream
from diffmae_video.training.task import micro_batch_size


def open_stream(settings: Settings, rank: int, world: int) -> Any:
    """The endless training stream of one rank: of one folder of shards, or a mix of several."""
    shared = {"split": settings.data.split, "training": True, "rank": rank, "world": world}
    sources = settings.data.sources
    if not sources:
        return build_stream(settings, batch_size=micro_batch_size(settings.train, world), **shared)
    streams = [
        build_stream(
            settings,
            batch_size=micro_batch_size(settings.train, world, source.batch_size),
            source=source,
            number=number,
            **shared,
        )
        for number, source in enumerate(sources)
    ]
    return MixedStream(streams, [source.weight for source in sources], settings.train.micro_batches)


def validation_opener(settings: Settings, processes: Distributed) -> Callable[[int, bool], Any]:
    """What opens one pass over the validation split (the training split where there is none).

    Returns:
        (clips a batch, alone) -> a stream: this rank's share, or, `alone`, everything.
    """
    assert settings.data.path is not None  # the stage has settled it
    manifest = Manifest.load(settings.data.path)
    held_out = manifest.held_out(settings.data.eval_split)
    split = held_out if manifest.splits.get(held_out) else settings.data.split
    source = settings.data.sources[0] if settings.data.sources else None

    def open_validation(batch_size: int, alone: bool) -> Any:
        rank, world = (0, 1) if alone else (processes.rank, processes.world)
        plain = with_overrides(settings, data={"workers": 0}) if alone else settings
        return build_stream(
            plain, split=split, batch_size=batch_size, training=False, rank=rank, world=world, source=source
        )

    return open_validation
