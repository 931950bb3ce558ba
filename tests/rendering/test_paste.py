"""Pasting: nothing outside changes, nothing hidden is read, colours meet at the edge."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from diffmae_video.rendering.paste import Hole, membrane

RNG = np.random.default_rng(0)


@pytest.fixture
def hidden() -> np.ndarray:
    """A hole with an island of visible pixels."""
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:30, 15:45] = True
    mask[18:21, 34:38] = False
    return mask


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("feather", [0, 2, 5])
def test_nothing_outside_changes_and_nothing_inside_is_read(hidden: np.ndarray, feather: int, blend: bool) -> None:
    source, picture = RNG.integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    other = source.copy()
    other[hidden] = 0
    hole, results = Hole(hidden, feather, blend), []
    for start in (source, other):
        target = start.copy()
        hole.paste(target, picture)
        np.testing.assert_array_equal(target[~hidden], source[~hidden])
        results.append(target)
    np.testing.assert_array_equal(*results)
    if not blend:
        np.testing.assert_array_equal(results[0][20, 25], picture[20, 25])  # deep inside


def test_a_hole_without_surroundings_takes_the_picture() -> None:
    target, picture = np.zeros((8, 8, 3), dtype=np.uint8), RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Hole(np.ones((8, 8), dtype=bool)).paste(target, picture)
    np.testing.assert_array_equal(target, picture)


@pytest.mark.parametrize("scale", [1, 12])  # the larger one is beyond what is relaxed pixel by pixel
def test_a_wrong_colour_is_put_right(hidden: np.ndarray, scale: int) -> None:
    hidden = hidden.repeat(scale, 0).repeat(scale, 1)
    rows, columns = np.mgrid[: hidden.shape[0], : hidden.shape[1]] / scale
    source = np.stack([100 + rows, 60 + columns, 150 - rows], -1).astype(np.uint8)
    reddish = np.clip(source.astype(int) + np.array([40, -20, 0]), 0, 255).astype(np.uint8)
    errors = []
    for blend in (False, True):
        target = source.copy()
        Hole(hidden, 2, blend).paste(target, reddish)
        errors.append(np.abs(target.astype(int) - source)[hidden].mean())
    assert errors[0] > 10
    assert errors[1] < 1.5


def test_membrane_is_the_solution_of_laplaces_equation(hidden: np.ndarray) -> None:
    rim = hidden & ~cv2.erode(hidden.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool)
    rows, columns = np.mgrid[:40, :60]
    values = np.stack([40 * np.sin(columns / 6) + 3 * rows, 50 * np.cos(rows / 4), rows * 0 + 7], -1).astype(np.float32)
    surface = membrane(values, rim)
    np.testing.assert_array_equal(surface[rim], values[rim])
    inner = {place: i for i, place in enumerate(zip(*np.nonzero(hidden & ~rim), strict=True))}
    matrix, right = 4 * np.eye(len(inner)), np.zeros((len(inner), 3))
    for (y, x), i in inner.items():
        for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if place in inner:
                matrix[i, inner[place]] -= 1
            else:
                right[i] += values[place]
    exact = np.linalg.solve(matrix, right)
    found = np.stack([surface[place] for place in inner])
    error = np.abs(found - exact).mean(0)
    assert (error <= 0.1 * exact.std(0) + 1e-3).all(), (error, exact.std(0))
