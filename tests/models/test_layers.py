"""Parts that carry timm's names, against timm's own."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import pytest
import torch
from timm.layers import Attention, DropPath, Mlp

from diffmae_video.models import layers


@pytest.mark.parametrize("bias", [True, False])
def test_attention_and_mlp_are_timms_bit_for_bit(bias: bool) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.ModuleList([Attention(24, 3, qkv_bias=bias), Mlp(24, 40)])
    torch.manual_seed(0)
    ours = torch.nn.ModuleList([layers.Attention(24, 3, qkv_bias=bias), layers.Mlp(24, 40)])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, mask = torch.randn(2, 7, 24), torch.rand(2, 1, 1, 7) > 0.4
    mask[..., 0] = True
    for attn_mask in (None, mask):
        assert torch.equal(ours[0](x, attn_mask), theirs[0](x, attn_mask))
    assert torch.equal(ours[1](x), theirs[1](x))


def test_drop_path_draws_as_timms() -> None:
    x = torch.randn(64, 3, 5)
    ours, theirs = layers.DropPath(0.3), DropPath(0.3)
    torch.manual_seed(1)
    one = ours(x)
    torch.manual_seed(1)
    assert torch.equal(one, theirs(x))
    assert 0 < (one == 0).all(2).all(1).sum() < 64
    assert torch.equal(ours.eval()(x), x)
