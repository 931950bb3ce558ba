"""Groups, schedule and average against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffmae_video.config import ModelSettings, TrainSettings
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.training import optim


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
