"""Which frames of a video make a clip: by a stride in frames, or by a length in seconds."""

from __future__ import annotations

import math

import diffmae_video.compat  # noqa: F401

import torch

from diffmae_video.data.transforms import draws_from


def frames_by_stride(frames: int, count: int, stride: int, generator: torch.Generator | None) -> list[int]:
    """Every `stride`-th frame from a random start, or around the middle without a generator.

    Args:
        frames: frames of the video; where they do not suffice the last one repeats.
        count: frames of the clip.
    """
    room = max(0, frames - (count - 1) * stride - 1)
    start = room // 2 if generator is None else int(torch.randint(0, room + 1, (), generator=generator))
    return [min(start + i * stride, frames - 1) for i in range(count)]


def frames_by_seconds(
    frames: int, fps: float, count: int, seconds: float, generator: torch.Generator | None
) -> list[int]:
    """Frames spread evenly over a span of `seconds`, whatever the frame rate.

    pytorchvideo's RandomClipSampler chooses the span (without a generator it is the middle one), and the frames are
    those of its UniformTemporalSubsample over the frames shown in [start, end).
    """
    from pytorchvideo.data.clip_sampling import RandomClipSampler

    duration = frames / fps
    if generator is None:
        start = max(0.0, duration - seconds) / 2
    else:
        with draws_from(generator):
            start = float(RandomClipSampler(seconds)(0.0, duration, {}).clip_start_sec)
    first = min(math.ceil(start * fps - 1e-6), frames - 1)
    last = min(max(first, math.ceil((start + seconds) * fps - 1e-6) - 1), frames - 1)
    return torch.linspace(first, last, count).long().tolist()
