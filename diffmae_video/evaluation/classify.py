"""One pass over a split: every video decoded once, all its views computed, one result a video.

The same pass serves multi-view classification (softmax averaged over views) and feature extraction (features
averaged over views); what differs is the `forward` that maps clips to rows.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import diffmae_video.compat  # noqa: F401

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffmae_video.data.decode import Source, Video
from diffmae_video.data.images import read_image
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.media import read_head, sniff
from diffmae_video.data.shards import ShardReader
from diffmae_video.errors import DataError, StorageError
from diffmae_video.evaluation.records import PassStore
from diffmae_video.evaluation.views import (
    IMAGE_RESIZE,
    Protocol,
    ViewPlan,
    cut_view,
    plan_views,
    scaled_size,
)
from diffmae_video.processes import safe_path


@dataclass(frozen=True)
class ViewSettings:
    """What is cut from each video: how many views, and clips of T frames, `stride` apart, at H x W pixels.

    `protocol` names which frames and boxes they are (evaluation/protocols.py), `seconds` is the length of a clip where
    training counts in seconds.
    """

    protocols: tuple[Protocol, ...]
    frames: int
    stride: int
    size: tuple[int, int]
    protocol: str = "stride"
    seconds: float | None = None

    @property
    def timing(self) -> str:
        """How clips lie in time, for people."""
        if self.frames == 1:
            return "single images"
        if self.protocol == "segments":
            return f"one from each of {self.frames} segments"
        if self.seconds and self.protocol != "videomae":
            return f"over {self.seconds:.4g} s ({self.protocol})"
        if self.protocol == "slowfast":
            return f"stride {self.stride} at 30 frames a second (slowfast)"
        return f"stride {self.stride}" + (f" ({self.protocol})" if self.protocol != "stride" else "")


@dataclass(frozen=True)
class DecodedVideo:
    """The frames that the views of a video need, each decoded and scaled once."""

    plan: ViewPlan
    needed: list[int]  # frame numbers, ascending
    frames: Tensor  # uint8 (U, C, h, w), in that order
    size: tuple[int, int]
    protocol: str = "stride"

    def view(self, index: int, out: Tensor | None = None) -> Tensor:
        """View `index` of the plan, uint8 (T, C, H, W), written into `out` where given."""
        return cut_view(self.frames, self.needed, self.plan.views[index], self.size, out, self.protocol)


def decode_views(source: Source, settings: ViewSettings) -> DecodedVideo:
    """Decode a video or an image, from bytes or a path, once for all its views.

    Raises:
        DataError: it is neither, or cannot be decoded.
    """
    head = source[:1024] if isinstance(source, bytes) else read_head(source)
    if (sniff(head) or "").startswith("image:"):
        image = read_image(source)  # (C, h, w)
        size = scaled_size(image.shape[1], image.shape[2], settings.size, IMAGE_RESIZE)
        plan = plan_views(settings.protocols, 1, settings.frames, settings.stride)
        return DecodedVideo(plan, [0], _resize(image[None], size), settings.size)
    with Video(source) as video:
        info = video.info
        if info.frames < 1:
            raise DataError(f"{video.name} has no frame that can be decoded; replace or remove it.")
        plan = plan_views(
            settings.protocols,
            info.frames,
            settings.frames,
            settings.stride,
            protocol=settings.protocol,
            seconds=settings.seconds,
            fps=info.fps,
            times=video.times() if settings.protocol == "seconds" else None,
        )
        needed = plan.frames
        size = scaled_size(info.height, info.width, settings.size, protocol=settings.protocol)
        frames = video.clips([needed], size=size)[0].frames  # (U, C, h, w)
    return DecodedVideo(plan, needed, frames, settings.size, settings.protocol)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    return resize(images, list(size), InterpolationMode.BICUBIC, antialias=True)


class SplitViews(Dataset):
    """Blocks of decoded videos of a split; item i is block i, a list of (sample, DecodedVideo or reason of failure).

    Args:
        samples: indices within the split, in the order of the blocks.
        block: videos in a block; blocks, not videos, are dealt out to processes, so batches are always the same.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        settings: ViewSettings,
        samples: Sequence[int],
        block: int,
        cache_dir: str | None = None,
        cache_gib: float = 50.0,
    ) -> None:
        self.manifest, self.split, self.settings = manifest, split, settings
        self.blocks = [list(samples[start : start + block]) for start in range(0, len(samples), block)]
        self._cache = (cache_dir, cache_gib)
        self._reader: ShardReader | None = None
        manifest.samples(split)  # read the table here, once, rather than in every worker

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, block: int) -> tuple[int, list[tuple[int, DecodedVideo | str]] | StorageError]:
        if self._reader is None:
            self._reader = ShardReader(self.manifest, *self._cache)
        found: list[tuple[int, DecodedVideo | str]] = []
        for sample in self.blocks[block]:
            try:
                stored = self._reader.read(self.split, sample, meta=False)
                found.append((sample, decode_views(stored.data, self.settings)))
            except StorageError as error:  # says nothing about the sample
                return block, error
            except Exception as error:  # whatever a damaged sample makes a library raise
                found.append((sample, str(error) or type(error).__name__))
        return block, found


