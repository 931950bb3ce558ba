"""Rotary positions: what attention reads is how far apart two tokens are, in time, rows and columns."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import pytest
import torch
from timm.layers import Attention

from diffmae_video.config import ModelSettings
from diffmae_video.errors import UsageError
from diffmae_video.masking import Mask, make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.exporters import export_model
from diffmae_video.models.layers import RotaryAttention
from diffmae_video.models.rotary import FASTEST, Rotary, rotate

SMALL = {"preset": "nano", "width": 32, "depth": 2, "heads": 2, "frames": 4, "size": (32, 32), "patch": 8}
SMALL |= {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 2, "positions": "rotary"}
SHAPE = (2, 4, 4)


def test_pairs_turn_as_complex_numbers():
    generator = torch.Generator().manual_seed(0)
    x, angles = torch.randn(2, 3, 5, 8, generator=generator), torch.randn(2, 5, 4, generator=generator)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(2, 5, 4), angles)[:, None]
    torch.testing.assert_close(rotate(x, angles), torch.cat([turned.real, turned.imag], -1))


def test_scores_depend_on_distance_alone():
    """The same query and key have the same product wherever they stand, if they stand as far apart."""
    rotary, generator = Rotary((4, 6, 6), 16), torch.Generator().manual_seed(1)
    q, k = (torch.randn(16, generator=generator).expand(1, 1, 144, 16) for _ in range(2))
    angles = rotary((4, 6, 6))
    scores = (rotate(q, angles) @ rotate(k, angles).mT).view(4, 6, 6, 4, 6, 6)
    for dt, dy, dx in ((0, 0, 1), (1, 0, 0), (0, 2, 0), (1, 2, 3)):
        a = scores[0, 0, 0, dt, dy, dx]
        b = scores[2, 3, 1, 2 + dt, 3 + dy, 1 + dx]
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    far = scores[0, 0, 0, 1, 0, 0], scores[0, 0, 0, 0, 1, 0], scores[0, 0, 0, 0, 0, 1]
    assert len({round(float(value), 3) for value in far}) == 3  # the axes are told apart


def test_speeds_follow_the_grid():
    """From 2 radians a token to half a circle over the axis; other grids lie over the same extent."""
    rotary = Rotary((2, 8, 16), 60)
    for axis, length in enumerate((2, 8, 16)):
        speeds = getattr(rotary, f"speeds_{axis}")
        assert float(speeds[0]) == pytest.approx(FASTEST)
        assert float(speeds[-1]) == pytest.approx(min(FASTEST, torch.pi / length))
    native = rotary((2, 8, 16)).view(2, 8, 16, 30)
    double = rotary((2, 16, 32)).view(2, 8, 2, 16, 2, 30)
    torch.testing.assert_close(double.mean((2, 4)), native, atol=1e-4, rtol=1e-4)
    assert bool((rotary((1, 8, 16)).view(8, 16, 30) == native[0]).all())  # an image is the first time
    with pytest.raises(ValueError, match="even width from 6 on, not 4"):
        Rotary((2, 8, 16), 4)


def test_without_angles_it_is_timms_attention():
    torch.manual_seed(0)
    ours, theirs = RotaryAttention(32, 2, qkv_bias=True), Attention(32, 2, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    x, mask = torch.randn(2, 5, 32), (torch.arange(5) < 4).expand(2, 1, 1, 5)
    torch.testing.assert_close(ours(x, mask, torch.zeros(1, 5, 8)), theirs(x, mask))


@pytest.mark.parametrize("decoder", ["joint", "cross_self", "cross"])
@pytest.mark.parametrize("extra", [{}, {"class_token": True}, {"timestep": "adaln"}])
def test_every_decoder_takes_places(decoder, extra):
    """The order in which tokens come does not matter, where they stand does; sampling keeps what is visible."""
    net = DiffMAE(ModelSettings(**SMALL | {"decoder": decoder} | extra)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    x = torch.rand(2, 3, 4, 32, 32, generator=generator) * 2 - 1
    mask = make_mask("random", 0.75, SHAPE, [0, 1])
    out = net.sample(x, mask, seeds=[1, 2], steps=3)
    hidden = mask.pixels(2, 8)[:, None].expand_as(x)
    assert torch.equal(out[~hidden], x[~hidden])
    assert bool(out.isfinite().all())

    encoding = net.encode(x, mask)
    order = torch.randperm(mask.masked.shape[1], generator=generator)
    noisy, when = torch.randn(2, len(order), net.patch_values, generator=generator), torch.tensor([300, 700])
    plain = net.decoder(noisy, when, mask.masked, None, encoding)
    mixed = net.decoder(noisy[:, order], when, mask.masked[:, order], None, encoding)
    torch.testing.assert_close(mixed, plain[:, order], atol=1e-4, rtol=1e-4)
    same, moved = (net.decoder(noisy, when, index, None, encoding) for index in (mask.masked, mask.masked.flip(1)))
    assert float((same - moved).detach().abs().max()) > 1e-3


def test_padding_changes_nothing():
    """A mask of unequal counts: the padded clip's answer is that of the clip alone."""
    net = DiffMAE(ModelSettings(**SMALL)).eval()
    x = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    grid = torch.zeros(2, 32, dtype=torch.bool)
    grid[0, :20], grid[1, 5:11] = True, True
    first = net.denoise(torch.zeros(1, 6, 384), torch.tensor([500]), net.encode(x[1:], Mask.from_grid(grid[1:], SHAPE)))
    padded = net.denoise(torch.zeros(2, 20, 384), torch.tensor([500] * 2), net.encode(x, Mask.from_grid(grid, SHAPE)))
    torch.testing.assert_close(padded[1, :6], first[0], atol=1e-5, rtol=1e-5)


def test_formats_without_rotary_positions_refuse(tmp_path):
    net = DiffMAE(ModelSettings(**SMALL))
    for form in ("timm", "hf"):
        with pytest.raises(UsageError, match="no rotary positions"):
            export_model(net, tmp_path / form, form)
