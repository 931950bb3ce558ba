"""Shares of a mix, and the predicted cost against independent counts."""

from __future__ import annotations

import functools
import gc
import itertools
import json

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from diffmae_video.config import TrainSettings, load_settings
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.pipelines.plan import make_plan, measure
from diffmae_video.training import optim
from diffmae_video.training.footprint import measure_step, shapes_only
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


def test_flops_do_not_depend_on_the_attention_kernel():
    """bf16 and fp32 take different kernels on a CPU; the arithmetic is the same."""
    half, full = (measure(load_settings("video-tiny", "pretrain", [f"train.precision={p}"])) for p in ("bf16", "fp32"))
    assert (half.forward_flops, half.train_flops) == (full.forward_flops, full.train_flops)


def test_measuring_does_not_trust_the_default_device(monkeypatch):
    """While transformers loads a model it replaces `torch.linspace`. A `with torch.device(...)` that is the process's
    first remembers the replacement as a factory, and the real one goes unheeded ever after: half of a model built on
    the meta device then lies on the CPU."""
    settings = load_settings("smoke", "pretrain")
    expected, random = measure(settings), torch.get_rng_state()
    known = torch.utils._device._device_constructors
    known.cache_clear()
    try:
        with monkeypatch.context() as patch:
            for name in ("linspace", "arange", "zeros", "ones", "empty", "full", "tensor"):
                patch.setattr(torch, name, functools.partial(getattr(torch, name)))
            with torch.device("meta"):
                torch.eye(1)
        with torch.device("meta"):
            assert torch.linspace(0, 1, 2).device.type == "cpu"  # the trap is set
        assert measure(settings) == expected
    finally:
        known.cache_clear()
    assert torch.get_rng_state().equal(random)
    assert torch.get_default_device().type == "cpu"


def test_a_failed_measurement_leaves_nothing_behind():
    def fail():
        raise ValueError("no such loss")

    with pytest.raises(ValueError, match="no such loss"), shapes_only():
        measure_step(nn.Linear(2, 2), fail, TrainSettings(ema=0.9))
    made = torch.ones(2) * 2
    assert type(made) is torch.Tensor
    assert made.tolist() == [2, 2]
    assert torch.get_default_device().type == "cpu"


def test_states_and_gradients_by_hand():
    """A linear layer of 1000 x 1000 without bias: 4 MB each for weight, gradient, two moments, average."""
    with shapes_only():
        layer, x = nn.Linear(1000, 1000, bias=False), torch.empty(8, 1000)
        found = measure_step(layer, lambda: layer(x).sum(), TrainSettings(precision="fp32", ema=0.9), clips=8)
        layer.zero_grad(set_to_none=True)
        without = measure_step(layer, lambda: layer(x).sum(), TrainSettings(precision="fp32"), clips=8)
    assert found.gradient_bytes == 4_000_000
    assert found.state_bytes == pytest.approx(4 * 4_000_000, abs=8)
    assert without.state_bytes == pytest.approx(3 * 4_000_000, abs=8)
    assert 0 <= without.peak_bytes - without.state_bytes - 4_000_000 <= 4 * 8 * 1000 * 4  # a few times the batch
    assert found.forward_flops == 2 * 1000 * 1000
    assert found.memory() - found.memory(shards=2) == pytest.approx(1.1 * 5 * 4_000_000 / 2, abs=16)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.precision=fp32",),
        ("train.precision=bf16", "train.ema=0.9"),
        ("train.precision=fp32", "train.grad_checkpointing=true"),
        ("train.precision=bf16", "train.accumulate=2"),
    ],
    ids=["fp32", "bf16-ema", "checkpointing", "accumulation"],
)
def test_predicted_peak_against_real_steps(overrides, tmp_path):
    """The same step with real tensors, by the allocator's record in PyTorch's profiler."""
    small = ("model.frames=8", "model.size=[112, 112]", "model.depth=4", "model.decoder_depth=2")
    settings = load_settings("video-tiny", "pretrain", [*small, *overrides])
    clips = 4
    predicted = measure(settings, clips).peak_bytes
    model = DiffMAE(settings.model, settings.diffusion).train()
    if settings.train.grad_checkpointing:
        model.set_grad_checkpointing(True)
    optimizer = optim.build_optimizer(model, settings.train)
    average = optim.MovingAverage(model.named_parameters(), settings.train.ema) if settings.train.ema else None
    seeds = list(range(clips))
    mask = make_mask(settings.mask.kind, settings.mask.ratio, (4, 7, 7), seeds)
    pixels, draw = torch.randn(clips, 3, 8, 112, 112), model.draw(seeds, mask)

    def step():
        for _ in range(settings.train.micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.train.precision == "bf16"):
                loss = model(pixels, mask, draw).loss
            loss.backward()
            del loss
        optimizer.step()
        if average is not None:
            average.update(0)

    step()
    optimizer.zero_grad(set_to_none=True)
    state = [model.state_dict(), optimizer.state_dict()["state"], average.average if average else {}, pixels, draw]
    before = sum(x.untyped_storage().nbytes() for x in tree_leaves(state) if isinstance(x, torch.Tensor))
    gc.collect()  # what other tests left behind would be freed within the record, and count against this step
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    peak = max(itertools.accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])))
    assert predicted == pytest.approx(before + peak, rel=0.1)


def test_given_throughput_gives_the_hours():
    settings = load_settings("smoke", "pretrain", ["train.steps=100", "train.batch_size=36"])
    plan = make_plan(settings, 1000, 2**30, world=1, device=torch.device("cpu"), throughput=2.0)
    assert plan.hours == pytest.approx(100 * 36 / 2 / 3600)
    assert plan.data_gib == pytest.approx(3.6)
    assert plan.steps == 100
