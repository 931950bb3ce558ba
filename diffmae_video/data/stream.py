"""Stream batches of clips from shards: exact order, resumable to the sample, the same for any number of workers.

Samples form one endless sequence: the order of epoch 0, then of epoch 1, and so on. A global batch is the next piece of
it, cut evenly over the ranks; so the state is (epoch, samples consumed by all ranks), and a run may go on with another
number of ranks or workers without losing or repeating a sample.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffmae_video.config import DataSettings, Settings, SourceSettings
from diffmae_video.data.datasets import is_directional
from diffmae_video.data.decode import Video
from diffmae_video.data.images import open_image
from diffmae_video.data.order import clip_seeds, epoch_order, label_subset, mix
from diffmae_video.data.remote import is_remote
from diffmae_video.data.sampling import frames_by_seconds, frames_by_stride
from diffmae_video.data.shards import MEDIA_SUFFIXES, Manifest, ShardReader
from diffmae_video.data.transforms import ClipTransform, as_generator, build_transforms
from diffmae_video.errors import DataError, UsageError

_SUBSTITUTES = 8  # other samples that are tried in place of an unreadable one


@dataclass
class Batch:
    """Clips of one rank; B counts clips, `repeats` of them from each video."""

    clips: Tensor  # uint8 (B, T, C, H, W)
    labels: Tensor  # int64 (B,), -1 = none
    keys: list[str]  # B of them
    samples: Tensor  # int64 (B,), index within the split
    seeds: Tensor  # int64 (B,), function of (seed, epoch, sample, repeat)
    epoch: int = 0  # of the first sample of the batch
    position: int = 0  # samples of all epochs that all ranks have consumed after this batch
    bad: dict[str, int] = field(default_factory=dict)  # unreadable samples by reason
    source: int = 0  # which source of a joint mix
    directional: bool = False  # labels tell left from right: do not flip

    def pin_memory(self) -> Batch:
        """Page-locked tensors, for asynchronous copies to a GPU (torch's DataLoader calls this)."""
        for name in ("clips", "labels", "samples", "seeds"):
            setattr(self, name, getattr(self, name).pin_memory())
        return self


@dataclass(frozen=True)
class _Request:
    """One batch of one rank, computed in the main process; workers only read and decode."""

    samples: np.ndarray  # int64 (videos,)
    epochs: np.ndarray  # int64 (videos,)
    position: int
    upcoming: tuple[int, ...] = ()  # remote shards that will be needed about one block of shards later


@dataclass(frozen=True)
class _Failure:
    message: str


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
    return ClipStream(
        manifest,
        split,
        data,
        frames=frames,
        size=tuple(size),
        videos=batch_size // repeats,
        repeats=repeats,
        training=training,
        seed=settings.seed,
        rank=rank,
        world=world,
        number=number,
    )


class ClipStream:
    """Iterate batches; see `build_stream`.

    Attributes:
        samples_per_epoch: videos of the split that are used.
        batches_per_epoch: batches of each rank in an epoch (rounded up: a batch may cross into the next epoch).
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        data: DataSettings,
        *,
        frames: int,
        size: tuple[int, int],
        videos: int,
        repeats: int = 1,
        training: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        number: int = 0,
    ):
        self.manifest, self.split, self.data = manifest, split, data
        self.videos, self.repeats, self.training = videos, repeats, training
        self.seed, self.rank, self.world, self.number = seed, rank, world, number
        table = manifest.samples(split)
        fraction = data.label_fraction if training else 1.0
        self._subset = label_subset(table.label, fraction, seed) if fraction < 1 else None
        self._shards = table.shard if self._subset is None else table.shard[self._subset]
        self.samples_per_epoch = len(self._shards)
        if not self.samples_per_epoch:
            raise DataError(f"Split {split!r} of {manifest.root} holds no sample to use; choose another split.")
        self.batches_per_epoch = math.ceil(self.samples_per_epoch / (videos * world))
        directional = manifest.directional
        self.directional = is_directional(manifest.dataset) if directional is None else directional
        transform = build_transforms(data, size, training, self.directional)
        self._clips = _Clips(
            manifest, split, data, frames, repeats, training, seed, transform, number, self.directional
        )
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
            raise UsageError("The run used another number of samples (data.label_fraction?); restore that setting.")
        self.close()
        self.epoch, self.consumed = divmod(
            int(state["epoch"]) * self.samples_per_epoch + int(state["consumed"]), self.samples_per_epoch
        )

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

    def _requests(self) -> Iterator[_Request]:
        position, step = self.position, self.videos * self.world
        end = None if self.training else self.samples_per_epoch
        while end is None or position < end:
            first = position + self.rank * self.videos
            last = first + self.videos if end is None else min(first + self.videos, end)
            position = position + step if end is None else min(position + step, end)
            places = np.arange(first, max(first, last))
            epochs, within = np.divmod(places, self.samples_per_epoch)
            samples = np.empty(len(places), np.int64)
            for epoch in np.unique(epochs):
                samples[epochs == epoch] = self._order(int(epoch))[within[epochs == epoch]]
            if len(samples):
                yield _Request(samples, epochs if self.training else epochs * 0, position, self._upcoming(position))

    def _upcoming(self, position: int) -> tuple[int, ...]:
        """Shards of the samples that come one block of shards after `position`, in the order they come."""
        if not self._remote:
            return ()
        ahead = position + self._block_samples
        epoch, first = divmod(ahead, self.samples_per_epoch)
        if not self.training and epoch:
            return ()
        samples = self._order(epoch)[first : first + self.videos * self.world]
        return tuple(dict.fromkeys(self.manifest.samples(self.split).shard[samples].tolist()))

    def _order(self, epoch: int) -> np.ndarray:
        if not self.training:
            return np.arange(self.samples_per_epoch)
        if epoch not in self._orders:
            for old in sorted(self._orders)[:-1]:
                del self._orders[old]
            order = epoch_order(self._shards, self.seed, epoch, self.data.shuffle_block)
            self._orders[epoch] = order if self._subset is None else self._subset[order]
        return self._orders[epoch]

    def _account(self, batch: Batch) -> None:
        """Move the state past a batch that is handed out, and stop a run whose data is mostly unreadable."""
        self.epoch, self.consumed = divmod(batch.position, self.samples_per_epoch)
        self._seen += self.videos
        for reason, count in batch.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + count
        bad = sum(self.bad.values())
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
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if workers else None,
            in_order=True,
        )
        self.iterator = iter(self.loader)

    def __next__(self) -> Batch:
        if self.stopped:
            raise RuntimeError("the stream was closed or its state was replaced: call iter(stream) again")
        batch = next(self.iterator)
        if isinstance(batch, _Failure):
            raise DataError(batch.message)
        self.stream._account(batch)
        return batch

    def stop(self) -> None:
        self.stopped = True
        shutdown = getattr(self.iterator, "_shutdown_workers", None)
        if shutdown:
            shutdown()
        self.iterator = iter(())


def _identity(batch: Any) -> Any:
    return batch


def _start_worker(number: int) -> None:
    """Workers use one thread and leave signals to the training process, whose handlers they inherited."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # timeout, Slurm and launchers signal the whole group: live on while the training process ends its step and saves
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


class _Clips(Dataset):
    """Read, decode and augment the samples of a request; lives in the workers."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        data: DataSettings,
        frames: int,
        repeats: int,
        training: bool,
        seed: int,
        transform: ClipTransform,
        number: int,
        directional: bool,
    ):
        self.manifest, self.split, self.data = manifest, split, data
        self.frames, self.repeats, self.training, self.seed = frames, repeats, training, seed
        self.transform, self.number, self.directional = transform, number, directional
        self.table = manifest.samples(split)
        self.reader: ShardReader | None = None

    def close(self) -> None:
        """Close the shards that this process reads by itself (without workers); reading on opens them again."""
        if self.reader is not None:
            self.reader.close()

    def __getitem__(self, request: _Request) -> Batch | _Failure:
        try:
            return self._batch(request)
        except DataError as error:
            return _Failure(str(error))

    def _batch(self, request: _Request) -> Batch:
        if self.reader is None:
            self.reader = ShardReader(self.manifest, self.data.cache_dir, self.data.cache_gib)
        if request.upcoming and self.reader.cache:
            self.reader.cache.prefetch(list(request.upcoming))
        bad: dict[str, int] = {}
        clips: list[Tensor] = []
        samples: list[int] = []
        seeds: list[int] = []
        for wanted, epoch in zip(request.samples.tolist(), request.epochs.tolist(), strict=True):
            for sample in self._candidates(wanted, epoch):
                draws = clip_seeds(self.seed, epoch, np.int64(sample), np.arange(self.repeats))
                try:
                    clips += self._read(sample, draws.tolist())
                except (DataError, OSError, ValueError, MemoryError) as error:
                    reason = "unreadable" if isinstance(error, DataError) else type(error).__name__
                    bad[reason] = bad.get(reason, 0) + 1
                    last = error
                    continue
                samples += [sample] * self.repeats
                seeds += draws.tolist()
                break
            else:
                if self.training:
                    raise DataError(
                        f"{_SUBSTITUTES + 1} samples in a row cannot be read, the last one because: {last} "
                        f"Run `diffmae verify --decode {self.manifest.root}`."
                    )
        shape = (0, self.frames, 3, *self.transform.size)
        index = np.asarray(samples, np.int64)
        return Batch(
            clips=torch.stack(clips) if clips else torch.empty(shape, dtype=torch.uint8),  # (B, T, C, H, W)
            labels=torch.from_numpy(self.table.label[index].astype(np.int64)),  # (B,)
            keys=[self.table.key(sample) for sample in samples],
            samples=torch.from_numpy(index),  # (B,)
            seeds=torch.tensor(seeds, dtype=torch.int64),  # (B,)
            epoch=int(request.epochs[0]),
            position=request.position,
            bad=bad,
            source=self.number,
            directional=self.directional,
        )

    def _candidates(self, sample: int, epoch: int) -> list[int]:
        """The sample itself and, in training, others that may stand in for it, chosen by (seed, epoch, sample)."""
        if not self.training:
            return [sample]
        others = mix(self.seed, epoch, sample, 0xBAD + np.arange(_SUBSTITUTES)) % np.uint64(len(self.table))
        return [sample, *others.astype(np.int64).tolist()]

    def _read(self, sample: int, seeds: list[int]) -> list[Tensor]:
        """`repeats` clips of one sample, each uint8 (T, C, H, W)."""
        stored = self.reader.read(self.split, sample, meta=False)
        generators = [as_generator(seed) for seed in seeds]
        if stored.suffix in MEDIA_SUFFIXES["image"]:
            return self._read_image(stored.data, generators)
        if stored.suffix not in MEDIA_SUFFIXES["video"]:
            raise DataError(f"Sample {stored.key} is a .{stored.suffix}, which is never decoded.")
        columns = (self.table.frames, self.table.width, self.table.height)
        frames, width, height = (int(column[sample]) for column in columns)
        known = bool(frames and width and height)
        with Video(stored.data, known=known) as video:
            if not known:
                info = video.info
                frames, width, height = info.frames, info.width, info.height
            fps = float(self.table.fps[sample]) or video.info.fps
            indices = [self.frame_numbers(frames, fps, generator) for generator in generators]
            boxes = [self.transform.box(width, height, generator) for generator in generators]
            clips = video.clips(indices, boxes, self.transform.size)
        if not self.training:
            return [clip.frames for clip in clips]
        return [self.transform.augment(clip.frames, draw) for clip, draw in zip(clips, generators, strict=True)]

    def frame_numbers(self, frames: int, fps: float, generator: torch.Generator) -> list[int]:
        """Frames of one clip: from a random place in training, from the middle when testing."""
        draws = generator if self.training else None
        if self.data.clip_seconds and fps > 0:
            return frames_by_seconds(frames, fps, self.frames, self.data.clip_seconds, draws)
        return frames_by_stride(frames, self.frames, self.data.stride, draws)

    def _read_image(self, data: bytes, generators: list[torch.Generator]) -> list[Tensor]:
        from PIL import Image, ImageOps

        with open_image(data) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        clips, (rows, columns) = [], self.transform.size
        for generator in generators:
            left, top, width, height = self.transform.box(upright.width, upright.height, generator)
            box = (left, top, left + width, top + height)
            small = upright.resize((columns, rows), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
            clip = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]  # (1, C, H, W)
            clip = clip.expand(self.frames, -1, -1, -1).contiguous()  # (T, C, H, W)
            clips.append(self.transform.augment(clip, generator) if self.training else clip)
        return clips
