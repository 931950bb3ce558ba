"""One stream over a weighted mix of sources (clips and images), each with its own batch shape; resumable as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffmae_video.config import Settings
from diffmae_video.data.order import mix
from diffmae_video.data.stream import Batch, ClipStream, build_stream
from diffmae_video.errors import UsageError


def build_joint_stream(
    settings: Settings, *, split: str, batch_size: int, training: bool, rank: int = 0, world: int = 1
) -> JointStream:
    """Open the mix of `data.sources`; arguments as for `build_stream`.

    `batch_size` holds for sources without one of their own; a source's own counts samples over all ranks.

    Raises:
        UsageError: no sources are set, or a batch size does not divide over the ranks.
    """
    sources = settings.data.sources
    if not sources:
        raise UsageError("Joint training needs data.sources; list them in the recipe or give --joint.")
    streams = []
    for number, source in enumerate(sources):
        if source.batch_size and source.batch_size % world:
            raise UsageError(
                f"batch_size = {source.batch_size} of {source.path} does not divide over {world} processes."
            )
        streams.append(
            build_stream(
                settings,
                split=split,
                batch_size=source.batch_size // world if source.batch_size else batch_size,
                training=training,
                rank=rank,
                world=world,
                source=source,
                number=number,
            )
        )
    return JointStream(streams, [source.weight for source in sources], settings.seed)


class JointStream:
    """Batches of several streams; which one comes next is a pure function of (seed, number of the batch)."""

    def __init__(self, streams: list[ClipStream], weights: list[float], seed: int):
        self.streams, self.seed = streams, seed
        total = sum(weights)
        self.bounds = [sum(weights[: place + 1]) / total for place in range(len(weights))]
        self.batches = 0
        self.samples_per_epoch = sum(stream.samples_per_epoch for stream in streams)
        self.batches_per_epoch = sum(stream.batches_per_epoch for stream in streams)
        self._run = 0

    @property
    def position(self) -> int:
        """Samples of all sources that all ranks have consumed."""
        return sum(stream.position for stream in self.streams)

    @property
    def epoch(self) -> int:
        """Passes over as many batches as one pass over every source has."""
        return self.batches // self.batches_per_epoch

    @property
    def bad(self) -> dict[str, int]:
        """Unreadable samples so far, by reason."""
        counts: dict[str, int] = {}
        for stream in self.streams:
            for reason, count in stream.bad.items():
                counts[reason] = counts.get(reason, 0) + count
        return counts

    def pick(self, batch: int) -> int:
        """Source of the batch with this number."""
        draw = float(mix(self.seed, 0x10147, batch)) / 2**64
        return next((place for place, bound in enumerate(self.bounds) if draw < bound), len(self.bounds) - 1)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present state on; a former iterator ends."""
        self._run += 1
        return self._batches(self._run, [iter(stream) for stream in self.streams])

    def _batches(self, run: int, iterators: list[Iterator[Batch]]) -> Iterator[Batch]:
        while True:
            if run != self._run:
                raise RuntimeError("the stream was closed or its state was replaced: call iter(stream) again")
            batch = next(iterators[self.pick(self.batches)], None)
            if batch is None:
                return
            self.batches += 1
            batch.position = self.position
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where every source is, and how many batches were handed out."""
        return {
            "batches": self.batches,
            "epoch": self.epoch,
            "consumed": self.position,
            "sources": [stream.state_dict() for stream in self.streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            UsageError: it is of another mix.
        """
        sources = state.get("sources")
        if not isinstance(sources, list) or len(sources) != len(self.streams):
            raise UsageError(f"The run had another number of data.sources than {len(self.streams)}; restore them.")
        self._run += 1
        for stream, one in zip(self.streams, sources, strict=True):
            stream.load_state_dict(one)
        self.batches = int(state["batches"])

    def close(self) -> None:
        """Stop the workers of all sources."""
        self._run += 1
        for stream in self.streams:
            stream.close()

    def __enter__(self) -> JointStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
