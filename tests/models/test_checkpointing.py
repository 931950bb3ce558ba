"""Activation checkpointing: the same gradients from less that is kept."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffmae_video.config import ModelSettings, TrainSettings
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE, Draw
from diffmae_video.training.footprint import measure_step, shapes_only

MODES = (False, "selective", True)  # from most kept to least
SMALL = {"preset": "nano", "frames": 4, "size": (32, 32), "patch": 8, "width": 32, "depth": 2, "heads": 2}
SMALL |= {"decoder_width": 32, "decoder_heads": 2}


@pytest.mark.parametrize("decoder", ["joint", "cross_self", "cross"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_are_equal_also_under_accumulation(decoder, precision):
    net = DiffMAE(ModelSettings(**SMALL, decoder=decoder, timestep="adaln", drop_path=0.3)).train()
    clips = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    mask, results = make_mask("random", 0.75, net.encoder.shape, [0, 1]), []
    for mode, times in itertools.product(MODES, (1, 2)):
        net.set_grad_checkpointing(mode)
        net.zero_grad()
        for _ in range(times):
            torch.manual_seed(0)  # of stochastic depth
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = net(clips, mask, net.draw([1, 2], mask)).loss
            (loss / times).backward()
        results.append([parameter.grad.clone() for parameter in net.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("decoder", ["joint", "cross_self", "cross"])
def test_fewer_activations_are_kept(decoder):
    """A step's peak: of all activations, of what matrix products and attention gave, of the blocks' inputs."""
    peaks, flops, mask = [], [], make_mask("random", 0.5, (2, 16, 16), range(16))
    fields = {"width": 64, "depth": 6, "heads": 2, "decoder_width": 64, "decoder_heads": 2, "decoder": decoder}
    for mode in MODES:
        with shapes_only():
            net = DiffMAE(ModelSettings(preset="nano", frames=4, size=(64, 64), patch=4, **fields)).train()
            clips = torch.zeros(16, 3, 4, 64, 64)
            draw = Draw(torch.zeros(16, dtype=torch.int64), torch.zeros(16, 256, net.patch_values), None)
            train = TrainSettings(grad_checkpointing=mode, precision="bf16")
            cost = measure_step(net, lambda: net(clips, mask, draw).loss, train, 16)  # noqa: B023
        peaks.append(cost.peak_bytes - cost.state_bytes - cost.gradient_bytes)
        flops.append(cost.train_flops)
    assert peaks[1] < 0.8 * peaks[0]
    assert peaks[2] < peaks[1]
    assert flops[0] == flops[1] < flops[2]  # no product is computed twice, or most of them are
