"""A masker, target, sampler and decoder from outside the package: registered, named in settings, used by the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from diffmae_video import registry
from diffmae_video.config import MaskSettings, ModelSettings, RenderSettings
from diffmae_video.diffusion.samplers import Step
from diffmae_video.diffusion.targets import Target
from diffmae_video.errors import UsageError
from diffmae_video.masking import make_mask, parse_mask
from diffmae_video.models.diffmae import DiffMAE, Draw
from diffmae_video.models.patches import gather_tokens, patchify

SHAPE = (2, 4, 4)
SMALL = {"preset": "nano", "width": 32, "depth": 2, "heads": 2, "frames": 4, "size": (32, 32), "patch": 8}
SMALL |= {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 2}


@pytest.fixture(autouse=True)
def _own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for parts in (registry.maskers, registry.targets, registry.samplers, registry.decoders, registry.teachers):
        monkeypatch.setattr(parts, "_parts", dict(parts._parts))


def clips() -> torch.Tensor:
    """Two random clips."""
    return torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_masker():
    with pytest.raises(ValidationError, match=r"'rows' is no masker.*random, tube"):
        MaskSettings(kind="rows")

    @registry.maskers.register("rows", ratio=0.25)
    def rows(shape, ratio, generator):
        grid = torch.zeros(shape, dtype=torch.bool)
        grid[:, : round(ratio * shape[1])] = True
        return grid.flatten()

    settings = MaskSettings(kind="rows", ratio=0.5)
    mask = make_mask(settings.kind, settings.ratio, SHAPE, [0, 1])
    assert mask.grid.view(2, *SHAPE)[0, 1].all(1).tolist() == [True, True, False, False]
    assert int(parse_mask("rows", SHAPE, 2, 8)([0]).grid.sum()) == 8  # its own default: one row of four
    with pytest.raises(ValueError, match=r"future, rows, box"):
        parse_mask("fog", SHAPE)


def test_a_target():
    @registry.targets.register("double", noise=True)
    class Double(Target):
        """Twice x_0, less a tenth of the noise."""

        def expected(self, x_0, noise, signal, sigma):
            return 2 * x_0 - 0.1 * noise

        def x_0(self, answer, x_t, signal, sigma):
            return (answer * sigma + 0.1 * x_t) / (2 * sigma + 0.1 * signal)

    with pytest.raises(ValidationError, match="target = 'double' needs noise, and objective = 'mae' has none"):
        ModelSettings(**SMALL, target="double", objective="mae")
    net, mask = DiffMAE(ModelSettings(**SMALL, target="double")).eval(), make_mask("random", 0.75, SHAPE, [0, 1])
    when, noise = torch.tensor([50, 200]), net.draw([1, 2], mask).noise
    signal, sigma = net.signal[when].view(-1, 1, 1), net.sigma[when].view(-1, 1, 1)
    clean = gather_tokens(patchify(clips(), 2, 8), mask.masked)
    net.decoder.forward = lambda *inputs: 2 * clean - 0.1 * noise
    assert float(net(clips(), mask, Draw(when, noise, None)).loss) == pytest.approx(0, abs=1e-9)
    found = net.denoise(signal * clean + sigma * noise, when, net.encode(clips(), mask))
    torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)


def test_a_sampler():
    @registry.samplers.register("once")
    def once(denoise, x_T, schedule, steps, generator=None, spacing="angle"):
        """One prediction, whatever is asked for."""
        last = len(schedule) - 1
        yield Step(0, last, x_T, denoise(x_T, torch.full((len(x_T),), last)))

    render = RenderSettings(sampler="once", steps=7)
    net, mask = DiffMAE(ModelSettings(**SMALL)).eval(), make_mask("random", 0.75, SHAPE, [0, 1])
    steps = list(net.sample_steps(clips(), mask, seeds=[1, 2], sampler=render.sampler, steps=render.steps))
    assert [step.timestep for step in steps] == [999]
    assert torch.equal(steps[0].clips(), net.sample(clips(), mask, seeds=[1, 2], sampler="ddim", steps=1))
    with pytest.raises(UsageError, match=r"'twice' is no sampler.*ddpm, ddim.*once"):
        net.sample(clips(), mask, seeds=[1, 2], sampler="twice")


def test_a_decoder():
    @registry.decoders.register("pooled", links=True, apart=True)
    class Pooled(nn.Module):
        """Adds the mean of the visible tokens to every masked one."""

        def __init__(self, model, context_width, adaln):
            super().__init__()
            self.project = nn.Linear(context_width, model.decoder_width)

        def forward(self, x, context, attn_mask, context_mask, condition):
            return x + self.project(context.mean(1, keepdim=True))

    net = DiffMAE(ModelSettings(**SMALL, decoder="pooled", loss_tokens=0.5))
    mask = make_mask("random", 0.75, SHAPE, [0, 1])
    out = net(clips(), mask, net.draw([1, 2], mask))
    out.loss.backward()
    assert out.prediction.shape == (2, 12, 384)
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert net.sample(clips(), mask, seeds=[1, 2]).shape == (2, 3, 4, 32, 32)


def test_entry_points_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "other_parts.py").write_text(
        "import torch\n"
        "from diffmae_video.registry import maskers\n"
        "@maskers.register('first', ratio=0.5)\n"
        "def first(shape, ratio, generator):\n"
        "    grid = torch.zeros(shape, dtype=torch.bool)\n"
        "    grid[: round(ratio * shape[0])] = True\n"
        "    return grid.flatten()\n"
        "def teacher():\n"
        "    module = torch.nn.AvgPool2d(8)\n"
        "    module.width = 3\n"
        "    return module\n"
    )
    info = tmp_path / "other_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[diffmae_video.maskers]\nfirst = other_parts:first\n[diffmae_video.teachers]\ncolours = other_parts:teacher\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.maskers.names()[-1] == "first"
    assert MaskSettings(kind="first").kind == "first"
    assert parse_mask("first", (4, 1, 2))([0]).grid[0].tolist() == [True] * 4 + [False] * 4
    teacher = {"source": "local", "name": "colours", "depth": 1}
    net = DiffMAE(ModelSettings(**SMALL, teacher=teacher))
    assert net.settings.teacher is not None
    assert net.settings.teacher.width == 3
    mask = make_mask("random", 0.75, SHAPE, [0, 1])
    net(clips(), mask, net.draw([1, 2], mask)).loss.backward()
