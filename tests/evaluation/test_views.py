"""The plan of test views: counts, positions, sharing, and the crop against slicing by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from diffmae_video.errors import UsageError
from diffmae_video.evaluation.protocols import clip_starts
from diffmae_video.evaluation.views import (
    Protocol,
    View,
    crop_corner,
    cut_view,
    parse_views,
    plan_views,
    scaled_size,
)


def test_parse() -> None:
    assert parse_views("7x3") == (Protocol(7, 3),)
    assert [str(protocol) for protocol in parse_views("1x1, 5x3,5x3,7x3")] == ["1x1", "5x3", "7x3"]


@pytest.mark.parametrize("text", ["", "7", "0x3", "3x0", "7*3", "-1x3", "7x3,", "99999x1"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="CLIPSxCROPS"):
        parse_views(text)


def test_starts_reach_both_ends_evenly() -> None:
    assert clip_starts(300, 16, 4, 7) == [0, 40, 80, 120, 159, 199, 239]  # 239 slack frames in 6 steps, rounded
    assert clip_starts(300, 16, 4, 1) == [119]
    assert clip_starts(61, 16, 4, 5) == [0] * 5  # exactly one clip fits
    assert clip_starts(10, 16, 4, 2) == [0, 0]


def test_plan_counts_and_last_frame() -> None:
    plan = plan_views(parse_views("7x3"), total=300, frames=16, stride=4)
    assert len(plan.views) == 21
    assert plan.members == (tuple(range(21)),)
    assert max(plan.frames) == 299
    assert plan.frames == sorted(set(plan.frames))
    assert all(len(view.frames) == 16 for view in plan.views)


def test_short_video_repeats_its_last_frame_and_shares_views() -> None:
    plan = plan_views(parse_views("5x3"), total=10, frames=16, stride=4)
    assert len(plan.views) == 3  # five clips are one
    assert len(plan.members[0]) == 15
    assert plan.views[0].frames == (0, 4, 8) + (9,) * 13
    assert plan_views(parse_views("2x3"), total=1, frames=2, stride=1).frames == [0]


def test_protocols_share_views() -> None:
    together = plan_views(parse_views("1x1,5x3,7x3"), total=300, frames=16, stride=4)
    alone = [plan_views((protocol,), 300, 16, 4) for protocol in parse_views("1x1,5x3,7x3")]
    assert len(together.views) < sum(len(plan.views) for plan in alone)
    for members, plan in zip(together.members, alone, strict=True):
        assert [together.views[index] for index in members] == [plan.views[index] for index in plan.members[0]]


def test_no_frame_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        plan_views(parse_views("1x1"), 0, 16, 4)


@pytest.mark.parametrize(
    ("frame", "crop", "margin", "expected"),
    [
        ((240, 320), (224, 224), 1.0, (224, 299)),
        ((320, 240), (224, 224), 1.0, (299, 224)),
        ((500, 375), (224, 224), 256 / 224, (341, 256)),
        ((100, 100), (64, 128), 1.0, (128, 128)),
        ((8, 320), (224, 224), 1.0, (224, 8960)),
    ],
)
def test_scaled_size(frame: tuple[int, int], crop: tuple[int, int], margin: float, expected: tuple[int, int]) -> None:
    assert scaled_size(*frame, crop, margin) == expected


def test_crops_lie_along_the_longer_side() -> None:
    places = [Fraction(0), Fraction(1, 2), Fraction(1)]
    assert [crop_corner(224, 299, (224, 224), place) for place in places] == [(0, 0), (0, 37), (0, 75)]
    assert [crop_corner(299, 224, (224, 224), place) for place in places] == [(0, 0), (37, 0), (75, 0)]
    assert [crop_corner(128, 128, (64, 128), place) for place in places] == [(0, 0), (32, 0), (64, 0)]


def test_cut_view_equals_slicing() -> None:
    frames = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip = cut_view(frames, [2, 5, 9], View((5, 9, 9, 2), Fraction(1)), (8, 8))
    assert torch.equal(clip, torch.stack([frames[1], frames[2], frames[2], frames[0]])[:, :, :, 4:12])
