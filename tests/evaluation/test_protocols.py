"""Which frames and boxes the peers' tests look at, against values worked out by hand and by loops over their rules."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffmae_video.config import Settings, with_overrides
from diffmae_video.data.batches import ClipReader, StreamPlan
from diffmae_video.data.datasets import dataset_info
from diffmae_video.errors import UsageError
from diffmae_video.evaluation.protocols import PROTOCOLS, Timeline, Timing
from diffmae_video.evaluation.views import crop_corner, parse_views, plan_views, scaled_size
from diffmae_video.pipelines.classifiers import Loaded
from diffmae_video.pipelines.tasks import view_settings

CLIP = Timing(16, 4)


def starts(name: str, frames: int, fps: float, clips: int, timing: Timing = CLIP) -> list[int]:
    return [clip[0] for clip in PROTOCOLS[name].clips(Timeline(frames, fps), timing, clips)]


def test_slowfast_stretches_a_clip_by_the_rate() -> None:
    """10 s: 64 frames of 300 at 30 a second, 128 of 600 at 60, 32 of 150 at 15."""
    assert starts("slowfast", 300, 30.0, 7) == [0, 39, 78, 117, 156, 195, 234]  # floor(236 / 6) = 39
    assert starts("slowfast", 600, 60.0, 7) == [0, 78, 156, 234, 312, 390, 468]  # floor(472 / 6) = 78
    assert starts("slowfast", 300, 30.0, 1) == [118]
    at30, at60, at15 = (
        PROTOCOLS["slowfast"].clips(Timeline(int(10 * fps), fps), CLIP, 1)[0] for fps in (30.0, 60.0, 15.0)
    )
    # 118 + 4.2 i, 236 + 127 / 15 i and 59 + 31 / 15 i, cut to integers; i = 5, 10 and 15 are whole numbers
    assert at30 == (118, 122, 126, 130, 134, 139, 143, 147, 151, 155, 160, 164, 168, 172, 176, 181)
    assert at60 == (236, 244, 252, 261, 269, 278, 286, 295, 303, 312, 320, 329, 337, 346, 354, 363)
    assert at15 == (59, 61, 63, 65, 67, 69, 71, 73, 75, 77, 79, 81, 83, 85, 87, 90)


def test_slowfast_on_short_videos_repeats_the_last_frame() -> None:
    clips = PROTOCOLS["slowfast"].clips(Timeline(20, 30.0), CLIP, 3)
    assert clips == [(0, 4, 8, 12, 16) + (19,) * 11] * 3


def test_slowfast_takes_the_length_of_training() -> None:
    by_seconds = PROTOCOLS["slowfast"].clips(Timeline(250, 25.0), Timing(16, 1, 64 / 30), 5)
    assert by_seconds == PROTOCOLS["slowfast"].clips(Timeline(250, 25.0), CLIP, 5)


@pytest.mark.parametrize(("frames", "clips"), [(300, 5), (300, 7), (61, 5), (64, 5), (65, 2), (10, 5), (1, 3)])
def test_videomae_slides_over_every_fourth_frame(frames: int, clips: int) -> None:
    kept = []
    for frame in range(frames):
        if frame % 4 == 0:
            kept.append(frame)
    while len(kept) < 16:
        kept.append(kept[-1])
    step = max((len(kept) - 16) / (clips - 1), 0)
    expected = [tuple(kept[int(clip * step) : int(clip * step) + 16]) for clip in range(clips)]
    for fps in (15.0, 60.0):  # frames are counted, whatever the rate
        assert PROTOCOLS["videomae"].clips(Timeline(frames, fps), CLIP, clips) == expected


def test_videomae_by_hand() -> None:
    assert starts("videomae", 300, 30.0, 5) == [0, 56, 116, 176, 236]  # 75 kept, 59 / 4 = 14.75: 0, 14, 29, 44, 59
    assert starts("videomae", 300, 30.0, 1) == [116]


def test_segments_take_one_frame_from_each_part() -> None:
    """48 frames, 16 parts of 3: clip 0 begins each part, clip 1 is half a part (1.5) later."""
    first, second = PROTOCOLS["segments"].clips(Timeline(48, 12.0), Timing(16, 2), 2)
    assert first == (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45)
    assert second == (1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37, 40, 43, 46)
    assert PROTOCOLS["segments"].clips(Timeline(48, 12.0), Timing(16, 2), 1) == [second]


@pytest.mark.parametrize("frames", [5, 16, 37, 117])
def test_segments_equal_the_sorted_halves_of_videomae(frames: int) -> None:
    tick = frames / 16
    both = sorted([int(tick / 2 + tick * x) for x in range(16)] + [int(tick * x) for x in range(16)])
    expected = [tuple(both[0::2]), tuple(both[1::2])]
    assert PROTOCOLS["segments"].clips(Timeline(frames), Timing(16, 2), 2) == expected


def test_seconds_follow_the_clock() -> None:
    timing = Timing(5, 1, 1.0)
    clips = PROTOCOLS["seconds"].clips(Timeline(100, 10.0), timing, 3)  # 10 s; starts 0, 4.5 and 9 s
    assert clips == [(0, 2, 4, 6, 9), (45, 47, 49, 51, 54), (90, 92, 94, 96, 99)]
    times = np.concatenate([np.arange(10) / 10, 1 + np.arange(40) / 40])  # 1 s at 10 a second, 1 s at 40
    first, last = PROTOCOLS["seconds"].clips(Timeline(50, 25.0, times), timing, 2)
    assert (first[0], first[-1]) == (0, 9)
    assert (last[0], last[-1]) == (10, 49)
    with pytest.raises(ValueError, match="length of a clip"):
        PROTOCOLS["seconds"].clips(Timeline(100, 10.0), CLIP, 1)


@pytest.mark.parametrize(
    ("protocol", "frame", "scaled", "corners"),
    [  # 240x320 -> 224 x 298.67; room of the three boxes along the longer side
        ("slowfast", (240, 320), (224, 298), [(0, 0), (0, 37), (0, 74)]),
        ("videomae", (240, 320), (224, 298), [(0, 0), (0, 37), (0, 74)]),
        ("stride", (240, 320), (224, 299), [(0, 0), (0, 37), (0, 75)]),
        ("slowfast", (256, 340), (224, 297), [(0, 0), (0, 37), (0, 73)]),  # 297.5; the middle rounds up: 36.5 -> 37
        ("videomae", (256, 340), (224, 297), [(0, 0), (0, 36), (0, 73)]),
        ("segments", (340, 256), (297, 224), [(0, 0), (36, 0), (73, 0)]),
        ("slowfast", (340, 256), (297, 224), [(0, 0), (37, 0), (73, 0)]),
    ],
)
def test_boxes(protocol: str, frame: tuple[int, int], scaled: tuple[int, int], corners: list[tuple[int, int]]) -> None:
    assert scaled_size(*frame, (224, 224), protocol=protocol) == scaled
    places = [Fraction(0), Fraction(1, 2), Fraction(1)]
    assert [crop_corner(*scaled, (224, 224), place, protocol) for place in places] == corners


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_every_protocol_stays_inside_the_video(protocol: str) -> None:
    for total in (1, 2, 15, 16, 17, 64, 301):
        for fps in (0.0, 7.5, 29.97, 120.0):
            plan = plan_views(parse_views("4x3"), total, 16, 4, protocol=protocol, seconds=2.0, fps=fps)
            assert len(plan.members[0]) == 12
            assert 0 <= plan.frames[0] <= plan.frames[-1] < total
            assert all(list(view.frames) == sorted(view.frames) and len(view.frames) == 16 for view in plan.views)


def test_tasks_name_their_protocol() -> None:
    own = {name: dataset_info(name).protocol for name in ("k400", "ssv2", "ucf101", "hmdb51")}
    assert own == {"k400": "slowfast", "ssv2": "segments", "ucf101": "videomae", "hmdb51": "videomae"}


@pytest.mark.parametrize("data", [{"stride": 2}, {"stride": 3, "fps": 30.0}, {"clip_seconds": 0.7}, {"segments": True}])
@pytest.mark.parametrize("dataset", ["squares", "ucf101", "k400", "ssv2"])
def test_a_single_view_is_the_clip_of_the_validation(
    data: dict, dataset: str, tmp_path: Path, make_shards: Callable
) -> None:
    """Whatever counts time in training counts it in eval, features, probes and predict, on every task."""
    manifest = make_shards(tmp_path, {"val": 1}, dataset=dataset)
    settings = with_overrides(Settings(), model={"frames": 6, "size": (32, 32), "tubelet": 2}, data=data)
    loaded = Loaded(nn.Identity(), settings, {}, "", torch.device("cpu"))
    spec = view_settings(loaded, parse_views("1x1"), dataset, image=False)
    plan = plan_views(
        spec.protocols, 24, spec.frames, spec.stride, protocol=spec.protocol, seconds=spec.seconds, fps=25.0
    )
    reader = ClipReader(manifest, settings.data, StreamPlan("val", 6, (32, 32), 1, training=False))
    trained = reader.frame_numbers(24, 25.0, torch.Generator())
    tested = list(plan.views[0].frames)
    assert max(abs(a - b) for a, b in zip(tested, trained, strict=True)) <= 1  # centres are rounded in several ways
    assert abs((tested[-1] - tested[0]) - (trained[-1] - trained[0])) <= 1


def test_a_task_chooses_among_protocols_of_the_same_speed() -> None:
    def chosen(dataset: str | None, known: bool = True, evaluate: dict | None = None, **data: object) -> str:
        settings = with_overrides(Settings(), data=data, evaluate=evaluate or {})
        loaded = Loaded(nn.Identity(), settings, {}, "", torch.device("cpu"), known)
        return view_settings(loaded, parse_views("5x3"), dataset, image=False).protocol

    assert chosen("k400", fps=30.0) == "slowfast"
    assert chosen("k400", clip_seconds=2.0) == "slowfast"
    assert chosen("k400") == "videomae"  # trained by frames of the stored video: tested so
    assert chosen("ucf101") == "videomae"
    assert chosen("ucf101", fps=30.0) == "seconds"
    assert chosen("ssv2", segments=True) == "segments"
    assert chosen("ssv2") == "stride"
    assert chosen("mine") == chosen(None) == "stride"
    assert chosen("mine", clip_seconds=1.0) == "seconds"
    assert [chosen(name, known=False) for name in ("k400", "ssv2", "ucf101", "mine")] == [
        "slowfast", "segments", "videomae", "stride",
    ]  # fmt: skip
    assert chosen("k400", evaluate={"protocol": "segments"}) == "segments"
    with pytest.raises(UsageError, match=r"data\.clip_seconds"):
        chosen("k400", evaluate={"protocol": "seconds"})
