"""What a training step hides, and whether it denoises."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmae_video.masking import Mask
from diffmae_video.models.patches import gather_tokens
from diffmae_video.registry import objectives


class Objective:
    """What is visible, and whether there is noise; both are facts at registration.

    `noise`: the decoder denoises and is told the timestep; without it, it fills in mask tokens. `sees`: the encoder
    reads the visible patches, once for all steps; without it, it reads the noisy ones, and only they are there.
    """

    noise: bool = True
    sees: bool = True

    def mask(self, mask: Mask) -> Mask:
        """The mask that the model works with, given the one asked for."""
        return mask

    def encoder_input(self, patches: Tensor | None, noisy: Tensor | None, mask: Mask) -> Tensor:
        """What the encoder reads (B, V, P), of clean patches (B, N, P) and noisy ones (B, M, P)."""
        assert patches is not None
        return gather_tokens(patches, mask.visible)


@objectives.register("diffmae")
class DiffMAEObjective(Objective):
    """Masked patches are denoised, given the visible ones."""


@objectives.register("mae", noise=False)
class MAEObjective(Objective):
    """Masked patches are predicted at once, given the visible ones: the first step of the above."""


@objectives.register("ddpm", sees=False)
class DDPMObjective(Objective):
    """Everything is denoised, given nothing: encoder and decoder are one network of noisy patches."""

    def mask(self, mask: Mask) -> Mask:
        """Every token is masked, and every token is read."""
        every = torch.arange(mask.grid.shape[1], device=mask.grid.device).expand(mask.batch, -1)
        return Mask(torch.ones_like(mask.grid), mask.shape, every, every)

    def encoder_input(self, patches: Tensor | None, noisy: Tensor | None, mask: Mask) -> Tensor:
        """The noisy patches."""
        assert noisy is not None
        return noisy
