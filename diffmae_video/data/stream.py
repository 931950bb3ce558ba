"""Stream batches of clips from shards: exact order, resumable to the sample, the same for any number of workers.

Samples form one endless sequence: the order of epoch 0, then of epoch 1, and so on. A global batch is the next piece of
it, cut evenly over the ranks; so the state is (epoch, samples consumed by all ranks), and a run may go on with another
number of ranks or workers without losing or repeating a sample.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from diffmae_video.config import DataSettings, Settings, SourceSettings
from diffmae_video.data.batches import Batch, ClipReader, Failure, Request, StreamPlan, start_worker
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.order import epoch_order, label_subset
from diffmae_video.data.remote import is_remote
from diffmae_video.errors import DataError, StorageError, UsageError
from diffmae_video.processes import safe_path


def build_stream(
    settings: Settings,
    *,
    split: str,
    batch_size: int,
    training: bool,
    rank: int = 0,
    world: int = 1,
    source: SourceSettings | None = None,
    number: int = 0,
) -> ClipStream:
    """Open a stream over one folder of shards.

    Args:
        settings: `data`, `model.frames`, `model.size` and `seed` are used.
        split: which split of the manifest.
        batch_size: clips of this rank in one batch, repeats included.
        training: endless, shuffled and augmented; otherwise one pass in stored order, centre crop, centre clip.
        rank, world: which part of each global batch.
        source: overrides of a joint mix: path, frames, size, repeats.
        number: place of this source in the mix (`Batch.source`).

    Raises:
        DataError: no shards, no such split, or nothing in it.
        UsageError: the batch size does not fit `repeats`.
    """
    data = settings.data
    path = source.path if source else data.path
    if not path:
        raise UsageError("No data was named: set data.path or give --data.")
    manifest = Manifest.load(path)
    frames = (source and source.frames) or (1 if manifest.kind == "image" else settings.model.frames)
    size = (source and source.size) or settings.model.size
    repeats = ((source and source.repeats) or data.repeats) if training else 1
    if batch_size % repeats:
        raise UsageError(f"{batch_size} clips a batch do not divide into {repeats} repeats; change data.repeats.")
    plan = StreamPlan(
        split=split,
        frames=frames,
        size=(size[0], size[1]),
        videos=batch_size // repeats,
        repeats=repeats,
        training=training,
        seed=settings.seed,
        rank=rank,
        world=world,
        number=number,
    )
    return ClipStream(manifest, data, plan)


_START = "fork" if sys.platform == "linux" else "spawn"
"""How data workers start: copies of this process where that is safe and quick, fresh ones elsewhere."""


class ClipStream:
    """Iterate batches; see `build_stream`.

    Attributes:
        samples_per_epoch: videos of the split that are used.
        batches_per_epoch: batches of each rank in an epoch (rounded up: a batch may cross into the next epoch).
    """

    def __init__(self, manifest: Manifest, data: DataSettings, plan: StreamPlan):
        self.manifest, self.data, self.plan = manifest, data, plan
        table = manifest.samples(plan.split)
        few = (data.label_fraction, data.labels_per_class) if plan.training else (1.0, 0)
        self._subset = label_subset(table.label, *few, plan.seed)
        self._shards = table.shard if self._subset is None else table.shard[self._subset]
        self.samples_per_epoch = len(self._shards)
        if not self.samples_per_epoch:
            raise DataError(f"Split {plan.split!r} of {manifest.root} holds no sample to use; choose another split.")
        self.batches_per_epoch = math.ceil(self.samples_per_epoch / (plan.videos * plan.world))
        self._clips = ClipReader(manifest, data, plan)
        self._remote = is_remote(manifest.root)
        shards = len(np.unique(self._shards)) if self._remote else 1
        self._block_samples = self.samples_per_epoch * min(data.shuffle_block, shards) // shards
        self.epoch, self.consumed = 0, 0
        self.bad: dict[str, int] = {}
        """Unreadable samples so far, by reason."""
        self._seen = 0
        self._live: _Batches | None = None
        self._orders: dict[int, np.ndarray] = {}

    @property
    def position(self) -> int:
        """Samples that all ranks have consumed over all epochs."""
        return self.epoch * self.samples_per_epoch + self.consumed

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present state on; a former iterator ends."""
        self.close()
        self._live = _Batches(self)
        return self._live

    def __len__(self) -> int:
        return self.batches_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is: the state after the last batch that was handed out, the same on every rank."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "samples_per_epoch": self.samples_per_epoch,
            "manifest": self.manifest.hash,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; iterators made before end with an error, call `iter` again.

        Raises:
            UsageError: the state is of other data.
        """
        if state.get("manifest", self.manifest.hash) != self.manifest.hash:
            raise UsageError(f"The run was trained on other shards than {self.manifest.root}; give it its own data.")
        if state.get("samples_per_epoch", self.samples_per_epoch) != self.samples_per_epoch:
            raise UsageError(
                "The run used another number of samples (data.label_fraction or labels_per_class?); restore it."
            )
        epoch, consumed = state.get("epoch"), state.get("consumed")
        if not (type(epoch) is int and type(consumed) is int and 0 <= epoch < 2**40 and 0 <= consumed < 2**40):
            raise UsageError(f"The run's place in the data is none: {epoch!r:.40}, {consumed!r:.40}; start it anew.")
        self.close()
        position = epoch * self.samples_per_epoch + consumed
        self.epoch, self.consumed = divmod(position, self.samples_per_epoch)

    def close(self) -> None:
        """Stop the workers and close the shards; the state stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._clips.close()

    def __enter__(self) -> ClipStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _requests(self) -> Iterator[Request]:
        position, step = self.position, self.plan.videos * self.plan.world
        end = None if self.plan.training else self.samples_per_epoch
        while end is None or position < end:
            first = position + self.plan.rank * self.plan.videos
            last = first + self.plan.videos if end is None else min(first + self.plan.videos, end)
            position = position + step if end is None else min(position + step, end)
            places = np.arange(first, max(first, last))
            epochs, within = np.divmod(places, self.samples_per_epoch)
            samples = np.empty(len(places), np.int64)
            for epoch in np.unique(epochs):
                samples[epochs == epoch] = self._order(int(epoch))[within[epochs == epoch]]
            if len(samples):
                yield Request(samples, epochs if self.plan.training else epochs * 0, position, self._upcoming(position))

    def _upcoming(self, position: int) -> tuple[int, ...]:
        """Shards of the samples that come one block of shards after `position`, in the order they come."""
        if not self._remote:
            return ()
        ahead = position + self._block_samples
        epoch, first = divmod(ahead, self.samples_per_epoch)
        if not self.plan.training and epoch:
            return ()
        samples = self._order(epoch)[first : first + self.plan.videos * self.plan.world]
        return tuple(dict.fromkeys(self.manifest.samples(self.plan.split).shard[samples].tolist()))

    def _order(self, epoch: int) -> np.ndarray:
        if not self.plan.training:
            return np.arange(self.samples_per_epoch)
        if epoch not in self._orders:
            for old in sorted(self._orders)[:-1]:
                del self._orders[old]
            order = epoch_order(self._shards, self.plan.seed, epoch, self.data.shuffle_block)
            self._orders[epoch] = order if self._subset is None else self._subset[order]
        return self._orders[epoch]

    def _account(self, batch: Batch) -> None:
        """Move the state past a batch; stop a training whose data is often unreadable, or a pass that reads nothing."""
        self.epoch, self.consumed = divmod(batch.position, self.samples_per_epoch)
        self._seen += self.plan.videos
        for reason, count in batch.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + count
        bad = sum(self.bad.values())
        if not self.plan.training and bad < self.samples_per_epoch:
            return  # its reader says how many there were
        if bad > max(self.data.max_bad_fraction * max(self._seen, min(100, self.samples_per_epoch)), 0):
            told = ", ".join(f"{count} {reason}" for reason, count in self.bad.items())
            raise DataError(
                f"{bad} of {self._seen} samples of {self.manifest.root} cannot be read ({told}), more than "
                f"data.max_bad_fraction allows; run `diffmae verify --decode` on it."
            )


class _Batches(Iterator[Batch]):
    """One run over a stream's loader."""

    def __init__(self, stream: ClipStream):
        self.stream, self.stopped = stream, False
        workers = stream.data.workers
        self.loader = DataLoader(
            stream._clips,
            sampler=stream._requests(),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=stream.data.prefetch if workers else None,
            collate_fn=_identity,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=_START if workers else None,
            in_order=True,
        )
        with safe_path():
            self.iterator = iter(self.loader)

    def __next__(self) -> Batch:
        if self.stopped:
            raise RuntimeError("the stream was closed or its state was replaced: call iter(stream) again")
        while True:
            batch = next(self.iterator)
            if isinstance(batch, Failure):
                raise (StorageError if batch.storage else DataError)(batch.message)
            self.stream._account(batch)
            if len(batch.clips):  # one pass has no substitutes: a batch of unreadable samples is left out
                return batch

    def stop(self) -> None:
        self.stopped = True
        shutdown = getattr(self.iterator, "_shutdown_workers", None)
        if shutdown:
            shutdown()
        self.iterator = iter(())


def _identity(batch: Any) -> Any:
    return batch
