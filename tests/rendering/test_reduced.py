"""A clip at a model's resolution, and the file that says what is hidden in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffmae_video.rendering import reduced
from diffmae_video.rendering.hidden_file import hides_all_of, pack_hidden, unpack_hidden
from diffmae_video.rendering.reduced import plan_looks, reduce_clip, window_size

HOLE = np.zeros((48, 80), dtype=bool)
HOLE[17:30, 41:52] = True


def hole(number: int) -> np.ndarray:
    return HOLE if number != 3 else np.zeros_like(HOLE)


def clip(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 48, 80, 3), dtype=np.uint8)


def test_hidden_pixels_are_not_in_it() -> None:
    looks = plan_looks(hole, 8, 4, (16, 16))
    one = clip(8)
    mask = np.stack([hole(number) for number in range(8)])
    other = np.where(mask[..., None], clip(8, seed=1), one)
    a, b = (reduce_clip(pictures, hole, hole, looks, 8, (4, 16, 16)) for pictures in (one, other))
    np.testing.assert_array_equal(a.frames, b.frames)
    assert a.holes.shape == (2, 4, 16, 16)
    assert a.starts.tolist() == [0, 1, 2, 3, 4]
    assert not a.hidden[3].any()
    scale = 16 / looks[0].window.height
    assert a.frames.shape == (8, round(48 * scale), round(80 * scale), 3)


def test_of_a_long_clip_stretches_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced, "PIXELS", 48 * 80 * 20)
    looks = plan_looks(hole, 100, 4, (48, 48))
    held = reduce_clip(clip(100), hole, hole, looks, 100, (4, 48, 48))
    assert len(held.frames) == 16
    assert held.starts.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]


def test_of_large_frames_what_lies_around_the_hole_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced, "PIXELS", 2 * 4 * 24 * 24)
    looks = plan_looks(hole, 4, 4, (24, 24))
    held = reduce_clip(clip(4), hole, hole, looks, 4, (4, 24, 24))
    window = looks[0].window
    assert held.frames.shape == (4, 24, 24, 3)
    assert held.hidden[0].sum() == window.of(HOLE).sum() == HOLE.sum()


def test_a_clip_shorter_than_a_window() -> None:
    looks = plan_looks(hole, 2, 4, (16, 16))
    held = reduce_clip(clip(2), hole, hole, looks, 2, (4, 16, 16))
    assert held.starts.tolist() == [0]
    assert len(held.frames) == 2


def test_a_window_of_another_shape_is_kept() -> None:
    wide = np.zeros((48, 80), dtype=bool)
    wide[20:26, 2:78] = True
    looks = plan_looks(lambda number: wide, 4, 4, (32, 32))
    assert (looks[0].window.height, looks[0].window.width) == (48, 80)
    assert window_size(looks, (32, 32), 4) == (24, 40)


def test_what_is_hidden_is_told_later(tmp_path: Path) -> None:
    packed = pack_hidden(hole, 6)
    for number, mask in enumerate(unpack_hidden(packed)):
        np.testing.assert_array_equal(mask, hole(number))
    path = tmp_path / "hidden.bin"
    path.write_bytes(packed)
    assert hides_all_of(path, hole, 6)
    assert hides_all_of(path, lambda number: hole(number) & np.eye(48, 80, dtype=bool), 6)
    assert not hides_all_of(path, lambda number: HOLE, 6)
    assert not hides_all_of(path, hole, 7)
    assert not hides_all_of(path, hole, 5)
    for damaged in (packed[:-3], b"", b"{}\n", b'{"shape": [48, 80], "sizes": [5]}\nabcde', b'{"shape": [1e9, 1e9]}\n'):
        path.write_bytes(damaged)
        assert not hides_all_of(path, hole, 6)
