"""Which frames of a video make a clip: by a stride in frames, or by a length in seconds."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import numpy as np
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


def frames_by_seconds(times: np.ndarray, count: int, seconds: float, generator: torch.Generator | None) -> list[int]:
    """Frames spread evenly over a span of `seconds`, whatever the frame rate, also where it varies.

    pytorchvideo's RandomClipSampler chooses the span (without a generator it is the middle one). At a constant rate the
    frames are those of its UniformTemporalSubsample over the frames shown in [start, end).

    Args:
        times: when each frame of the video is shown, seconds from the first, rising.
        count: frames of the clip.
    """
    from pytorchvideo.data.clip_sampling import RandomClipSampler

    gap = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    duration = float(times[-1]) + gap
    if generator is None:
        start = max(0.0, duration - seconds) / 2
    else:
        with draws_from(generator):
            start = float(RandomClipSampler(seconds)(0.0, duration, {}).clip_start_sec)
    slack = 1e-6 * gap
    first = min(int(np.searchsorted(times, start - slack)), len(times) - 1)
    last = min(max(first, int(np.searchsorted(times, start + seconds - slack)) - 1), len(times) - 1)
    instants = np.linspace(times[first], times[last], count)
    return (np.searchsorted(times, instants + slack, side="right") - 1).clip(first, last).tolist()
