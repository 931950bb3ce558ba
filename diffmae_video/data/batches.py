"""What a data worker does: read, decode and augment the samples of one batch. Requests come from stream.py."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffmae_video.config import DataSettings
from diffmae_video.data.backends import load_torchcodec, open_video
from diffmae_video.data.datasets import is_directional
from diffmae_video.data.images import open_image, to_rgb
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.media import MEDIA_SUFFIXES
from diffmae_video.data.order import clip_seeds, mix
from diffmae_video.data.sampling import frames_by_seconds, frames_by_segments, frames_by_stride
from diffmae_video.data.shards import ShardReader
from diffmae_video.data.transforms import as_generator, build_transforms
from diffmae_video.errors import DataError, StorageError

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
    part: slice = field(default_factory=lambda: slice(None))  # the clips to compute now, where memory is short

    def pin_memory(self) -> Batch:
        """Page-locked tensors, for asynchronous copies to a GPU (torch's DataLoader calls this)."""
        for name in ("clips", "labels", "samples", "seeds"):
            setattr(self, name, getattr(self, name).pin_memory())
        return self


@dataclass(frozen=True)
class Request:
    """One batch of one rank, computed in the main process; workers only read and decode."""

    samples: np.ndarray  # int64 (videos,)
    epochs: np.ndarray  # int64 (videos,)
    position: int
    upcoming: tuple[int, ...] = ()  # remote shards that will be needed about one block of shards later


@dataclass(frozen=True)
class Failure:
    """An error of a worker, raised in the main process."""

    message: str
    storage: bool = False


@dataclass(frozen=True)
class StreamPlan:
    """What one rank reads of a folder of shards, and how it is cut into batches.

    Attributes:
        split: which split of the manifest.
        frames, size: T, and (H, W) of a clip.
        videos, repeats: videos in a batch of this rank, and clips from each of them.
        training: endless, shuffled and augmented; otherwise one pass in stored order, centre crop, centre clip.
        seed: of the order and of every draw.
        rank, world: which part of each global batch.
        number: place of this source in a joint mix (`Batch.source`).
    """

    split: str
    frames: int
    size: tuple[int, int]
    videos: int
    repeats: int = 1
    training: bool = True
    seed: int = 0
    rank: int = 0
    world: int = 1
    number: int = 0


class ClipReader(Dataset):
    """Read, decode and augment the samples of a request; lives in the workers."""

    def __init__(self, manifest: Manifest, data: DataSettings, plan: StreamPlan):
        self.manifest, self.data, self.plan = manifest, data, plan
        directional = manifest.directional
        self.directional = is_directional(manifest.dataset) if directional is None else directional
        self.transform = build_transforms(data, plan.size, plan.training, self.directional)
        self.table = manifest.samples(plan.split)
        self.reader: ShardReader | None = None
        if data.decoder == "torchcodec":
            load_torchcodec()  # what keeps it from loading is said here, not in a worker

    def close(self) -> None:
        """Close the shards that this process reads by itself (without workers); reading on opens them again."""
        if self.reader is not None:
            self.reader.close()

    def __getitem__(self, request: Request) -> Batch | Failure:
        try:
            return self._batch(request)
        except DataError as error:
            return Failure(str(error), isinstance(error, StorageError))

    def _batch(self, request: Request) -> Batch:
        if self.reader is None:
            self.reader = ShardReader(self.manifest, self.data.cache_dir, self.data.cache_gib)
        if request.upcoming and self.reader.cache:
            self.reader.cache.prefetch(list(request.upcoming))
        bad: dict[str, int] = {}
        last: Exception | None = None
        clips: list[Tensor] = []
        samples: list[int] = []
        seeds: list[int] = []
        for wanted, epoch in zip(request.samples.tolist(), request.epochs.tolist(), strict=True):
            for sample in self._candidates(wanted, epoch):
                draws = clip_seeds(self.plan.seed, epoch, np.asarray(sample), np.arange(self.plan.repeats))
                try:
                    clips += self._read(sample, draws.tolist())
                except StorageError:  # says nothing about the sample
                    raise
                except Exception as error:  # whatever a damaged sample makes a library raise
                    reason = "unreadable" if isinstance(error, DataError) else type(error).__name__
                    bad[reason] = bad.get(reason, 0) + 1
                    last = error
                    continue
                samples += [sample] * self.plan.repeats
                seeds += draws.tolist()
                break
            else:
                if self.plan.training:
                    raise DataError(
                        f"{_SUBSTITUTES + 1} samples in a row cannot be read, the last one because: {last} "
                        f"Run `diffmae verify --decode {self.manifest.root}`."
                    )
        shape = (0, self.plan.frames, 3, *self.transform.size)
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
            source=self.plan.number,
            directional=self.directional,
        )

    def _candidates(self, sample: int, epoch: int) -> list[int]:
        """The sample itself and, in training, others that may stand in for it, chosen by (seed, epoch, sample)."""
        if not self.plan.training:
            return [sample]
        others = mix(self.plan.seed, epoch, sample, 0xBAD + np.arange(_SUBSTITUTES)) % np.uint64(len(self.table))
        return [sample, *others.astype(np.int64).tolist()]

    def _read(self, sample: int, seeds: list[int]) -> list[Tensor]:
        """`repeats` clips of one sample, each uint8 (T, C, H, W)."""
        assert self.reader is not None
        stored = self.reader.read(self.plan.split, sample, meta=False)
        generators = [as_generator(seed) for seed in seeds]
        if stored.suffix in MEDIA_SUFFIXES["image"]:
            return self._read_image(stored.data, generators)
        if stored.suffix not in MEDIA_SUFFIXES["video"]:
            raise DataError(f"Sample {stored.key} is a .{stored.suffix}, which is never decoded.")
        columns = (self.table.frames, self.table.width, self.table.height)
        frames, width, height = (int(column[sample]) for column in columns)
        known = self.manifest.encoded and bool(frames and width and height)
        with open_video(stored.data, self.data.decoder, known=known) as video:
            if not known:
                info = video.info
                frames, width, height = info.frames, info.width, info.height
            fps = float(self.table.fps[sample]) or video.info.fps
            times = video.times() if self.data.seconds(self.plan.frames) else None
            indices = [self.frame_numbers(frames, fps, generator, times) for generator in generators]
            boxes = [self.transform.box(width, height, generator) for generator in generators]
            clips = video.clips(indices, boxes, self.transform.size)
        if not self.plan.training:
            return [clip.frames for clip in clips]
        return [self.transform.augment(clip.frames, draw) for clip, draw in zip(clips, generators, strict=True)]

    def frame_numbers(
        self, frames: int, fps: float, generator: torch.Generator, times: np.ndarray | None = None
    ) -> list[int]:
        """Frames of one clip: from a random place in training, from the middle when testing."""
        draws = generator if self.plan.training else None
        if self.data.segments:
            return frames_by_segments(frames, self.plan.frames, draws)
        seconds = self.data.seconds(self.plan.frames)
        if seconds and fps > 0:
            return frames_by_seconds(frames, fps, self.plan.frames, seconds, draws, times)
        return frames_by_stride(frames, self.plan.frames, self.data.stride, draws)

    def _read_image(self, data: bytes, generators: list[torch.Generator]) -> list[Tensor]:
        from PIL import Image

        with open_image(data) as image:
            upright = to_rgb(image)
        clips, (rows, columns) = [], self.transform.size
        for generator in generators:
            left, top, width, height = self.transform.box(upright.width, upright.height, generator)
            box = (left, top, left + width, top + height)
            small = upright.resize((columns, rows), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
            clip = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]  # (1, C, H, W)
            clip = clip.expand(self.plan.frames, -1, -1, -1).contiguous()  # (T, C, H, W)
            clips.append(self.transform.augment(clip, generator) if self.plan.training else clip)
        return clips


def start_worker(number: int) -> None:
    """Workers use one thread and leave signals to the training process, whose handlers they inherited."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        # timeout, Slurm and launchers signal the whole group: live on while the training process saves
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
