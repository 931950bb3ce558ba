"""Groups, schedule and average against their definitions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from diffmae_video.config import ModelSettings, TrainSettings
from diffmae_video.errors import UsageError
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.encoder import Encoder
from diffmae_video.training import optim, state


@pytest.fixture(scope="module")
def model():
    return DiffMAE(ModelSettings(preset="nano", frames=4, size=(16, 16), patch=8, positions="learned"))


def test_vectors_and_positions_do_not_decay(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {
        names[parameter]: group["weight_decay"]
        for group in optim.parameter_groups(model, 0.05)
        for parameter in group["params"]
    }
    assert decays.keys() == set(names.values())
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or name in model.no_weight_decay()
        assert decays[name] == (0.0 if exempt else 0.05), name
    assert any("position" in name and decays[name] == 0 for name in decays)


def test_layer_decay_follows_maes_rule():
    """facebookresearch/mae util/lr_decay.py: scale = decay ** (depth + 1 - layer), embedding 0, block i is i + 1."""
    encoder = DiffMAE(ModelSettings(preset="nano", frames=4, size=(16, 16), patch=8)).encoder
    classifier = Classifier(encoder, 5)
    depth = len(encoder.blocks)
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    for group in optim.parameter_groups(classifier, 0.05, 0.75):
        for parameter in group["params"]:
            name = names[parameter]
            parts = name.split(".")
            layer = depth + 1
            if "blocks" in parts:
                layer = int(parts[parts.index("blocks") + 1]) + 1
            elif "embed" in name:
                layer = 0
            if "norm" in name and "blocks" not in parts:
                continue  # the last norm goes with the head in MAE, with its own layer in timm
            assert group["lr_scale"] == pytest.approx(0.75 ** (depth + 1 - layer)), name


def test_learning_rate():
    at = [optim.learning_rate(samples, 1000, 100, 2.0, 0.5) for samples in (0, 50, 100, 550, 1000, 1100)]
    assert at == pytest.approx([0, 1.0, 2.0, 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 2)), 0.5, 0.5])
    assert optim.peak_learning_rate(TrainSettings(base_lr=1e-3, batch_size=512)) == pytest.approx(2e-3)


def test_moving_average_against_its_definition():
    layer = nn.Linear(2, 2)
    average = optim.MovingAverage(layer.named_parameters(), 0.4)
    expected = layer.weight.detach().clone()
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4]):  # warm-up, then the setting
        with torch.no_grad():
            layer.weight.add_(1.0)
        average.update(step)
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    torch.testing.assert_close(average.average["weight"], expected)
    now = layer.weight.detach().clone()
    average.swap()
    torch.testing.assert_close(layer.weight.detach(), expected)
    average.swap()
    torch.testing.assert_close(layer.weight.detach(), now)


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion", "adafactor", "adanw", "sgdw"])
def test_any_optimizer_of_timm_continues_bit_for_bit(name):
    """Their counts live in tensors (AdamW), in numbers (Adafactor) or in the group (LAMB, Adan)."""

    def made():
        encoder = Encoder(ModelSettings(preset="nano", frames=4, size=(16, 16), patch=8), seed=0)
        classifier = Classifier(encoder, 5, head_init=0.1)
        classifier.encoder.patch_embed.requires_grad_(False)  # frozen parameters have no state
        return classifier, optim.build_optimizer(classifier, TrainSettings(optimizer=name, layer_decay=0.75))

    def step(classifier, optimizer, number):
        clips = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(number))
        classifier(clips).square().sum().backward()
        optim.set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    straight, first = made()
    state.run_tensors(straight, first, None)  # a checkpoint before the first step changes nothing
    for number in range(4):
        step(straight, first, number)
    half, second = made()
    for number in range(2):
        step(half, second, number)
    saved = {key: tensor.clone() for key, tensor in state.run_tensors(half, second, None).items()}
    numbers = json.loads(json.dumps(state.optimizer_numbers(half, second)))
    resumed, third = made()
    places = state.run_tensors(resumed, third, None)
    assert places.keys() == saved.keys()
    for key, tensor in saved.items():
        places[key].copy_(tensor)
    state.set_optimizer(resumed, third, numbers)
    for number in range(2, 4):
        step(resumed, third, number)
    expected = straight.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.state_dict().items())


def test_unknown_optimizers_are_named_with_the_nearest(model):
    with pytest.raises(UsageError, match=r"adamww is no optimizer of timm \(did you mean adamw\?\)"):
        optim.build_optimizer(model, TrainSettings(optimizer="adamww"))
    with pytest.raises(UsageError, match="second derivatives"):
        optim.build_optimizer(model, TrainSettings(optimizer="adahessian"))
