"""Pictures are pictures, and show what they should where that can be read off."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from diffmae_video.evaluation.metrics import mistakes
from diffmae_video.rendering.figures import confusion_figure, sweep_figure
from diffmae_video.rendering.sheet import captioned_grid, clip_strips


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_confusion_marks_a_filled_cell() -> None:
    empty = pixels(confusion_figure(torch.zeros(3, 3, dtype=torch.long), ["a", "b", "c"], "t"))
    right = pixels(confusion_figure(torch.eye(3, dtype=torch.long) * 5, ["a", "b", "c"], "t"))
    assert empty.shape == right.shape
    assert right.sum() < empty.sum()  # the diagonal is dark
    assert pixels(confusion_figure(torch.ones(100, 100, dtype=torch.long), [str(i) for i in range(100)], "t")).size


def test_strip_shows_the_frames() -> None:
    red = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    red[:, 0] = 255
    picture = clip_strips([red, red], ["run, not walk", "clap"], frames=4)
    share = ((picture[..., 0] > 250) & (picture[..., 1] < 5)).mean()
    assert share > 0.2


def test_sweep_is_drawn() -> None:
    curve, signal = {"0.75": [0.1, 0.2, 0.3]}, [1.0, 0.3, 0.0]
    plain = pixels(sweep_figure([1, 500, 1000], curve, signal))
    level = pixels(sweep_figure([1, 500, 1000], curve, signal, {"0.75": 0.15}))

    def blue(picture: np.ndarray) -> int:  # the first colour of matplotlib's cycle, which curve and level share
        return int((np.abs(picture.astype(int) - (31, 119, 180)).max(-1) < 40).sum())

    assert 0 < blue(plain) < blue(level)


def test_most_confident_mistakes_first() -> None:
    probabilities = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [1.0, 0.0]])
    assert mistakes(probabilities, torch.tensor([1, 0, 1, 0])) == [1, 0]


def test_a_captioned_grid_fits_pictures_into_squares_and_fills_its_last_row() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    large, small, wide = (
        np.full((*size, 3), c, np.uint8) for size, c in zip([(200, 200), (10, 20), (40, 400)], colours, strict=True)
    )
    page = captioned_grid([large, small, wide, None, large], ["a", "b", "c", "d", "e"], columns=3, side=100)
    assert page.shape == (2 * 118, 300, 3)
    counts = [int((page[:118, 100 * n : 100 * n + 100] == c).all(-1).sum()) for n, c in enumerate(colours)]
    assert counts == [100 * 100, 50 * 100, 10 * 100]
    assert len(np.unique(page[118:218, :100].reshape(-1, 3), axis=0)) > 1, "the unreadable one says so"
    assert len(np.unique(page[118:, 200:].reshape(-1, 3), axis=0)) == 1, "nothing stands after the last picture"
