"""Shares of a mix, and the predicted cost against independent counts."""

from __future__ import annotations

import pytest
import torch

from diffmae_video.config import load_settings
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.pipelines.plan import make_plan, measure
from diffmae_video.training.mix import next_source


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.7, 0.2, 0.1), (1.0, 1e-3)])
def test_shares_stay_within_one_step(weights):
    counts = [0] * len(weights)
    for step in range(1, 400):
        counts[next_source(counts, weights)] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - step * weight / sum(weights)) < 1


def test_parameters_equal_the_real_model():
    settings = load_settings("video-tiny", "pretrain")
    cost = measure(settings)
    model = DiffMAE(settings.model, settings.diffusion)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_flops_against_a_count_by_hand():
    """MAE on images: encoder on 49 of 196 tokens, decoder on 196, matrix products alone; backward is twice forward."""
    settings = load_settings("mae-base", "pretrain")
    forward = measure(settings).forward_flops

    def blocks(tokens, width, depth):
        return depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)

    seen = 49 + 1
    by_hand = 2 * 49 * 2 * 768 * 768 + blocks(seen, 768, 12) + 2 * seen * 768 * 512 + blocks(197, 512, 8)
    heads = 2 * 196 * 512 * 2 * 768  # one image fills a tubelet of two frames
    assert forward == pytest.approx(by_hand + heads, rel=0.03)


def test_given_throughput_gives_the_hours():
    settings = load_settings("smoke", "pretrain", ["train.steps=100", "train.batch_size=36"])
    plan = make_plan(settings, 1000, 2**30, world=1, device=torch.device("cpu"), throughput=2.0)
    assert plan.hours == pytest.approx(100 * 36 / 2 / 3600)
    assert plan.data_gib == pytest.approx(3.6)
    assert plan.steps == 100
