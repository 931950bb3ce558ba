"""Samplers as generators over a denoiser, in the manner of k-diffusion.

Every sampler takes `denoise(x_t (B, ...), timestep (B,)) -> x_0 (B, ...)`, pure noise x_T, the training schedule and a
number of steps, placed as `spacing` says (see `Schedule.respace`), and yields a `Step` after each prediction::

    for step in ddim(denoise, x_T, schedule, steps=20):
        show(step.x_0)

The x_0 of the last step is the sample, the x_0 of the first the masked autoencoder's answer. A sampler knows nothing of
the process but its `signal` and `sigma`. Coefficients are float64, and are applied in the type of x_T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffmae_video.diffusion.schedule import Schedule
from diffmae_video.registry import samplers

Denoiser = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


class Step(NamedTuple):
    """One prediction on the way from noise to a sample."""

    step: int
    """0 for the first."""
    timestep: int
    """What the denoiser was told, an index of the training schedule."""
    x_t: Tensor
    """(B, ...) the noisy state that the prediction was made from."""
    x_0: Tensor
    """(B, ...) the prediction."""


def randn_like(x: Tensor, generators: Generators) -> Tensor:
    """Standard normal noise; a sequence of generators, one a sample, makes it independent of the batch.

    It is drawn in float32, the same for every number type of x.

    Raises:
        ValueError: there is no generator.
    """
    if generators is None:
        raise ValueError("this sampler draws noise: pass a generator, or one a sample")
    if isinstance(generators, torch.Generator):
        return torch.randn(x.shape, generator=generators, device=generators.device).to(x)
    rows = [torch.randn(x.shape[1:], generator=g, device=g.device) for g in generators]
    return torch.stack(rows).to(x)


@samplers.register("ddpm")
def ddpm(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    generator: Generators = None,
    spacing: str = "angle",
    variance: str = "posterior",
) -> Iterator[Step]:
    """Ancestral sampling (DDPM, algorithm 2), on `steps` respaced timesteps.

    Args:
        denoise: predicts x_0.
        x_T: pure noise (B, ...).
        schedule: of the training.
        steps: predictions.
        generator: of the noise, or one a sample.
        spacing: see `Schedule.respace`.
        variance: `posterior` (fixed small) or `beta` (fixed large).
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance {variance!r} is not one of posterior, beta")
    kept = schedule.respace(steps, spacing)
    of_x0, of_xt = kept.posterior_x0.tolist(), kept.posterior_xt.tolist()
    variances = (kept.posterior_variance if variance == "posterior" else kept.betas).tolist()
    x = x_T
    for step, i in enumerate(reversed(range(steps))):
        timestep = int(kept.timesteps[i])
        x_0 = _predict(denoise, x, timestep)
        yield Step(step, timestep, x, x_0)
        if i:
            x = of_x0[i] * x_0 + of_xt[i] * x + math.sqrt(variances[i]) * randn_like(x, generator)


@samplers.register("ddim")
def ddim(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    generator: Generators = None,
    spacing: str = "angle",
    eta: float = 0.0,
) -> Iterator[Step]:
    """DDIM (arXiv 2010.02502, eq. 12): deterministic at eta = 0, with the posterior's variance at eta = 1.

    Args:
        denoise: predicts x_0.
        x_T: pure noise (B, ...).
        schedule: of the training.
        steps: predictions.
        generator: of the noise, or one a sample; not needed at eta = 0.
        spacing: see `Schedule.respace`.
        eta: share of the posterior's deviation that is drawn anew.
    """
    kept = schedule.respace(steps, spacing)
    signal, sigma = kept.signal.tolist(), kept.sigma.tolist()
    deviation = kept.posterior_variance.sqrt().tolist()
    x = x_T
    for step, i in enumerate(reversed(range(steps))):
        timestep = int(kept.timesteps[i])
        x_0 = _predict(denoise, x, timestep)
        yield Step(step, timestep, x, x_0)
        if i:
            noise, drawn = (x - signal[i] * x_0) / sigma[i], eta * deviation[i]
            x = signal[i - 1] * x_0 + math.sqrt(max(0.0, sigma[i - 1] ** 2 - drawn**2)) * noise
            if drawn:
                x = x + drawn * randn_like(x, generator)


@samplers.register("dpm++")
def dpm_solver_pp_2m(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    generator: Generators = None,
    spacing: str = "angle",
) -> Iterator[Step]:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order in the log signal-to-noise ratio, no noise.

    Args:
        denoise: predicts x_0.
        x_T: pure noise (B, ...).
        schedule: of the training.
        steps: predictions.
        generator: not used.
        spacing: see `Schedule.respace`.
    """
    kept = schedule.respace(steps, spacing)
    signal, sigma = kept.signal.tolist(), kept.sigma.tolist()
    x, last_x_0, last_h = x_T, x_T, math.inf
    for step, i in enumerate(reversed(range(steps))):
        timestep = int(kept.timesteps[i])
        x_0 = _predict(denoise, x, timestep)
        yield Step(step, timestep, x, x_0)
        if i:  # after the last, to zero noise, the log ratio is infinite, and the first-order step is x_0 itself
            h = math.log(signal[i - 1] / sigma[i - 1]) - math.log(signal[i] / sigma[i])
            slope = x_0 + h / (2 * last_h) * (x_0 - last_x_0)
            x = sigma[i - 1] / sigma[i] * x - signal[i - 1] * math.expm1(-h) * slope
            last_x_0, last_h = x_0, h


@samplers.register("heun")
def heun(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    generator: Generators = None,
    spacing: str = "angle",
) -> Iterator[Step]:
    """Heun's second order (Karras et al. 2022, arXiv 2206.00364, algorithm 1), two predictions a step but for the last.

    A step of DDIM, a second prediction where it arrives, and the step again with the mean of both predictions: the
    linear part of the flow is solved exactly (DPM-Solver++(2S), arXiv 2211.01095, at r = 1), so that steps from pure
    noise and towards no noise, where EDM's form divides by the noise, may be as long as one likes.

    Args:
        denoise: predicts x_0.
        x_T: pure noise (B, ...).
        schedule: of the training.
        steps: steps; 2 steps - 1 predictions.
        generator: not used.
        spacing: see `Schedule.respace`.
    """
    kept = schedule.respace(steps, spacing)
    signal, sigma = kept.signal.tolist(), kept.sigma.tolist()
    x = x_T
    for step, i in enumerate(reversed(range(steps))):
        timestep = int(kept.timesteps[i])
        x_0 = _predict(denoise, x, timestep)
        yield Step(step, timestep, x, x_0)
        if i:
            of_xt = sigma[i - 1] / sigma[i]
            of_x0 = signal[i - 1] - of_xt * signal[i]
            there = _predict(denoise, of_xt * x + of_x0 * x_0, int(kept.timesteps[i - 1]))
            x = of_xt * x + of_x0 * (x_0 + there) / 2


def _predict(denoise: Denoiser, x: Tensor, timestep: int) -> Tensor:
    return denoise(x, x.new_full((len(x),), timestep, dtype=torch.long))
