"""What the decoder is asked for, and how x_0 follows from its answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmae_video.registry import targets


class Target:
    """A prediction target, and the space that x_0 lives in: that of the model's patches here.

    `signal` and `sigma` are those of x_t = signal x_0 + sigma noise, shaped to multiply (B, K, P); signal is 0 where
    x_t says nothing of a value. Facts at registration: `noise`, True if the target cannot be had without noise;
    `blind`, True if x_0 cannot be had of it where signal is 0; `borrows`, True if pixels cannot be had from x_0 without
    what is hidden.
    """

    noise: bool = False
    blind: bool = False
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


@targets.register("norm_pixel_channel", borrows=True)
class NormPixelChannel(Target):
    """The clean patch, each channel by its own mean and deviation (VideoMAE)."""

    def from_pixels(self, patches: Tensor, truth: Tensor | None = None) -> Tensor:
        """Each channel of a patch minus a mean, over a deviation."""
        mean, std = channel_statistics(patches if truth is None else truth)
        return (patches - mean) / std

    def to_pixels(self, x_0: Tensor, truth: Tensor) -> Tensor:
        """And back."""
        mean, std = channel_statistics(truth)
        return x_0 * std + mean


@targets.register("noise", noise=True, blind=True)
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
    """Where x_t moves as it turns from x_0 to noise: cos noise - sin x_0 at the angle atan(sigma / signal).

    For processes that keep the variance it is the derivative of x_t by the angle (arXiv 2202.00512); for flow matching
    a linear function of x_t and noise - x_0, so that knowing one is knowing the other.
    """

    def expected(self, x_0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """Of unit variance as far as x_0 and noise are."""
        return (signal * noise - sigma * x_0) / torch.hypot(signal, sigma)

    def x_0(self, answer: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """x_t turned back by the angle."""
        length = torch.hypot(signal, sigma)
        return (signal * x_t / length - sigma * answer) / length


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


def channel_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation + 1e-6 of each channel over its t * p * p values (VideoMAE), two (B, N, P).

    The last axis holds channels innermost, (t, p, p, C) with C = 3.
    """
    channels = patches.unflatten(-1, (-1, 3))  #                            (B, N, t * p * p, C)
    mean, std = channels.mean(-2, keepdim=True), channels.std(-2, keepdim=True) + 1e-6
    return mean.expand_as(channels).flatten(-2), std.expand_as(channels).flatten(-2)
