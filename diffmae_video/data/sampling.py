"""Which frames of a video make a clip: by a stride in frames, by a length in seconds, or one from each segment."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import numpy as np
import torch

from diffmae_video.config import DataSettings
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
    frames: int,
    fps: float,
    count: int,
    seconds: float,
    generator: torch.Generator | None,
    times: np.ndarray | None = None,
) -> list[int]:
    """Frames spread evenly over a span of `seconds`, whatever the frame rate, also where it varies.

    pytorchvideo's RandomClipSampler chooses the span (without a generator it is the middle one).

    Args:
        frames, fps: of the video.
        count: frames of the clip.
        times: when each frame of the video is shown, seconds from the first, rising; by `fps` without it.
    """
    from pytorchvideo.data.clip_sampling import RandomClipSampler

    times = frame_times(frames, fps, times)
    duration = duration_of(times)
    if generator is None:
        start = max(0.0, duration - seconds) / 2
    else:
        with draws_from(generator):
            start = float(RandomClipSampler(seconds)(0.0, duration, {}).clip_start_sec)
    return frames_between(times, count, start, seconds)


def frames_by_segments(frames: int, count: int, generator: torch.Generator | None) -> list[int]:
    """One frame from each of `count` equal parts of the video: drawn, or the middle one without a generator.

    Args:
        frames: frames of the video; where there are fewer than parts, some repeat.
    """
    offsets = torch.full((count,), 0.5) if generator is None else torch.rand(count, generator=generator)
    return [min(int((part + offset) * frames / count), frames - 1) for part, offset in enumerate(offsets.tolist())]


def duration_of(times: np.ndarray) -> float:
    """How long a video lasts whose frames are shown at `times`, seconds: the last one as long as most."""
    return float(times[-1]) + _gap(times)


def frame_times(frames: int, fps: float, times: np.ndarray | None) -> np.ndarray:
    """When frames are shown: `times` where the packets tell it for each of them, else by the rate."""
    return times if times is not None and len(times) == frames else np.arange(frames) / fps


def frames_between(times: np.ndarray, count: int, start: float, seconds: float) -> list[int]:
    """`count` frames spread evenly over those shown in [start, start + seconds).

    At a constant rate they are those of pytorchvideo's UniformTemporalSubsample.
    """
    slack = 1e-6 * _gap(times)
    first = min(int(np.searchsorted(times, start - slack)), len(times) - 1)
    last = min(max(first, int(np.searchsorted(times, start + seconds - slack)) - 1), len(times) - 1)
    instants = np.linspace(times[first], times[last], count)
    return (np.searchsorted(times, instants + slack, side="right") - 1).clip(first, last).tolist()


def stride_at(data: DataSettings, frames: int, fps: float) -> int:
    """The stride, in frames of a video of that rate, that shows a clip at the speed of training."""
    seconds = data.seconds(frames)
    return max(1, round(seconds * fps / frames)) if seconds and fps > 0 else data.stride


def _gap(times: np.ndarray) -> float:
    return float(np.median(np.diff(times))) if len(times) > 1 else 1.0
