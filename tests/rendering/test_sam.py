"""SAM 2 and EdgeTAM in their own code, with weights of a small network drawn here."""

from __future__ import annotations

import json
from pathlib import Path

import diffmae_video.compat  # noqa: F401

import numpy as np
import pytest
import torch

from diffmae_video.errors import DataError, UsageError
from diffmae_video.rendering.sam import Sam, follow_with_sam, load_sam

HEIGHT, WIDTH, COUNT = 48, 64, 6


@pytest.fixture(scope="module")
def sam(sam_folder: Path) -> Sam:
    return load_sam(str(sam_folder))


def frames() -> list[np.ndarray]:
    """A dark square that moves over noise."""
    rng = np.random.default_rng(0)
    base = rng.integers(120, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    made = []
    for number in range(COUNT):
        frame = base.copy()
        frame[12:32, 10 + 3 * number : 30 + 3 * number] = 20
        made.append(frame)
    return made


def square(number: int) -> np.ndarray:
    hidden = np.zeros((HEIGHT, WIDTH), dtype=bool)
    hidden[12:32, 10 + 3 * number : 30 + 3 * number] = True
    return hidden


def by_transformers(sam: Sam, prompts: dict[int, dict], start: int) -> dict[int, np.ndarray]:
    """The same by a session over the whole clip, as transformers' documentation writes it."""
    session = sam.processor.init_video_session(video=np.stack(frames()), dtype=torch.float32)
    found = {}
    with torch.inference_mode():
        for number, prompt in prompts.items():
            sam.processor.add_inputs_to_inference_session(session, frame_idx=number, obj_ids=1, **prompt)
            sam.model(session, frame_idx=number)
        for reverse in (False, True):
            for out in sam.model.propagate_in_video_iterator(session, start_frame_idx=start, reverse=reverse):
                size = [[session.video_height, session.video_width]]
                masks = sam.processor.post_process_masks([out.pred_masks], original_sizes=size)
                found[out.frame_idx] = masks[0][0, 0].numpy().astype(bool)
    return found


def test_masks_are_those_of_a_whole_session(sam: Sam) -> None:
    done = []
    found = follow_with_sam(sam, frames(), {2: square(2)}, progress=done.append)
    expected = by_transformers(sam, {2: {"input_masks": square(2)}}, 2)
    assert sorted(expected) == list(range(COUNT))
    for number in range(COUNT):
        if number != 2:
            np.testing.assert_array_equal(found(number), expected[number])
    np.testing.assert_array_equal(found(2), square(2))
    assert any(0 < expected[number].sum() < expected[number].size for number in range(COUNT) if number != 2)
    assert sum(done) >= COUNT


def test_a_box_asks_the_network(sam: Sam) -> None:
    found = follow_with_sam(sam, frames(), {}, {0: square(0)})
    expected = by_transformers(sam, {0: {"input_boxes": [[[10.0, 12.0, 30.0, 32.0]]]}}, 0)
    for number in range(COUNT):
        np.testing.assert_array_equal(found(number), expected[number])


def test_large_frames_come_back_at_the_size_of_the_marks(sam: Sam) -> None:
    large = [frame.repeat(30, 0).repeat(30, 1) for frame in frames()[:2]]
    found = follow_with_sam(sam, large, {0: square(0).repeat(30, 0).repeat(30, 1)})
    assert found(1).shape == (30 * HEIGHT, 30 * WIDTH)


def test_nothing_marked_is_an_error(sam: Sam) -> None:
    for keys in ({}, {COUNT: square(0)}):
        with pytest.raises(ValueError, match="mark one"):
            follow_with_sam(sam, frames(), keys)
    assert not follow_with_sam(sam, frames(), {0: np.zeros((HEIGHT, WIDTH), bool), 1: square(1)})(0).any()


def test_folders_that_are_none(sam_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        load_sam(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        load_sam(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UsageError, match="is a bert"):
        load_sam(str(tmp_path))
    (tmp_path / "config.json").write_bytes((sam_folder / "config.json").read_bytes())
    with pytest.raises(DataError, match="cannot be loaded"):
        load_sam(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch here'\ntR.")  # a pickle is not looked at
    with pytest.raises(DataError, match="cannot be loaded"):
        load_sam(str(tmp_path))
    assert not Path("here").exists()
