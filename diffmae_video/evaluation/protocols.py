"""Which frames and which boxes a test looks at: the protocols of the peers, by name.

- `slowfast`: SlowFast and MAE-ST. A span of T * stride frames at 30 a second, stretched by fps / 30.
- `videomae`: VideoMAE. Every stride-th frame of the whole video, and windows of T of these.
- `segments`: VideoMAE on Something-Something. A frame from each of T equal parts, clip k at k / K of each part.
- `seconds`: spans of the length trained with (`data.clip_seconds`, `data.fps`), by the times of frames.
- `stride`: frames `data.stride` apart, as in training, from the first frame to the last.

A single clip stands in the middle. Past the end of a short video its last frame repeats. The first three cut the longer
side of a scaled frame to an integer, as their authors do; SlowFast's middle crop is rounded up, VideoMAE's down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import diffmae_video.compat  # noqa: F401

import numpy as np
import torch

from diffmae_video.data.sampling import duration_of, frame_times, frames_between

PEERS_RATE = 30.0
"""Frames a second in which SlowFast counts strides."""


@dataclass(frozen=True)
class Timing:
    """How a clip lies in time: T frames, `stride` apart, or evenly over so many seconds."""

    frames: int
    stride: int
    seconds: float | None = None


@dataclass(frozen=True)
class Timeline:
    """Frames of a video: how many, how many a second (0 = unknown), and when each is shown, where that is known."""

    frames: int
    fps: float = 0.0
    times: np.ndarray | None = None


def clip_starts(total: int, frames: int, stride: int, clips: int) -> list[int]:
    """First frames of `clips` evenly spread clips of T frames; a single one stands in the middle."""
    slack = max(total - ((frames - 1) * stride + 1), 0)
    if clips == 1:
        return [slack // 2]
    return [round(Fraction(slack * index, clips - 1)) for index in range(clips)]


def clip_frames(start: int, total: int, frames: int, stride: int) -> tuple[int, ...]:
    """The T frame indices of a clip; past the end of a short video the last frame repeats."""
    return tuple(min(start + index * stride, total - 1) for index in range(frames))


def stride_clips(video: Timeline, timing: Timing, clips: int) -> list[tuple[int, ...]]:
    """Frames `stride` apart; the first clip begins with the first frame, the last one ends with the last."""
    starts = clip_starts(video.frames, timing.frames, timing.stride, clips)
    return [clip_frames(start, video.frames, timing.frames, timing.stride) for start in starts]


def slowfast_clips(video: Timeline, timing: Timing, clips: int) -> list[tuple[int, ...]]:
    """SlowFast's and MAE-ST's spans, with their offsets rounded down, and their frames cut to integers."""
    rate = video.fps if video.fps > 0 else PEERS_RATE
    seconds = timing.seconds or timing.frames * timing.stride / PEERS_RATE
    span = seconds * rate  # frames of this video, not whole
    room = max(video.frames - span, 0.0)
    step = math.floor(room / 2 if clips == 1 else room / (clips - 1))
    starts = [step] if clips == 1 else [step * index for index in range(clips)]
    found = []
    for start in starts:
        places = torch.linspace(start, start + span - 1, timing.frames)  # float32, as theirs
        found.append(tuple(places.clamp(0, video.frames - 1).long().tolist()))
    return found


def videomae_clips(video: Timeline, timing: Timing, clips: int) -> list[tuple[int, ...]]:
    """VideoMAE's windows over every stride-th frame of the video."""
    kept = list(range(0, video.frames, timing.stride))
    kept += kept[-1:] * (timing.frames - len(kept))
    room = len(kept) - timing.frames
    starts = [room // 2] if clips == 1 else [room * index // (clips - 1) for index in range(clips)]
    return [tuple(kept[start : start + timing.frames]) for start in starts]


def segments_clips(video: Timeline, timing: Timing, clips: int) -> list[tuple[int, ...]]:
    """A frame from each of T parts of L / T frames: clip k at k / K of each part, a single clip at the middle."""
    part = Fraction(video.frames, timing.frames)
    offsets = [Fraction(1, 2)] if clips == 1 else [Fraction(index, clips) for index in range(clips)]
    return [tuple(int(part * (index + offset)) for index in range(timing.frames)) for offset in offsets]


def seconds_clips(video: Timeline, timing: Timing, clips: int) -> list[tuple[int, ...]]:
    """Spans of `timing.seconds`, evenly from the begin to the end, as training takes them."""
    if timing.seconds is None:
        raise ValueError("the protocol `seconds` needs the length of a clip")
    if video.fps <= 0 and video.times is None:  # no clock: count frames, as training does
        return stride_clips(video, timing, clips)
    times = frame_times(video.frames, video.fps, video.times)
    room = max(0.0, duration_of(times) - timing.seconds)
    starts = [room / 2] if clips == 1 else [room * index / (clips - 1) for index in range(clips)]
    return [tuple(frames_between(times, timing.frames, start, timing.seconds)) for start in starts]


@dataclass(frozen=True)
class TestProtocol:
    """How clips are chosen, and how the longer side of a scaled frame and a crop's corner become integers.

    Without `corner` a crop in the middle is rounded down, the others to the nearest pixel.
    """

    __test__ = False  # for pytest

    clips: Callable[[Timeline, Timing, int], list[tuple[int, ...]]]
    side: Callable[[Fraction], int] = round
    corner: Callable[[Fraction], int] | None = None


PROTOCOLS: dict[str, TestProtocol] = {
    "slowfast": TestProtocol(slowfast_clips, math.floor, math.ceil),
    "videomae": TestProtocol(videomae_clips, math.floor, math.floor),
    "segments": TestProtocol(segments_clips, math.floor, math.floor),
    "seconds": TestProtocol(seconds_clips),
    "stride": TestProtocol(stride_clips),
}
