"""A weighted mix of sources: which one an optimizer step draws from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def next_source(counts: Sequence[int], weights: Sequence[float]) -> int:
    """Which source the next step draws from, given how many steps each was drawn for.

    After n steps source i was drawn within one of n * weights[i] / sum(weights) times: among the sources that would not
    run ahead of their share, the one whose next draw is due first (Tijdeman's chairman assignment).
    """
    total, step = sum(weights), sum(counts) + 1
    shares = [weight / total for weight in weights]
    ready = [i for i, share in enumerate(shares) if counts[i] < step * share]
    return min(ready, key=lambda i: ((counts[i] + 1) / shares[i], i))


class MixedStream:
    """Batches of several streams: each optimizer step takes all its micro-batches from one of them.

    Args:
        streams: one a source.
        weights: share of the steps of each.
        accumulate: micro-batches an optimizer step.
    """

    def __init__(self, streams: Sequence[Any], weights: Sequence[float], accumulate: int) -> None:
        self.streams, self.weights, self.accumulate = list(streams), list(weights), accumulate
        self.counts = [0] * len(streams)  # steps taken from each source

    @property
    def samples_per_epoch(self) -> int:
        """Videos and images of all sources."""
        return sum(stream.samples_per_epoch for stream in self.streams)

    def __iter__(self) -> Iterator[Any]:
        return self._batches([iter(stream) for stream in self.streams])  # workers start here, not at the first batch

    def _batches(self, iterators: list[Iterator[Any]]) -> Iterator[Any]:
        while True:
            chosen = next_source(self.counts, self.weights)
            for micro in range(self.accumulate):
                batch = next(iterators[chosen])
                if micro == self.accumulate - 1:
                    self.counts[chosen] += 1  # the state after the step's last batch
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Steps taken from each source, and where each stands."""
        return {"counts": list(self.counts), "sources": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.counts = list(state["counts"])
        for stream, inner in zip(self.streams, state["sources"], strict=True):
            stream.load_state_dict(inner)

    def close(self) -> None:
        """Stop the workers."""
        for stream in self.streams:
            stream.close()
