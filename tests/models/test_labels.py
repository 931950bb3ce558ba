"""Labels told to the decoder: withheld by seed, followed by guidance, named by users."""

from __future__ import annotations

import pytest
import torch

from diffmae_video.config import DiffusionSettings, MaskSettings, ModelSettings
from diffmae_video.errors import UsageError
from diffmae_video.evaluation.denoising import DenoisingClassifier
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.labels import find_label
from diffmae_video.models.patches import gather_tokens, patchify

SHAPE = (2, 4, 4)
SMALL = {"preset": "nano", "width": 32, "depth": 2, "heads": 2, "frames": 4, "size": (32, 32), "patch": 8}
SMALL |= {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 2, "labels": 3}
MASK = make_mask("random", 0.75, SHAPE, [0, 1])


def model(diffusion: DiffusionSettings | None = None, **changes) -> DiffMAE:
    """A small model with every parameter away from its first value."""
    net = DiffMAE(ModelSettings(**SMALL | changes), diffusion)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return net.eval()


def clips(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_labels_are_withheld_at_the_given_rate_and_by_their_own_seed():
    net, mask = model(label_drop=0.3), make_mask("random", 0.75, SHAPE, range(4000))
    labels = torch.arange(4000) % 3
    told = net.draw(range(4000), mask, labels).label
    assert set(told[told != labels].tolist()) == {3}
    assert float((told == 3).float().mean()) == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)
    turned = net.draw(range(4000), mask, 2 - labels)
    assert torch.equal(turned.label == 3, told == 3)  # whether it is told does not depend on the label
    without = net.draw(range(4000), mask)
    assert without.label is None
    assert torch.equal(without.noise, turned.noise)
    assert torch.equal(without.timestep, turned.timestep)
    assert net.draw([1, 2], MASK, torch.tensor([-1, -1])).label.tolist() == [3, 3]


@pytest.mark.parametrize("decoder", ["joint", "cross_self", "cross"])
@pytest.mark.parametrize("timestep", ["add", "adaln"])
@pytest.mark.parametrize("objective", ["diffmae", "mae", "ddpm"])
def test_the_label_reaches_the_decoder_and_nothing_else(decoder, timestep, objective):
    net = model(decoder=decoder, timestep=timestep, objective=objective)
    draw = net.draw([1, 2], MASK)
    told = [net(clips(), MASK, draw._replace(label=torch.tensor([k, 1]))).prediction for k in (0, 1, 3)]
    free = net(clips(), MASK, draw).prediction
    assert all(torch.equal(one[1], told[0][1]) for one in told[:2])  # of its own sample alone
    assert float((told[0][0] - told[1][0]).detach().abs().max()) > 1e-4
    assert torch.equal(told[2][0], free[0])  # the last one means none
    encodings = [
        net.encode(
            clips(),
            MASK,
        )
        for _ in range(2)
    ]
    assert torch.equal(encodings[0].latents, encodings[1].latents)


def test_a_model_without_labels_has_the_weights_it_had():
    with_labels, without = DiffMAE(ModelSettings(**SMALL)), DiffMAE(ModelSettings(**SMALL | {"labels": 0}))
    assert not any("label" in name for name in without.state_dict())
    assert {n for n in with_labels.state_dict() if n not in without.state_dict()} == {"decoder.label_embed.weight"}
    assert without.draw([1, 2], MASK, torch.tensor([0, 1])).label is None
    with pytest.raises(UsageError, match="knows no labels"):
        without.sample(clips(), MASK, seeds=[1, 2], labels=[0, 1])


@pytest.mark.parametrize("target", ["pixel", "noise", "velocity"])
def test_guided_steps_are_those_of_guided_noise(target):
    """Along a whole DDIM chain, guiding x_0 equals guiding the noise, computed here from DDIM's own equations."""
    net = model(DiffusionSettings(rho=1.5), target=target).double()
    x, labels, weight = clips().double(), torch.tensor([0, 2]), 3.0
    steps = list(
        net.sample_steps(x, MASK, seeds=[1, 2], steps=4, sampler="ddim", labels=labels, guidance=weight, clip_x0=False)
    )
    encoding = net.encode(x, MASK)
    state = steps[0].x_t
    for number, step in enumerate(steps):
        time = torch.full((2,), step.timestep)
        signal, sigma = (table.double()[step.timestep] for table in (net.signal, net.sigma))
        with torch.no_grad():
            free, told = (net.denoise(state, time, encoding._replace(label=one)) for one in (None, labels))
        noises = [(state - signal * x_0) / sigma for x_0 in (free, told)]
        noise = noises[0] + weight * (noises[1] - noises[0])
        torch.testing.assert_close(step.x_0, (state - sigma * noise) / signal, atol=1e-6, rtol=1e-6)
        if number + 1 < len(steps):
            following = steps[number + 1].timestep
            state = net.signal.double()[following] * step.x_0 + net.sigma.double()[following] * noise
            torch.testing.assert_close(steps[number + 1].x_t, state, atol=1e-5, rtol=1e-5)


