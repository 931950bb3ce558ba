"""Test views: which clips and crops of a video a protocol such as 7x3 looks at, planned so that it is decoded once.

KxS takes K clips spread over the video and S crops spread evenly over the longer side of the frame; which frames and
boxes these are is told by protocols.py. Several share one plan: what they have in common is computed once. Geometry
only; nothing here decodes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import diffmae_video.compat  # noqa: F401

import numpy as np
from torch import Tensor

from diffmae_video.errors import UsageError
from diffmae_video.evaluation.protocols import PROTOCOLS, Timeline, Timing

IMAGE_RESIZE = 256 / 224  # an image is scaled so that the centre crop leaves a margin (MAE's evaluation)


@dataclass(frozen=True)
class Protocol:
    """K temporal clips times S spatial crops."""

    temporal: int
    spatial: int

    def __str__(self) -> str:
        return f"{self.temporal}x{self.spatial}"


@dataclass(frozen=True)
class View:
    """One clip of one crop: `frames` index the video, `place` in [0, 1] lies along the longer side of the frame."""

    frames: tuple[int, ...]
    place: Fraction


@dataclass(frozen=True)
class ViewPlan:
    """The distinct views of a video, and which of them each protocol averages."""

    views: tuple[View, ...]
    members: tuple[tuple[int, ...], ...]  # per protocol, K*S indices into views (a short video repeats views)

    @property
    def frames(self) -> list[int]:
        """Every frame that some view needs, ascending, once."""
        return sorted({frame for view in self.views for frame in view.frames})


def parse_views(text: str) -> tuple[Protocol, ...]:
    """Read `7x3` or several, `1x1,5x3,7x3`.

    Raises:
        UsageError: not of that form, or a number below 1.
    """
    protocols = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d{0,3})x([1-9]\d{0,2})\s*", part)
        if not match:
            raise UsageError(f"--views {text}: write CLIPSxCROPS, for example 5x3, or several as 1x1,5x3,7x3.")
        protocol = Protocol(int(match[1]), int(match[2]))
        if protocol not in protocols:
            protocols.append(protocol)
    return tuple(protocols)


def plan_views(
    protocols: tuple[Protocol, ...],
    total: int,
    frames: int,
    stride: int,
    *,
    protocol: str = "stride",
    seconds: float | None = None,
    fps: float = 0.0,
    times: np.ndarray | None = None,
) -> ViewPlan:
    """Plan the views of a video of `total` frames for clips of T `frames`, `stride` apart.

    Args:
        protocol: which frames they are, a name of `PROTOCOLS`.
        seconds: length of a clip where training counts in seconds.
        fps, times: of the video; when each of its frames is shown, where the packets tell.
    """
    if total < 1:
        raise ValueError(f"a video has at least one frame, not {total}")
    numbered: dict[View, int] = {}
    members = []
    video, timing = Timeline(total, fps, times), Timing(frames, stride, seconds)
    for views in protocols:
        places = [Fraction(1, 2)] if views.spatial == 1 else _evenly(views.spatial)
        chosen = []
        for clip in PROTOCOLS[protocol].clips(video, timing, views.temporal):
            for place in places:
                view = View(clip, place)
                chosen.append(numbered.setdefault(view, len(numbered)))
        members.append(tuple(chosen))
    return ViewPlan(tuple(numbered), tuple(members))


def scaled_size(
    height: int, width: int, crop: tuple[int, int], margin: float = 1.0, protocol: str = "stride"
) -> tuple[int, int]:
    """Height and width to which a frame is scaled so that the crop fits with the given margin, aspect kept."""
    side = PROTOCOLS[protocol].side
    scale = max(Fraction(crop[0], height), Fraction(crop[1], width)) * Fraction(margin)
    return max(side(height * scale), crop[0]), max(side(width * scale), crop[1])


def crop_corner(
    height: int, width: int, crop: tuple[int, int], place: Fraction, protocol: str = "stride"
) -> tuple[int, int]:
    """Top and left of a crop: `place` moves it along the side with more room; on the other it is centred."""
    room = height - crop[0], width - crop[1]
    along = 0 if room[0] > room[1] else 1
    corner = PROTOCOLS[protocol].corner
    if corner is None:
        corner = math.floor if place == Fraction(1, 2) else round
    found = [room[0] // 2, room[1] // 2]
    found[along] = corner(room[along] * place)
    return found[0], found[1]


def cut_view(
    frames: Tensor,
    needed: list[int],
    view: View,
    crop: tuple[int, int],
    out: Tensor | None = None,
    protocol: str = "stride",
) -> Tensor:
    """Cut one view out of the decoded frames of a plan.

    Args:
        frames: uint8 (U, C, h, w), the frames of `ViewPlan.frames` in that order, scaled.
        needed: `ViewPlan.frames`.
        crop: H and W.
        out: uint8 (T, C, H, W) to write into; a new tensor without it. Memory that is used again is several times
            faster to fill than fresh memory.
        protocol: whose boxes, a name of `PROTOCOLS`.

    Returns:
        uint8 (T, C, H, W).
    """
    position = {frame: row for row, frame in enumerate(needed)}
    top, left = crop_corner(frames.shape[-2], frames.shape[-1], crop, view.place, protocol)
    cropped = frames[:, :, top : top + crop[0], left : left + crop[1]]  # (U, C, H, W)
    if out is None:
        out = frames.new_empty(len(view.frames), *cropped.shape[1:])
    for row, frame in enumerate(view.frames):
        out[row].copy_(cropped[position[frame]])
    return out


def _evenly(count: int) -> list[Fraction]:
    return [Fraction(index, count - 1) for index in range(count)]
