"""A loss that counts single pixels of the masked patches."""

from __future__ import annotations

import pytest
import torch

from diffmae_video.config import DiffusionSettings, ModelSettings
from diffmae_video.masking import Mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import patchify

MASKED = 20  # of 2 x 4 x 4 tokens


def build(**settings: str) -> DiffMAE:
    sizes = {"width": 16, "depth": 1, "heads": 2, "frames": 4, "size": (16, 16), "tubelet": 2, "patch": 4}
    decoder = {"decoder_depth": 1, "decoder_width": 16, "decoder_heads": 2}
    made = ModelSettings.model_validate({**sizes, **decoder, **settings})
    model = DiffMAE(made, DiffusionSettings())
    if model.space.missing:
        model.space.estimate([torch.randn(200, model.patch_values, generator=torch.Generator().manual_seed(1))])
    return model


KINDS = [{}, {"objective": "mae"}, {"space": "pca:5"}, {"target": "velocity"}, {"target": "velocity", "space": "pca:5"}]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_all_pixels_scored_is_the_plain_loss(settings: dict[str, str]) -> None:
    model, clips, mask = build(**settings), *inputs()
    draw = model.draw([3, 4], mask)
    plain = model(clips, mask, draw)
    scored = model(clips, mask, draw, torch.ones(2, 1, 4, 16, 16, dtype=torch.bool))
    torch.testing.assert_close(scored.per_sample, plain.per_sample)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_loss_is_the_mean_over_the_scored_pixels(settings: dict[str, str]) -> None:
    """Of two masks that share the pixels of the clip, each is told by the other and by all."""
    model, clips, mask = build(**settings), *inputs()
    draw = model.draw([3, 4], mask)
    some = torch.rand(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(5)) < 0.3
    everything = torch.ones_like(some)
    parts = [model(clips, mask, draw, part).per_sample for part in (some, ~some, everything)]
    counts = [counted(part, mask, model) for part in (some, ~some, everything)]
    torch.testing.assert_close(parts[0] * counts[0] + parts[1] * counts[1], parts[2] * counts[2])
    assert not torch.allclose(parts[0], parts[1])


def test_nothing_scored_is_no_loss() -> None:
    model, clips, mask = build(), *inputs()
    output = model(clips, mask, model.draw([3, 4], mask), torch.zeros(2, 1, 4, 16, 16, dtype=torch.bool))
    output.loss.backward()
    assert output.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def inputs() -> tuple[torch.Tensor, Mask]:
    """Clips, and a mask that hides another number of tokens in each."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.zeros(2, 32, dtype=torch.bool)
    grid[0, torch.randperm(32, generator=generator)[:MASKED]] = True
    grid[1, :7] = True
    return torch.randn(2, 3, 4, 16, 16, generator=generator), Mask.from_grid(grid, (2, 4, 4))


def counted(scored: torch.Tensor, mask: Mask, model: DiffMAE) -> torch.Tensor:
    """Scored values of masked patches, by sample."""
    values = patchify(scored.expand(-1, 3, -1, -1, -1).float(), model.tubelet, model.patch)
    return (values.sum(2) * mask.grid).sum(1)
