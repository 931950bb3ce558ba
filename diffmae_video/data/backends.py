"""Which library decodes the frames of training and validation clips: `data.decoder`.

Both choose the same frames. PyAV crops and scales inside swscale before colours are converted; torchcodec gives whole
RGB frames, and PyTorch crops and scales them: pixels are the same to rounding.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmae_video.data.decode import Clip, Video
from diffmae_video.data.media import DEFAULT_LIMITS, Limits
from diffmae_video.data.paint import Box
from diffmae_video.data.video_file import Source
from diffmae_video.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_ALIKE = ("mov", "matroska")
"""Containers in which the two libraries count frames alike."""


def open_video(source: Source, decoder: str = "auto", limits: Limits = DEFAULT_LIMITS, known: bool = False) -> Video:
    """A video whose frames `decoder` decodes: `pyav`, `torchcodec`, or `auto`; the other arguments are `Video`'s.

    `auto` is PyAV: it takes what the frames need and no more, which is faster (benchmarks/data.py).

    Raises:
        UsageError: torchcodec is asked for and cannot be loaded.
        DataError: see `Video`.
    """
    if decoder != "torchcodec":
        return Video(source, limits, known)
    return TorchcodecVideo(load_torchcodec(), source, limits, known)


def load_torchcodec() -> Any:
    """The module `torchcodec.decoders`.

    Raises:
        UsageError: it is not installed, or not for this PyTorch, or there is no FFmpeg for it.
    """
    try:
        decoders = importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:
        reason = "it is not installed" if isinstance(error, ModuleNotFoundError) else "its libraries do not load"
        raise UsageError(
            f"data.decoder = torchcodec: {reason}; pip install 'diffmae-video[torchcodec]' in the release for this "
            "PyTorch, with FFmpeg's shared libraries, or leave data.decoder at auto."
        ) from error
    return decoders


class TorchcodecVideo(Video):
    """A video that is opened and checked as every other, and whose frames come from torchcodec, on the CPU.

    Where the two might not mean the same frames or show them alike (turned or stretched pictures, high dynamic range,
    other containers, frame counts that differ), and where torchcodec fails, PyAV decodes.
    """

    def __init__(self, decoders: Any, source: Source, limits: Limits = DEFAULT_LIMITS, known: bool = False):
        super().__init__(source, limits, known)
        self._decoders = decoders

    def clips(
        self,
        indices: Sequence[Sequence[int]],
        crops: Sequence[Box | None] | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[Clip]:
        """Decode several clips in one pass over the video; see `Video.clips`."""
        numbers = sorted({int(number) for clip in indices for number in clip})
        frames = None
        if self.format in _ALIKE and self.display.plain:
            try:
                decoder = self._decoders.VideoDecoder(
                    self.data, stream_index=self.stream.index, num_ffmpeg_threads=1, seek_mode="exact"
                )
                if len(decoder) == self.frames and numbers[-1] < len(decoder):
                    frames = decoder.get_frames_at(numbers)
            except (RuntimeError, ValueError, IndexError):  # what its C++ raises
                frames = None
        if frames is None:
            return super().clips(indices, crops, size)
        made = []
        for clip, crop in zip(indices, crops or [None] * len(indices), strict=True):
            places = np.searchsorted(numbers, np.asarray(clip))
            made.append(Clip(_cut(frames.data[places], crop, size), frames.pts_seconds[places]))
        return made


def _cut(frames: Tensor, crop: Box | None, size: tuple[int, int] | None) -> Tensor:
    """Frames uint8 (T, C, H, W), cropped and scaled."""
    import torch.nn.functional as F

    if crop is not None:
        left, top, width, height = crop
        if left < 0 or top < 0 or left + width > frames.shape[3] or top + height > frames.shape[2]:
            raise ValueError(f"crop {crop} does not fit a frame of {frames.shape[3]}x{frames.shape[2]}")
        frames = frames[..., top : top + height, left : left + width]
    if size is None or tuple(frames.shape[2:]) == tuple(size):
        return frames.contiguous()
    return F.interpolate(frames, tuple(size), mode="bilinear", antialias=True)
