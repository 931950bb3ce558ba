"""Patches and pixels there and back; sizes of the presets."""

from __future__ import annotations

import pytest
import torch

from diffmae_video.config import ModelSettings
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.layers import resize_temporal, sincos_2d
from diffmae_video.models.patches import (
    PIXEL_NORMS,
    denormalize_pixels,
    gather_tokens,
    normalize_pixels,
    patchify,
    pixel_bounds,
    scatter_tokens,
    unpatchify,
)
from diffmae_video.models.presets import PRESETS, resolve


def test_patches_hold_the_pixels_they_name():
    clips = torch.randn(2, 3, 4, 8, 12)
    patches = patchify(clips, 2, 4)
    assert patches.shape == (2, 2 * 2 * 3, 2 * 4 * 4 * 3)
    token, value = 1 * 6 + 1 * 3 + 2, ((1 * 4 + 2) * 4 + 3) * 3 + 1  # time 1, row 1, column 2; frame 1, y 2, x 3, green
    assert torch.equal(patches[:, token, value], clips[:, 1, 3, 6, 11])
    assert torch.equal(unpatchify(patches, (2, 2, 3), 2, 4), clips)
    with pytest.raises(ValueError, match="divide"):
        patchify(clips, 3, 4)


@pytest.mark.parametrize("norm", list(PIXEL_NORMS))
def test_pixels_come_back_exactly(norm):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 2, 3, 16, 16)
    clips = normalize_pixels(pixels, norm)
    assert clips.shape == (1, 3, 2, 16, 16)
    mean, std = PIXEL_NORMS[norm]
    torch.testing.assert_close(clips[0, 1, 0].flatten(), (torch.arange(256) / 255 - mean[1]) / std[1])
    assert torch.equal(denormalize_pixels(clips, norm), pixels)
    low, high = pixel_bounds(norm, 12)
    flat = clips.permute(0, 2, 3, 4, 1).reshape(-1, 3)
    torch.testing.assert_close(flat.amin(0).repeat(4), low)
    torch.testing.assert_close(flat.amax(0).repeat(4), high)


def test_scatter_skips_padding():
    tokens, values = torch.zeros(1, 4, 2), torch.tensor([[[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]])
    index = torch.tensor([[0, 2, 0]])
    out = scatter_tokens(tokens, index, values, torch.tensor([[True, True, False]]))
    assert out[0, :, 0].tolist() == [1, 0, 2, 0]
    assert torch.equal(gather_tokens(out, index[:, :2]), values[:, :2])


@pytest.mark.parametrize(
    ("preset", "millions"), [("tiny", 5.5), ("small", 21.6), ("base", 86.1), ("large", 303.5), ("huge", 631.0)]
)
def test_presets_are_the_published_sizes(preset, millions):
    with torch.device("meta"):
        encoder = Encoder(ModelSettings(preset=preset, tubelet=1, frames=1, patch=14 if preset == "huge" else 16))
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_sizes_that_do_not_divide_are_refused():
    assert resolve(ModelSettings(preset="nano", width=64)) == (64, *PRESETS["nano"][1:])
    with pytest.raises(ValueError, match="heads"):
        resolve(ModelSettings(width=100, heads=3))
    with pytest.raises(ValueError, match="decoder_width"):
        resolve(ModelSettings(decoder_width=100, decoder_heads=3))


def test_positions():
    table = sincos_2d(16, 3, 5).view(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])  # the first half knows the column only
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])  # the second the row only
    times = torch.arange(4.0).view(1, 4, 1)
    assert torch.equal(resize_temporal(times, 1), times[:, :1])  # an image stands at the first time
    torch.testing.assert_close(resize_temporal(times, 8).flatten()[1:-1], torch.arange(0.25, 3.0, 0.5))


def test_any_multiple_of_the_patch_encodes():
    encoder = Encoder(ModelSettings(preset="nano", depth=1, frames=4, size=(32, 32), patch=8))
    for frames, height, width in ((4, 32, 32), (8, 48, 24), (2, 64, 64), (1, 32, 40)):
        tokens = encoder(torch.randn(1, 3, frames, height, width))
        assert tokens.shape == (1, max(1, frames // 2) * height * width // 64, 128)