def test_guidance_of_one_and_of_none_ask_the_decoder_once():
    net, x, calls = model(), clips(), []
    net.decoder.head.register_forward_hook(lambda *_: calls.append(1))

    def sample(**options):
        calls.clear()
        return net.sample(x, MASK, seeds=[1, 2], steps=3, **options), len(calls)

    told, asked = sample(labels=[0, 1])
    assert asked == 3
    free, asked = sample()
    assert asked == 3
    none, asked = sample(labels=[0, 1], guidance=0.0)
    assert asked == 3
    assert torch.equal(none, free)
    assert not torch.equal(told, free)
    far, asked = sample(labels=[0, 1], guidance=2.0)
    assert asked == 6
    assert not torch.equal(far, told)
    both = net.sample(x, MASK, seeds=[1, 2], steps=3, labels=[0, 1], samples=2)
    torch.testing.assert_close(both[:, 0], told, atol=1e-5, rtol=1e-5)
    assert torch.equal(net.sample(x, MASK, seeds=[1, 2], steps=3, labels=[-1, -1]), free)


def test_labels_are_checked_and_found_by_name():
    net = model()
    for wrong in ([0, 3], [-2, 0]):
        with pytest.raises(UsageError, match="knows 0 to 2"):
            net.sample(clips(), MASK, seeds=[1, 2], labels=wrong)
    net.info["classes"] = ["run", "jump", "swim"]
    assert find_label(net, "jump") == 1
    with pytest.raises(UsageError, match="did you mean jump"):
        find_label(net, "jumps")
    with pytest.raises(UsageError, match="trained without labels"):
        find_label(model(labels=0), "run")


class Oracle(DiffMAE):
    """Predicts a constant that depends on the label: the clip itself under its own label, a grey clip otherwise."""

    def forward(self, clips, mask, draw, scored=None, encoding=None):
        output = super().forward(clips, mask, draw, encoding=encoding)
        truth = gather_tokens(patchify(clips, self.tubelet, self.patch), mask.masked)
        levels = torch.tensor([-0.5, 0.0, 0.5])[draw.label].view(-1, 1, 1)
        error = (truth - levels).square().mean((1, 2))
        return output._replace(per_sample=error, loss=error.mean())


def test_denoising_classifies_by_the_least_error():
    net = Oracle(ModelSettings(**SMALL)).eval()
    classifier = DenoisingClassifier(net, MaskSettings(kind="random", ratio=0.75), draws=3)
    levels = torch.tensor([0.5, -0.5, 0.0, 0.3])
    flat = levels.view(-1, 1, 1, 1, 1).expand(4, 3, 4, 32, 32)
    expected = (levels[:, None] - torch.tensor([-0.5, 0.0, 0.5])).square()
    torch.testing.assert_close(classifier.errors(flat), expected, atol=1e-6, rtol=1e-6)
    assert classifier(flat).argmax(1).tolist() == [2, 0, 1, 2]
    values = 24 * net.patch_values  # hidden in one draw
    nearest = expected[3].min()
    logits = -0.5 * values * expected[3] / nearest
    torch.testing.assert_close(classifier(flat)[3], logits, atol=1e-2, rtol=1e-4)
    with pytest.raises(UsageError, match="trained without labels"):
        DenoisingClassifier(model(labels=0), MaskSettings(), draws=1)


def test_each_label_sees_the_same_masks_and_noise():
    """With labels that mean the same the errors are equal, which differing draws would not give."""
    net = model()
    with torch.no_grad():
        net.decoder.label_embed.weight.copy_(net.decoder.label_embed.weight[:1].expand(4, -1))
    errors = DenoisingClassifier(net, MaskSettings(ratio=0.75), draws=4).errors(clips())
    assert torch.equal(errors, errors[:, :1].expand(2, 3))
    again = DenoisingClassifier(net, MaskSettings(ratio=0.75), draws=4).errors(clips().flip(0)).flip(0)
    torch.testing.assert_close(errors, again, atol=1e-5, rtol=1e-5)  # nor do they depend on the batch
