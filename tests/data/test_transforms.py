"""Augmentation: one draw for all frames, from the clip's own generator, against torchvision's and timm's results."""

from __future__ import annotations

import random

import diffmae_video.compat  # noqa: F401

import numpy as np
import pytest
import torch

from diffmae_video.config import DataSettings
from diffmae_video.data.sampling import frames_by_seconds, frames_by_segments, frames_by_stride, stride_at
from diffmae_video.data.transforms import ClipTransform, MixVideo, RandAugment, build_transforms, parse_rand_augment
from diffmae_video.errors import UsageError

CLIP = torch.randint(0, 256, (4, 3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
STILL = CLIP[:1].expand(4, -1, -1, -1).contiguous()
SETTINGS = {
    "plain": {},
    "multi_scale": {"crop": "multi_scale"},
    "random": {"crop": "random"},
    "jitter": {"color_jitter": 0.4},
    "augment": {"rand_augment": "rand-m7-n4-mstd0.5-inc1"},
    "erase": {"erasing": 1.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_transform_depends_on_its_seed_alone_and_treats_frames_alike(name: str) -> None:
    transform = build_transforms(DataSettings(**SETTINGS[name]), (32, 48), training=True)
    torch.manual_seed(1)
    first = transform(CLIP, 5)
    torch.manual_seed(2)
    assert torch.equal(first, transform(CLIP, 5))
    assert first.shape == (4, 3, 32, 48)
    assert first.dtype == torch.uint8
    assert any(not torch.equal(first, transform(CLIP, seed)) for seed in (6, 7))
    for seed in range(20):
        out = transform(STILL, seed)
        if name != "erase":  # noise differs from frame to frame, its box does not
            assert torch.equal(out, out[:1].expand_as(out)), seed


def test_boxes_stay_inside_and_cover_the_area_asked_for() -> None:
    transform = ClipTransform((32, 32), crop="random_resized", area=(0.5, 1.0))
    generator = torch.Generator().manual_seed(0)
    areas = []
    for _ in range(500):
        left, top, width, height = transform.box(80, 60, generator)
        assert 0 <= left <= 80 - width
        assert 0 <= top <= 60 - height
        assert 0.7 < width / height < 1.4
        areas.append(width * height / 4800)
    assert min(areas) > 0.48
    assert sum(areas) / len(areas) == pytest.approx(0.7, abs=0.05)


def test_center_crop_is_the_largest_box() -> None:
    generator = torch.Generator()
    assert build_transforms(DataSettings(), (32, 32), training=False).box(80, 60, generator) == (10, 0, 60, 60)
    assert build_transforms(DataSettings(), (32, 64), training=False).box(80, 60, generator) == (0, 10, 80, 40)


def test_flip_is_off_where_labels_are_directional() -> None:
    data = DataSettings(crop="center", flip=1.0)
    plain = build_transforms(data, (60, 60), training=True)(CLIP, 0)
    kept = build_transforms(data, (60, 60), training=True, directional=True)(CLIP, 0)
    assert torch.equal(plain, kept.flip(-1))


def test_rand_augment_notation() -> None:
    assert parse_rand_augment("rand-m7-n4-mstd0.5-inc1") == RandAugment(7.0, 4, 0.5)
    for text in ("rand-m7-x3", "auto-m7", "rand-m7-inc0"):
        with pytest.raises(UsageError, match="rand_augment"):
            parse_rand_augment(text)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix_video_targets_tell_the_pixels(mixup: float, cutmix: float) -> None:
    """Clip b is the constant b, so that the share of each label can be read off the pixels."""
    clips = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 3, 4, 40, 40)
    mix = MixVideo(2, mixup, cutmix, smoothing=0.0)
    for seed in range(30):
        out, targets = mix(clips, torch.tensor([0, 1]), seed)
        assert out[0].mean().item() == pytest.approx(targets[0, 1].item(), abs=1e-4)
        assert out[1].mean().item() == pytest.approx(targets[1, 1].item(), abs=1e-4)
        again, _ = mix(clips, torch.tensor([0, 1]), seed)
        assert torch.equal(out, again)


def test_mix_video_leaves_its_input_and_other_draws_alone() -> None:
    clips = torch.rand(2, 3, 2, 8, 8)
    before = clips.clone()
    state = torch.get_rng_state()
    MixVideo(2)(clips, torch.tensor([0, 1]), 3)
    assert torch.equal(clips, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("fps", "frames"), [(30.0, 300), (12.5, 125), (60.0, 600)])
def test_clips_by_seconds_span_the_same_time_at_any_rate(fps: float, frames: int) -> None:
    state = random.getstate()
    starts = []
    for seed in range(40):
        numbers = frames_by_seconds(frames, fps, 16, 2.0, torch.Generator().manual_seed(seed))
        assert numbers == sorted(numbers)
        assert (numbers[-1] - numbers[0] + 1) / fps == pytest.approx(2.0, abs=1.01 / fps)
        assert numbers == frames_by_seconds(frames, fps, 16, 2.0, torch.Generator().manual_seed(seed))
        starts.append(numbers[0] / fps)
    assert min(starts) < 2
    assert max(starts) > 6
    assert random.getstate() == state
    middle = frames_by_seconds(frames, fps, 16, 2.0, None)
    assert (middle[0] + middle[-1] + 1) / 2 / fps == pytest.approx(5.0, abs=1.01 / fps)


def test_clips_by_seconds_go_by_the_clock_where_the_rate_varies() -> None:
    """A second at 30 frames a second, then nine at 5: 2 s are 2 s, and frames are those shown at even instants."""
    times = np.concatenate([np.arange(30) / 30, 1 + np.arange(45) / 5])
    for seed in range(40):
        numbers = frames_by_seconds(75, 7.5, 8, 2.0, torch.Generator().manual_seed(seed), times)
        span = times[numbers[-1]] - times[numbers[0]]
        assert 1.6 <= span <= 2.0
        instants = np.linspace(times[numbers[0]], times[numbers[-1]], 8)
        assert (instants - times[numbers] < 0.2 + 1e-6).all()
    numbers = frames_by_seconds(75, 7.5, 11, 10.0, None, times)
    assert times[numbers] == pytest.approx([0, 0.96667, 1.8, 2.8, 3.8, 4.8, 5.8, 6.8, 7.8, 8.8, 9.8], abs=0.15)


def test_clips_of_short_videos_repeat_frames() -> None:
    draw = torch.Generator().manual_seed(0)
    assert frames_by_seconds(3, 30.0, 4, 2.0, draw) == [0, 0, 1, 2]
    assert frames_by_stride(3, 4, 2, draw) == [0, 2, 2, 2]
    assert frames_by_stride(20, 4, 2, None) == [6, 8, 10, 12]


def test_clips_by_segments_take_one_frame_from_each_part() -> None:
    assert frames_by_segments(48, 4, None) == [6, 18, 30, 42]
    assert frames_by_segments(3, 6, None) == [0, 0, 1, 1, 2, 2]
    drawn = [frames_by_segments(48, 4, torch.Generator().manual_seed(seed)) for seed in range(60)]
    for part in range(4):
        seen = {numbers[part] for numbers in drawn}
        assert min(seen) >= 12 * part
        assert max(seen) < 12 * (part + 1)
        assert len(seen) > 8
    assert drawn[7] == frames_by_segments(48, 4, torch.Generator().manual_seed(7))


def test_mix_video_smooths_like_timm() -> None:
    _, targets = MixVideo(5, 0.0, 0.0, smoothing=0.1)(torch.zeros(2, 3, 2, 8, 8), torch.tensor([1, 4]), 0)
    assert targets[0].tolist() == pytest.approx([0.02, 0.92, 0.02, 0.02, 0.02])


def test_a_stride_shows_clips_at_the_speed_of_training() -> None:
    assert stride_at(DataSettings(stride=4), 16, 60.0) == 4
    assert stride_at(DataSettings(stride=4, fps=30.0), 16, 60.0) == 8
    assert stride_at(DataSettings(stride=4, fps=30.0), 16, 15.0) == 2
    assert stride_at(DataSettings(clip_seconds=3.2), 16, 30.0) == 6
    assert stride_at(DataSettings(clip_seconds=0.1), 16, 30.0) == 1
