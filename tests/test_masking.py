"""Masks: counts, shapes, seeds, rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmae_video.masking import Mask, make_mask, parse_mask, pixel_mask_to_grid
from diffmae_video.registry import maskers

CLIP = (8, 14, 14)


def test_counts_of_the_papers():
    assert make_mask("random", 0.9, CLIP, [0]).visible.shape == (1, 156)  # mae_st truncates 156.8
    assert make_mask("tube", 0.9, CLIP, [0]).visible.shape == (1, 160)  # VideoMAE: 20 places x 8
    assert make_mask("random", 0.75, (1, 14, 14), [0]).visible.shape == (1, 49)  # MAE


@pytest.mark.parametrize("kind", maskers.names())
def test_a_mask_partitions_the_grid(kind):
    mask = make_mask(kind, 0.5, (4, 6, 8), [1, 2, 3])
    assert mask.visible_valid is None
    for row in range(3):
        assert sorted(mask.visible[row].tolist() + mask.masked[row].tolist()) == list(range(192))
        assert bool(mask.grid[row][mask.masked[row]].all())
        assert not bool(mask.grid[row][mask.visible[row]].any())
        assert mask.masked[row].tolist() == sorted(mask.masked[row].tolist())


@pytest.mark.parametrize("kind", maskers.names())
def test_the_seed_decides_whatever_the_batch(kind):
    together = make_mask(kind, 0.6, CLIP, [5, 6, 7])
    alone = make_mask(kind, 0.6, CLIP, torch.tensor([6]))
    assert torch.equal(together.grid[1:2], alone.grid)
    if kind in ("random", "tube", "block"):
        assert not torch.equal(together.grid[0], together.grid[1])


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.95), st.tuples(st.integers(1, 4), st.integers(2, 7), st.integers(2, 7)), st.integers(0, 99))
def test_block_hides_exactly_as_many_as_random(ratio, shape, seed):
    block, random = (make_mask(kind, ratio, shape, [seed]) for kind in ("block", "random"))
    assert int(block.grid.sum()) == int(random.grid.sum()) == math.prod(shape) - int(math.prod(shape) * (1 - ratio))


def test_tube_is_the_same_at_all_times():
    grid = make_mask("tube", 0.75, CLIP, [3]).grid.view(8, 196)
    assert bool((grid == grid[0]).all())


def test_center_frames_and_future():
    center = make_mask("center", 0.25, (2, 8, 8), [0]).grid.view(2, 8, 8)
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected[:, 2:6, 2:6] = True
    assert torch.equal(center, expected)
    frames = make_mask("frames", 0.5, (8, 2, 2), [0]).grid.view(8, 4)
    assert frames.all(1).tolist() == [False, False, True, True, True, True, False, False]
    future = make_mask("future", 0.5, (8, 2, 2), [0]).grid.view(8, 4)
    assert future.all(1).tolist() == [False] * 4 + [True] * 4


def test_parse():
    grid = parse_mask("frames:3-4", (8, 1, 1))([0]).grid  # frames 3 and 4 lie in tubelets 1 and 2
    assert grid[0].tolist() == [False, True, True] + [False] * 5
    box = parse_mask("box:0,15,16,2", (1, 3, 2))([0, 1])  # x 0 to 15, y 15 and 16, in 48 x 32 pixels
    assert box.grid.tolist() == [[True, False, True, False, False, False]] * 2
    assert parse_mask("box:31,0,1,48", (1, 3, 2))([0]).grid.tolist() == [[False, True] * 3]
    assert torch.equal(parse_mask("tube:0.75", CLIP)([4]).grid, make_mask("tube", 0.75, CLIP, [4]).grid)
    assert int(parse_mask("center", (1, 14, 14))([0]).grid.sum()) == 49
    wrong = ("fog:0.5", "random:2", "random:x", "frames:5-40", "frames:0-15", "frames:1-14")
    for text in (*wrong, "box:0,0,0,4", "box:1", "box:220,0,5,5", "box:1,1,222,222"):
        with pytest.raises(ValueError, match="mask"):
            parse_mask(text, CLIP)
    with pytest.raises(ValueError, match="future"):
        make_mask("future", 0.5, (1, 14, 14), [0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_pixels_round_outwards(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(4, 8, 12, generator=generator) < 0.03
    grid = pixel_mask_to_grid(pixels, 2, 4)
    for t in range(2):
        for y in range(2):
            for x in range(3):
                cell = pixels[2 * t : 2 * t + 2, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
                assert bool(grid[t, y, x]) == bool(cell.any())
    covered = Mask.from_grid(grid[None], (2, 2, 3)).pixels(2, 4)
    assert bool((covered[0] | ~pixels).all())
    assert torch.equal(pixel_mask_to_grid(covered, 2, 4)[0], grid)


def test_unequal_counts_are_padded_and_marked():
    grid = torch.tensor([[True, False, False, True], [True, True, True, False]])
    mask = Mask.from_grid(grid, (1, 2, 2))
    assert mask.masked.tolist() == [[0, 3, 0], [0, 1, 2]]
    assert mask.masked_valid.tolist() == [[True, True, False], [True, True, True]]
    assert mask.visible.tolist() == [[1, 2], [3, 0]]
    assert mask.visible_valid.tolist() == [[True, True], [True, False]]


def test_masks_travel_as_containers():
    mask = make_mask("random", 0.5, (1, 4, 4), [0, 1])
    leaves, spec = torch.utils._pytree.tree_flatten(mask)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.masked, mask.masked)
    assert again.shape == mask.shape
    assert mask.repeat_interleave(2).grid.tolist() == [row for row in mask.grid.tolist() for _ in range(2)]
