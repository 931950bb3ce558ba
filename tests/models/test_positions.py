"""Position embeddings on other grids: timm's resampling in space, straight lines in time."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from diffmae_video.models.layers import Positions

NATIVE = (4, 6, 8)


def expected_table(table: np.ndarray, shape: tuple[int, int, int]) -> torch.Tensor:
    """A table (T, S, D) on another grid: each time by timm, then between the centres of the old times."""
    times = [
        resample_abs_pos_embed(torch.from_numpy(row)[None], list(shape[1:]), list(NATIVE[1:]), num_prefix_tokens=0)[0]
        for row in table
    ]
    stack = torch.stack(times).numpy()  # (T, S', D)
    if shape[0] == 1:
        return torch.from_numpy(stack[0])  # an image stands at the first time
    at = (np.arange(shape[0]) + 0.5) * NATIVE[0] / shape[0] - 0.5
    flat = stack.reshape(NATIVE[0], -1)
    lines = np.stack([np.interp(at, np.arange(NATIVE[0]), column) for column in flat.T], 1)
    return torch.from_numpy(lines.astype(np.float32)).view(shape[0] * shape[1] * shape[2], -1)


@pytest.mark.parametrize("kind", ["sincos", "learned", "joint", "flat"])
@pytest.mark.parametrize("shape", [(4, 9, 5), (8, 6, 8), (2, 3, 4), (6, 12, 12), (1, 6, 8), (1, 4, 4)])
def test_resized_positions(kind, shape):
    torch.manual_seed(0)
    positions = Positions(kind, NATIVE, 16)
    with torch.no_grad():
        native, found = positions(NATIVE).clone(), positions(shape)
    assert native.shape == (1, 4 * 6 * 8, 16)
    expected = expected_table(native.view(4, 6 * 8, 16).numpy(), shape)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