def videos_per_block(protocols: Sequence[Protocol], batch_views: int) -> int:
    """Videos whose views fill one batch; at least one."""
    views = sum(protocol.temporal * protocol.spatial for protocol in protocols)
    return max(1, batch_views // views)


@torch.inference_mode()
def run_pass(
    forward: Callable[[Tensor], Tensor],
    dataset: SplitViews,
    store: PassStore,
    *,
    batch_views: int,
    device: torch.device | str = "cpu",
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[int, int], None] = lambda videos, failed: None,
) -> None:
    """Compute the blocks of this process that no run has finished yet, and put each video's result into the store.

    Args:
        forward: clips uint8 (B, T, C, H, W) on the device -> rows (B, ...) float32 that are averaged over views.
        batch_views: most views in one call of `forward`.
        dtype: what the means are stored as.
        advance: told after each block how many videos it held and how many of them failed.

    Stored for each video, under the name of each protocol: the mean of its views' rows.
    """
    done = store.done()
    mine = [block for block in range(rank, len(dataset), world) if block not in done]
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=mine,
        num_workers=min(workers, len(mine)),
        prefetch_factor=2 if mine and workers else None,
        worker_init_fn=_start_worker,
    )
    view = dataset.settings
    clips = torch.empty(batch_views, view.frames, 3, *view.size, dtype=torch.uint8)  # (B, T, C, H, W), used again
    names = [str(protocol) for protocol in dataset.settings.protocols]
    with safe_path():
        blocks = iter(loader)
    for block, videos in blocks:
        if isinstance(videos, StorageError):
            raise videos
        decoded = [(sample, video) for sample, video in videos if isinstance(video, DecodedVideo)]
        views = [(video, index) for _, video in decoded for index in range(len(video.plan.views))]
        rows = []
        for start in range(0, len(views), batch_views):
            part = views[start : start + batch_views]
            for slot, (video, index) in enumerate(part):
                video.view(index, clips[slot])
            rows.append(forward(clips[: len(part)].to(device)).cpu())
        flat = torch.cat(rows) if rows else torch.zeros(0)
        results, start = {}, 0
        for sample, video in decoded:
            own = flat[start : start + len(video.plan.views)].double()  # (views, ...)
            start += len(own)
            means = (own[list(members)].mean(dim=0).to(dtype) for members in video.plan.members)
            results[sample] = dict(zip(names, means, strict=True))
        failed = {sample: reason for sample, reason in videos if isinstance(reason, str)}
        store.add(int(block), results, failed)
        advance(len(videos), len(failed))
    store.flush()


def _start_worker(number: int) -> None:
    """Workers use one thread, and leave signals to the process that started them, whose handlers they inherited."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
