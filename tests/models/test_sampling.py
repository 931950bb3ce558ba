"""What `DiffMAE.sample` promises beyond its samplers, and what the encoder and its links give the decoder."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import pytest
import torch
from torch import nn

from diffmae_video.config import ModelSettings
from diffmae_video.masking import Mask, make_mask
from diffmae_video.models.diffmae import DiffMAE, Draw
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.patches import pixel_bounds

SHAPE = (2, 4, 4)
SMALL = {"preset": "nano", "width": 32, "depth": 4, "heads": 2, "frames": 4, "size": (32, 32), "patch": 8}
SMALL |= {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 2}


def model(**changes) -> DiffMAE:
    """A small model with every parameter away from its first value."""
    net, generator = DiffMAE(ModelSettings(**SMALL | changes)), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return net.eval()


def clips(seed: int = 0, batch: int = 2) -> torch.Tensor:
    """Random clips within black and white."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, 4, 32, 32, generator=generator) * 2 - 1


MASK = make_mask("random", 0.75, SHAPE, [0, 1])


def test_one_encoding_serves_all_steps_and_samples():
    net, calls = model(), []
    net.encoder.norm.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    out = net.sample(clips(), MASK, seeds=[1, 2], steps=6, samples=3)
    assert calls == [2]  # the clips once each, whatever the steps and samples
    assert out.shape == (2, 3, 3, 4, 32, 32)


def test_a_sample_depends_on_its_seed_and_number_alone():
    net, x = model(), clips()
    many = net.sample(x, MASK, seeds=[5, 6], steps=3, samples=3, sampler="ddpm")
    assert not torch.equal(many[0, 0], many[0, 1])
    again = net.sample(x[1:], Mask.from_grid(MASK.grid[1:], SHAPE), seeds=[6], steps=3, samples=2, sampler="ddpm")
    torch.testing.assert_close(again[0], many[1, :2], atol=1e-5, rtol=1e-5)
    one = net.sample(x, MASK, seeds=[5, 6], steps=3, sampler="ddpm")
    torch.testing.assert_close(one, many[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pixel_norm", ["symmetric", "imagenet"])
def test_predictions_stay_within_black_and_white(pixel_norm):
    net = model(pixel_norm=pixel_norm)
    with torch.no_grad():
        net.decoder.head.bias.add_(torch.linspace(-9, 9, net.patch_values))
    low, high = (bound[:3].view(3, 1, 1, 1) for bound in pixel_bounds(pixel_norm, net.patch_values))
    x, hidden = torch.zeros(2, 3, 4, 32, 32), MASK.pixels(2, 8)[:, None].expand(-1, 3, -1, -1, -1)
    seen = [step.clips() for step in net.sample_steps(x, MASK, seeds=[1, 2], steps=3)]
    out = net.sample(x, MASK, seeds=[1, 2], steps=3)
    for clip in (*seen, out):
        inside = (clip >= low - 1e-6) & (clip <= high + 1e-6)
        assert bool(inside[hidden].all())
    free = net.sample(x, MASK, seeds=[1, 2], steps=3, clip_x0=False)
    assert float(free.abs().max()) > 5


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_known_pixels_guide_their_surroundings(sampler):
    """What is known inside a masked patch changes what is sampled around it, not only itself."""
    net, known = model(), torch.zeros(2, 1, 4, 32, 32, dtype=torch.bool)
    known[..., ::8, :] = True  # a row of each patch
    hidden = (MASK.pixels(2, 8)[:, None] & ~known).expand(-1, 3, -1, -1, -1)
    x = clips()
    other = torch.where(known & MASK.pixels(2, 8)[:, None], -x, x)
    outs = [net.sample(clip, MASK, seeds=[1, 2], steps=4, sampler=sampler, known=known) for clip in (x, other)]
    assert float((outs[0] - outs[1])[hidden].abs().max()) > 1e-4
    blind = [net.sample(clip, MASK, seeds=[1, 2], steps=4, sampler=sampler) for clip in (x, other)]
    assert torch.equal(blind[0][hidden], blind[1][hidden])


def test_ddpm_objective_sees_nothing_clean():
    """At the last timestep all that its networks read is noise: the prediction forgets the clip, visible or not."""
    net = model(objective="ddpm")
    draw = net.draw([1, 2], MASK)
    assert draw.noise.shape == (2, 32, 384)  # of every token
    predictions = []
    for timestep in (999, 0):
        last = Draw(torch.full((2,), timestep), draw.noise, None)
        with torch.no_grad():
            one, two = (net(clips(seed), MASK, last).prediction for seed in (0, 1))
        predictions.append(float((one - two).abs().max()))
    assert predictions[0] < 1e-4 < predictions[1]


@pytest.mark.parametrize(("links", "read"), [("even", [3, 1]), ("last", [3, 3])])
def test_each_decoder_block_reads_the_encoder_block_it_is_linked_to(links, read):
    net, contexts, caught = model(links=links), [], {}
    for block in net.decoder.blocks:
        block.context_norm.register_forward_hook(lambda module, inputs, output: contexts.append(inputs[0]))
    for number, block in enumerate(net.encoder.blocks):
        block.register_forward_hook(lambda module, inputs, output, number=number: caught.update({number: output}))
    with torch.no_grad():
        net.denoise(torch.zeros(2, 24, 384), torch.tensor([5, 5]), net.encode(clips(), MASK))
    caught[3] = net.encoder.norm(caught[3])  # the last one is read after the encoder's own norm
    assert len(contexts) == 2
    for context, block in zip(contexts, read, strict=True):
        assert torch.equal(context, caught[block])


def test_stochastic_depth_rises_linearly_and_rests_in_evaluation():
    encoder = Encoder(ModelSettings(**SMALL | {"drop_path": 0.6}))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in encoder.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6])
    x = clips(batch=16)
    torch.manual_seed(0)
    assert not torch.equal(encoder.train()(x), encoder(x))
    assert torch.equal(encoder.eval()(x), encoder(x))
    plain = Encoder(ModelSettings(**SMALL)).eval()  # the same first weights
    assert torch.equal(encoder(x), plain(x))
    assert all(isinstance(block.drop_path, nn.Identity) for block in plain.blocks)


@pytest.mark.parametrize(("patch", "tokens"), [(14, 8 * 16 * 16), (16, 8 * 14 * 14)])
def test_huge_with_either_patch(patch, tokens):
    with torch.device("meta"):
        net = DiffMAE(ModelSettings(preset="huge", patch=patch))
        out = net.encoder(torch.empty(1, 3, 16, 224, 224))
        assert out.shape == (1, tokens, 1280)
    assert net.patch_values == 2 * patch * patch * 3
    assert len(net.encoder.blocks) == 32
