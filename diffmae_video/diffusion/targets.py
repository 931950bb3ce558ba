"""What the decoder is asked for, and how x_0 follows from its answer.

Letters: B batch, K predicted patches, P values of a patch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from diffmae_video.registry import targets


class Target:
    """A prediction target, and the space that x_0 lives in: pixels here.

    `signal` and `sigma` are those of x_t = signal x_0 + sigma noise, shaped to multiply (B, K, P). Facts at
    registration: `noise`, True if the target cannot be had without noise; `borrows`, True if pixels cannot be had from
    x_0 without what is hidden.
    """

    noise: bool = False
    borrows: bool = False

    def expected(self, x_0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """The right answer (B, K, P) to x_t."""
        return x_0

    def x_0(self, answer: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """x_0 (B, K, P) that an answer (B, K, P) to x_t means."""
        return answer

    def from_pixels(self, patches: Tensor, truth: Tensor | None = None) -> Tensor:
        """Patches (B, K, P) in pixels as x_0, by the statistics of `truth` where the target borrows (their own)."""
        return patches

    def to_pixels(self, x_0: Tensor, truth: Tensor) -> Tensor:
        """x_0 (B, K, P) in pixels, by the statistics of the true patches where the target borrows."""
        return x_0


@targets.register("pixel")
class Pixel(Target):
    """The clean patch (the paper's)."""


@targets.register("norm_pixel", borrows=True)
class NormPixel(Target):
    """The clean patch by its own mean and deviation (MAE)."""

    def from_pixels(self, patches: Tensor, truth: Tensor | None = None) -> Tensor:
        """Each patch minus a mean, over a deviation."""
        if truth is None:
            return normalize_patches(patches)
        mean, std = patch_statistics(truth)
        return (patches - mean) / std

    def to_pixels(self, x_0: Tensor, truth: Tensor) -> Tensor:
        """And back."""
        mean, std = patch_statistics(truth)
        return x_0 * std + mean


@targets.register("noise", noise=True)
class Noise(Target):
    """The noise (DDPM)."""

    def expected(self, x_0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def x_0(self, answer: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """What is left of x_t without it."""
        return (x_t - sigma * answer) / signal


@targets.register("velocity", noise=True)
class Velocity(Target):
    """signal noise - sigma x_0 (arXiv 2202.00512)."""

    def expected(self, x_0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """What x_t turns into at a right angle, where x_t = signal x_0 + sigma noise."""
        return signal * noise - sigma * x_0

    def x_0(self, answer: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """x_t turned back; the divisor is 1 where the process keeps its variance."""
        return (signal * x_t - sigma * answer) / (signal**2 + sigma**2)


def normalize_patches(patches: Tensor) -> Tensor:
    """Patch vectors (B, N, P) by their own mean and unbiased variance + 1e-6 (MAE), in one pass of LayerNorm.

    LayerNorm divides by the biased deviation; the factor between the two, also inside epsilon, makes them equal.
    """
    factor = (patches.shape[-1] - 1) / patches.shape[-1]
    scale = patches.new_full(patches.shape[-1:], factor**0.5)
    return F.layer_norm(patches, patches.shape[-1:], scale, eps=1e-6 * factor)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """What `normalize_patches` subtracts and divides by: two (B, N, 1)."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
