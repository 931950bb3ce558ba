"""Noise schedules as float64 tables, with the paper's exponent rho.

Indices are 0-based: `timestep` i in 0..T-1 is the step the literature calls t = i + 1. Tables stay in float64 (at
rho = 0.8 the last alpha_bar is 2e-11, below float16, and at rho = 0.5 below float32); values are gathered, then cast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPACINGS = ("angle", "even")


@dataclass(frozen=True)
class Schedule:
    """Variances of a diffusion process with S steps, all float64 (S,)."""

    timesteps: Tensor
    """int64 (S,): index of each step in the training schedule, what the denoiser is told; ascending."""
    betas: Tensor
    alphas_bar: Tensor
    """Signal power left after each step."""
    alphas_bar_prev: Tensor
    """The same one step earlier; 1 before the first."""
    posterior_variance: Tensor
    """Variance of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
    posterior_x0: Tensor
    """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
    posterior_xt: Tensor
    """Coefficient of x_t in that mean."""

    @classmethod
    def make(cls, kind: str = "linear", timesteps: int = 1000, rho: float = 1.0) -> Schedule:
        """Tables of a training schedule.

        Args:
            kind: `linear`, betas 1e-4..0.02 at 1000 steps, scaled by 1000 / T otherwise (DDPM, arXiv 2006.11239), or
                `cosine` (arXiv 2102.09672, eq. 17).
            timesteps: diffusion steps T.
            rho: exponent of every beta; below 1 amplifies the noise (DiffMAE, section 3).
        """
        if kind == "linear":
            scale = 1000 / timesteps
            betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64, device="cpu")
        elif kind == "cosine":
            time = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
            power = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1 - power[1:] / power[:-1]
        else:
            raise ValueError(f"schedule {kind!r} is not one of linear, cosine")
        return cls.from_betas(betas.clamp(max=0.999) ** rho, torch.arange(timesteps, device="cpu"))

    @classmethod
    def from_betas(cls, betas: Tensor, timesteps: Tensor) -> Schedule:
        """Derive every table from the variances (S,) of successive steps."""
        return cls._derive(betas.double(), torch.cumprod(1 - betas.double(), 0), timesteps)

    @classmethod
    def _derive(cls, betas: Tensor, alphas_bar: Tensor, timesteps: Tensor) -> Schedule:
        previous = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
        return cls(
            timesteps=timesteps,
            betas=betas,
            alphas_bar=alphas_bar,
            alphas_bar_prev=previous,
            posterior_variance=betas * (1 - previous) / (1 - alphas_bar),
            posterior_x0=betas * previous.sqrt() / (1 - alphas_bar),
            posterior_xt=(1 - previous) * (1 - betas).sqrt() / (1 - alphas_bar),
        )

    def __len__(self) -> int:
        return len(self.betas)

    def respace(self, steps: int, spacing: str = "angle") -> Schedule:
        """The same process seen at `steps` of its timesteps, the first and the last among them.

        Betas are recomputed from the alpha_bar kept, so that marginals do not change (Improved DDPM, section 4). One
        step alone is the last timestep: pure noise to a clean sample at once, which is what a masked autoencoder does.

        Args:
            steps: 1 to the length of the schedule; all of them is the schedule itself.
            spacing: `angle` spreads the steps evenly in arccos(sqrt(alpha_bar)), the angle by which x_t has turned
                from x_0 towards noise; `even` spreads them evenly over the timesteps. With rho < 1 most timesteps are
                next to pure noise (half of them at rho = 0.8), and `even` spends most steps where nothing happens.
        """
        if not 1 <= steps <= len(self):
            raise ValueError(f"steps = {steps} is not in 1..{len(self)}")
        if spacing not in SPACINGS:
            raise ValueError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
        last = len(self) - 1
        if steps == 1:
            kept = torch.tensor([last])
        elif spacing == "even":
            kept = torch.linspace(0, last, steps, dtype=torch.float64).round().long()
        else:
            angle = torch.atan2(self.sigmas, self.alphas_bar.sqrt())  # (S,), 0 to pi / 2
            wanted = torch.linspace(float(angle[0]), float(angle[last]), steps, dtype=torch.float64)
            kept = (angle - wanted[:, None]).abs().argmin(1)  # (steps,)
            kept[-1] = last  # the first of several that are all noise to the last digit otherwise
            order = torch.arange(steps)
            kept = (kept - order).cummax(0).values + order  # each later than the one before it,
            kept = torch.minimum(kept, last - (steps - 1 - order))  # with room for those that follow
        alphas_bar = self.alphas_bar[kept]
        previous = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
        # not their product again: 1 - beta loses what is left of the signal after a long step
        return Schedule._derive(1 - alphas_bar / previous, alphas_bar, self.timesteps[kept])

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise; x0 and noise (B, ...), timestep (B,) indices."""
        signal, sigma = self.gather(self.alphas_bar.sqrt(), timestep, x0), self.gather(self.sigmas, timestep, x0)
        return signal * x0 + sigma * noise

    @property
    def sigmas(self) -> Tensor:
        """sqrt(1 - alpha_bar), (S,)."""
        return (1 - self.alphas_bar).sqrt()

    @staticmethod
    def gather(table: Tensor, timestep: Tensor, like: Tensor) -> Tensor:
        """Values of a table at `timestep` (B,), cast and shaped to multiply `like` (B, ...)."""
        values = table.to(timestep.device)[timestep].to(like.dtype)
        return values.view(-1, *[1] * (like.dim() - 1))
