"""Samplers as free functions over a denoiser, in the manner of k-diffusion.

Every sampler takes `denoise(x_t (B, ...), timestep (B,)) -> x_0 (B, ...)`, pure noise x_T, the training schedule and a
number of steps, placed as `spacing` says (see `Schedule.respace`), and returns x_0. Coefficients are float64, and are
applied in the type of x_T. The callback sees (step, timestep, x_t, x_0) after each prediction; the x_0 of step 0 is the
masked autoencoder's answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffmae_video.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, int, Tensor, Tensor], None]
Generators = torch.Generator | Sequence[torch.Generator] | None


def randn_like(x: Tensor, generators: Generators) -> Tensor:
    """Standard normal noise; a sequence of generators, one a sample, makes it independent of the batch."""
    if generators is None:
        raise ValueError("this sampler draws noise: pass a generator, or one a sample")
    if isinstance(generators, torch.Generator):
        return torch.randn(x.shape, generator=generators, dtype=x.dtype, device=generators.device).to(x.device)
    rows = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=g.device) for g in generators]
    return torch.stack(rows).to(x.device)


def ddpm(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    generator: Generators = None,
    callback: Callback | None = None,
    spacing: str = "angle",
    variance: str = "posterior",
) -> Tensor:
    """Ancestral sampling (DDPM, algorithm 2), on `steps` respaced timesteps; no noise at the last one.

    Args:
        variance: `posterior` (fixed small) or `beta` (fixed large).
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance {variance!r} is not one of posterior, beta")
    kept = schedule.respace(steps, spacing)
    table = kept.posterior_variance if variance == "posterior" else kept.betas
    x = x_T
    for step, i in enumerate(range(steps - 1, -1, -1)):
        timestep = int(kept.timesteps[i])
        x0 = denoise(x, x.new_full((len(x),), timestep, dtype=torch.long))
        if callback:
            callback(step, timestep, x, x0)
        x = float(kept.posterior_x0[i]) * x0 + float(kept.posterior_xt[i]) * x
        if i:
            x = x + math.sqrt(float(table[i])) * randn_like(x, generator)
    return x


def ddim(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    generator: Generators = None,
    callback: Callback | None = None,
    spacing: str = "angle",
    eta: float = 0.0,
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12): deterministic at eta = 0, with the posterior's variance at eta = 1."""
    kept = schedule.respace(steps, spacing)
    x = x_T
    for step, i in enumerate(range(steps - 1, -1, -1)):
        timestep = int(kept.timesteps[i])
        signal, previous = float(kept.alphas_bar[i]), float(kept.alphas_bar_prev[i])
        x0 = denoise(x, x.new_full((len(x),), timestep, dtype=torch.long))
        if callback:
            callback(step, timestep, x, x0)
        noise = (x - math.sqrt(signal) * x0) / math.sqrt(1 - signal)
        sigma = eta * math.sqrt(float(kept.posterior_variance[i]))
        x = math.sqrt(previous) * x0 + math.sqrt(max(0.0, 1 - previous - sigma**2)) * noise
        if sigma and i:
            x = x + sigma * randn_like(x, generator)
    return x


def dpm_solver_pp_2m(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    generator: Generators = None,
    callback: Callback | None = None,
    spacing: str = "angle",
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order in the log signal-to-noise ratio, no noise."""
    kept = schedule.respace(steps, spacing)
    alphas, sigmas = kept.alphas_bar.sqrt().tolist(), kept.sigmas.tolist()
    x, last_x0, last_h = x_T, None, 0.0
    for step, i in enumerate(range(steps - 1, -1, -1)):
        timestep = int(kept.timesteps[i])
        x0 = denoise(x, x.new_full((len(x),), timestep, dtype=torch.long))
        if callback:
            callback(step, timestep, x, x0)
        if i == 0:  # to zero noise the log ratio is infinite, and the first-order step is x_0 itself
            return x0
        h = math.log(alphas[i - 1] / sigmas[i - 1]) - math.log(alphas[i] / sigmas[i])
        slope = x0
        if last_x0 is not None:
            slope = x0 + h / (2 * last_h) * (x0 - last_x0)
        x = sigmas[i - 1] / sigmas[i] * x - alphas[i - 1] * math.expm1(-h) * slope
        last_x0, last_h = x0, h
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver_pp_2m}
