"""Patches in principal components: what is noised, what is predicted beside it, what is saved."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import pytest
import torch

from diffmae_video.config import DiffusionSettings, ModelSettings
from diffmae_video.errors import UsageError
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import patchify
from diffmae_video.models.space import PatchSpace
from diffmae_video.models.weights import load_model, save_model

SMALL = {"preset": "nano", "width": 32, "depth": 2, "heads": 2, "frames": 4, "size": (16, 16), "patch": 4}
SMALL |= {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 1}
SHAPE = (2, 4, 4)


def clips(seed: int = 0, batch: int = 8) -> torch.Tensor:
    """Smooth random clips within black and white, so that their components differ in variance."""
    x = torch.rand(batch, 3, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (torch.nn.functional.avg_pool3d(x, (3, 5, 5), 1, (1, 2, 2)) * 3).clamp(-1, 1)


def model(**changes) -> DiffMAE:
    """A small model that knows the statistics of `clips()`."""
    net = DiffMAE(ModelSettings(**SMALL | changes), DiffusionSettings(rho=1.0)).eval()
    if net.space.missing:
        net.space.estimate([patchify(clips(), 2, 4)])
    return net


def test_components_are_those_of_the_covariance():
    mix = torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.1, 0.1, 0.01]))
    mix[0, 1] = 1
    rows = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1)) @ mix
    space = PatchSpace("pca:2", 6)
    assert space.missing
    space.estimate((rows + 7).split(1000))
    assert not space.missing
    values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))
    torch.testing.assert_close(space.deviation.square(), values.flip(0), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(space.mean, rows.mean(0) + 7, atol=1e-4, rtol=1e-5)
    assert float((space.basis.mT @ vectors.flip(1)).diagonal()[:3].abs().min()) > 0.999
    assert space.kept == pytest.approx(float(values.flip(0)[:2].sum() / values.sum()), rel=1e-4)
    turned = space.from_pixels(rows + 7)
    torch.testing.assert_close(space.to_pixels(turned), rows + 7, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(turned.norm(dim=1), (rows - rows.mean(0)).norm(dim=1), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(turned.std(0, correction=0), space.deviation, atol=1e-3, rtol=1e-2)
    with pytest.raises(UsageError, match="5 patches are too few"):
        PatchSpace("pca:2", 6).estimate([rows[:5]])


def test_turning_keeps_its_precision_under_autocast():
    net = model(space="pca:10")
    patches = patchify(clips(), 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        again = net.space.to_pixels(net.space.from_pixels(patches))
    torch.testing.assert_close(again, patches, atol=1e-5, rtol=1e-5)


def test_a_model_in_pixels_has_no_statistics():
    net = model()
    assert not net.space.missing
    assert not [name for name in net.state_dict() if name.startswith("space.")]


def test_the_loss_means_the_same_in_both_spaces():
    """Without noise the answer 0 is the mean: the loss is the variance of the masked patches, in whatever basis."""
    x, mask = clips(), make_mask("random", 0.75, SHAPE, range(8))
    losses = []
    for space in ("pca:1000", "pca:10"):
        net = model(space=space, objective="mae")
        torch.nn.init.zeros_(net.decoder.head.weight)
        losses.append(float(net(x, mask, net.draw(range(8), mask)).loss.detach()))
        hidden = patchify(x, 2, 4).gather(1, mask.masked[..., None].expand(-1, -1, 96)) - net.space.mean
        assert losses[-1] == pytest.approx(float(hidden.square().mean()), rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("target", ["pixel", "velocity"])
def test_the_decoder_reads_the_noised_components_alone(target):
    net, mask, seen = model(space="pca:10", target=target), make_mask("random", 0.75, SHAPE, range(2)), []
    assert net.decoder.noisy_embed.in_features == 10
    net.decoder.noisy_embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = clips(batch=2)
    draw = net.draw(range(2), mask)
    assert draw.noise.shape == (2, 24, 10)
    output = net(x, mask, draw)
    assert output.prediction.shape == (2, 24, 96)
    clean = net.space.from_pixels(patchify(x, 2, 4).gather(1, mask.masked[..., None].expand(-1, -1, 96)))[..., :10]
    signal, sigma = (table[draw.timestep].view(-1, 1, 1) for table in (net.signal, net.sigma))
    noisy = signal * clean + sigma * draw.noise
    torch.testing.assert_close(seen[0], noisy)
    for sampler in ("ddim", "ddpm", "dpm++", "heun"):
        filled = net.sample(x, mask, seeds=[1, 2], steps=4, sampler=sampler)
        visible = ~mask.pixels(2, 4)[:, None].expand_as(x)
        assert torch.equal(filled[visible], x[visible])
        assert bool(filled.isfinite().all())


def test_detail_outside_the_components_is_predicted():
    """Clips that lie outside the first component alone are learned all the same: by regression."""
    net = model(space="pca:1", target="velocity")
    x_0 = net.space.from_pixels(patchify(clips(), 2, 4))  # (8, 32, 96)
    signal, sigma = net.space.levels(torch.full((8, 1, 1), 0.6), torch.full((8, 1, 1), 0.8))
    expected = net.target.expected(x_0, torch.zeros_like(x_0), signal, sigma)
    torch.testing.assert_close(expected[..., 1:], -x_0[..., 1:])
    answered = net.target.x_0(expected, signal * x_0, signal, sigma)
    torch.testing.assert_close(answered, x_0, atol=1e-5, rtol=1e-4)


def test_statistics_are_saved_with_the_weights(tmp_path):
    net, x, mask = model(space="pca:10"), clips(batch=2), make_mask("random", 0.75, SHAPE, range(2))
    save_model(net, tmp_path)
    again = load_model(tmp_path).eval()
    assert not again.space.missing
    assert torch.equal(again.sample(x, mask, seeds=[1, 2], steps=3), net.sample(x, mask, seeds=[1, 2], steps=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "pca"}, "pca:K"),
        ({"space": "pca:0"}, "pca:K"),
        ({"space": "pca:8", "target": "noise"}, "target = 'noise'"),
        ({"space": "pca:8", "target": "norm_pixel"}, "target = 'norm_pixel'"),
        ({"space": "pca:8", "objective": "ddpm"}, "objective = 'ddpm'"),
        ({"target": "velocity", "objective": "mae"}, "needs noise"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelSettings(**SMALL | changes)
