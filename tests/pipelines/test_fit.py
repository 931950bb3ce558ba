"""A model of one clip: what it is trained on, how it continues, and when it is used again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffmae_video.config.fit_text import FitLength
from diffmae_video.errors import Stopped, UsageError
from diffmae_video.pipelines.fit import ClipFit, Fitted, fit
from diffmae_video.pipelines.job import Job
from diffmae_video.rendering.source import VideoSource
from diffmae_video.rendering.writers import VideoWriter
from diffmae_video.training.clip_fit import FitStream
from diffmae_video.training.run import read_status

FRAMES, HEIGHT, WIDTH = 6, 36, 52
RECIPE = """
[model]
width = 16
depth = 1
heads = 2
frames = 4
size = [16, 16]
tubelet = 2
patch = 4
positions = "rotary"
decoder_depth = 1
decoder_width = 16
decoder_heads = 2
{model}
[data]
stride = 1
[train]
batch_size = 2
base_lr = 0.3
ema = 0.9
precision = "fp32"
checkpoint_every = 2
picture_every = 0
"""
HOLE = np.zeros((HEIGHT, WIDTH), dtype=bool)
HOLE[11:22, 13:25] = True
Frames = np.ndarray


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small one, in a new workspace."""
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path / "small.toml", 'space = "pca:8"')


def write_recipe(path: Path, model: str) -> Path:
    path.write_text(RECIPE.format(model=model), encoding="utf-8")
    return path


def pictures(seed: int = 0) -> Frames:
    """Blocks that move: uint8 (T, H, W, 3)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
    return np.stack([np.roll(blocks.repeat(4, 0).repeat(4, 1), n, axis=1) for n in range(FRAMES)])


def write(path: Path, frames: Frames) -> Path:
    writer = VideoWriter(path, frames.shape[1:3], Fraction(1, 25), Fraction(25), codec="ffv1")
    for number, frame in enumerate(frames):
        writer.write(frame, number)
    writer.close()
    return path


def fitted(
    clip: Path,
    recipe: Path,
    hole: np.ndarray | Callable[[int], np.ndarray] = HOLE,
    length: FitLength | None = FitLength(steps=3),
    **job: Any,
) -> Fitted:
    hidden = hole if callable(hole) else lambda number: hole
    work = ClipFit(Job(device="cpu", **job), VideoSource(clip), hidden, hidden, length, str(recipe))
    return fit(work)


def weights(run: Fitted) -> dict[str, torch.Tensor]:
    return load_file(run.directory / "weights.safetensors")


def same(one: Fitted, other: Fitted) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("model", ['space = "pca:8"', 'objective = "mae"'])
def test_hidden_pixels_have_no_part_in_the_weights(recipe: Path, model: str) -> None:
    write_recipe(recipe, model)
    shown = pictures()
    hidden = np.where(HOLE[None, :, :, None], pictures(seed=1), shown)
    one, other = (fitted(write(Path(f"{n}.mkv"), frames), recipe) for n, frames in enumerate((shown, hidden)))
    assert same(one, other)
    visible = shown.copy()
    visible[:, 11:22, 5:10] ^= 255  # what can be seen beside the hole
    assert not same(one, fitted(write(Path("2.mkv"), visible), recipe))


def test_a_stopped_fit_continues_to_the_same_weights(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write(Path("clip.mkv"), pictures())
    whole = fitted(clip, recipe, length=FitLength(steps=7), resume="never")
    (whole.directory / "run.json").rename(whole.directory / "elsewhere.json")
    sample = FitStream.sample

    def interrupted(stream: FitStream, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        if number == 8:
            signal.raise_signal(signal.SIGTERM)
        return sample(stream, number)

    with monkeypatch.context() as patch:
        patch.setattr(FitStream, "sample", interrupted)
        with pytest.raises(Stopped):
            fitted(clip, recipe, length=FitLength(steps=7))
    again = fitted(clip, recipe, length=FitLength(steps=7))
    assert again.directory != whole.directory
    assert (read_status(again.directory) or {})["step"] == again.steps == 7
    assert same(whole, again)


def test_a_time_becomes_a_number_of_steps_that_is_kept(recipe: Path) -> None:
    clip = write(Path("clip.mkv"), pictures())
    recipe.write_text(recipe.read_text().replace("checkpoint_every = 2", "checkpoint_every = 1000"), encoding="utf-8")
    timed = fitted(clip, recipe, length=FitLength(seconds=1))
    assert timed.steps >= 20
    counted = fitted(clip, recipe, length=FitLength(steps=timed.steps))
    assert counted.directory != timed.directory
    assert same(timed, counted)


def test_a_fit_is_used_again_where_nothing_is_hidden_that_it_has_seen(recipe: Path) -> None:
    clip = write(Path("clip.mkv"), pictures())
    first = fitted(clip, recipe)
    assert not first.reused
    again = fitted(clip, recipe)
    assert again.reused
    assert again.directory == first.directory
    assert again.steps == 3
    part = HOLE.copy()
    part[11:14] = False
    assert fitted(clip, recipe, part).reused
    assert fitted(clip, recipe, lambda number: HOLE if number < 3 else part, None).reused
    assert not fitted(clip, recipe, np.roll(HOLE, 1)).reused
    assert not fitted(clip, recipe, seed=1).reused
    assert not fitted(clip, recipe, length=FitLength(steps=4)).reused
    assert not fitted(write(Path("other.mkv"), pictures(seed=1)), recipe).reused


def test_weights_to_start_from(recipe: Path) -> None:
    first = fitted(write(Path("clip.mkv"), pictures()), recipe)
    other = write(Path("other.mkv"), pictures(seed=1))
    hidden = lambda number: HOLE  # noqa: E731
    job = Job(device="cpu")
    begun = fit(ClipFit(job, VideoSource(other), hidden, hidden, FitLength(steps=1), str(recipe), str(first.directory)))
    fresh = fitted(other, recipe, length=FitLength(steps=1))
    start, one, anew = weights(first), weights(begun), weights(fresh)
    name = "encoder.blocks.0.attn.qkv.weight"
    assert (one[name] - start[name]).norm() < 0.5 * (anew[name] - start[name]).norm()


def test_a_clip_that_shows_too_little(recipe: Path) -> None:
    hole = np.ones((HEIGHT, WIDTH), dtype=bool)
    hole[::4, ::4] = False
    with pytest.raises(UsageError, match="Too little"):
        fitted(write(Path("clip.mkv"), pictures()), recipe, hole)
    assert not list(Path("runs").glob("fit-*"))
