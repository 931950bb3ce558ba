"""Noise schedules as float64 tables of signal and sigma, with the paper's exponent rho.

Indices are 0-based: `timestep` i in 0..T-1 is the step the literature calls t = i + 1. Tables stay in float64 (at
rho = 0.8 the last power of the signal is 2e-11, below float16, and at rho = 0.5 below float32); values are gathered,
then cast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPACINGS = ("angle", "even")
DRAWS = ("uniform", "angle", "logit_normal")


@dataclass(frozen=True)
class Schedule:
    """A diffusion process with S steps: x_t = signal x_0 + sigma noise. Every table is float64 (S,)."""

    timesteps: Tensor
    """int64 (S,): index of each step in the training schedule, what the denoiser is told; ascending."""
    signal: Tensor
    """What is left of x_0 after each step, falling from almost 1."""
    sigma: Tensor
    """Deviation of the noise after each step, rising."""

    @classmethod
    def make(cls, kind: str = "linear", timesteps: int = 1000, rho: float = 1.0) -> Schedule:
        """Tables of a training schedule.

        Args:
            kind: `linear`, betas 1e-4..0.02 at 1000 steps, scaled by 1000 / T otherwise (DDPM, arXiv 2006.11239),
                `cosine` (arXiv 2102.09672, eq. 17), or `flow`, the straight line x_t = (1 - t) x_0 + t noise at the T
                middles of equal parts of [0, 1] (flow matching, arXiv 2210.02747; rectified flow, arXiv 2209.03003).
            timesteps: diffusion steps T.
            rho: exponent of every beta; below 1 amplifies the noise (DiffMAE, section 3). `flow` has no betas.

        Raises:
            ValueError: an unknown kind, or a rho for `flow`.
        """
        if kind == "flow":
            if rho != 1:
                raise ValueError(f"rho = {rho} is an exponent of betas, and schedule = 'flow' has none: set rho = 1")
            time = (torch.arange(timesteps, dtype=torch.float64, device="cpu") + 0.5) / timesteps
            return cls(torch.arange(timesteps, device="cpu"), 1 - time, time)
        if kind == "linear":
            scale = 1000 / timesteps
            betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64, device="cpu")
        elif kind == "cosine":
            time = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
            power = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1 - power[1:] / power[:-1]
        else:
            raise ValueError(f"schedule {kind!r} is not one of linear, cosine, flow")
        return cls.from_betas(betas.clamp(max=0.999) ** rho, torch.arange(timesteps, device="cpu"))

    @classmethod
    def from_betas(cls, betas: Tensor, timesteps: Tensor) -> Schedule:
        """The process that keeps its variance: step i adds noise of variance betas[i] (S,) to sqrt(1 - betas[i]) x."""
        alphas_bar = torch.cumprod(1 - betas.double(), 0)
        return cls(timesteps, alphas_bar.sqrt(), (1 - alphas_bar).sqrt())

    def __len__(self) -> int:
        return len(self.betas)

    def respace(self, steps: int, spacing: str = "angle") -> Schedule:
        """The same process seen at `steps` of its timesteps, the first and the last among them.

        Marginals do not change (Improved DDPM, section 4): a longer step adds the noise of those it stands for. One
        step alone is the last timestep: pure noise to a clean sample at once, which is what a masked autoencoder does.

        Args:
            steps: 1 to the length of the schedule; all of them is the schedule itself.
            spacing: `angle` spreads the steps evenly in atan(sigma / signal), the angle by which x_t has turned
                from x_0 towards noise; `even` spreads them evenly over the timesteps. With rho < 1 most timesteps are
                next to pure noise (half of them at rho = 0.8), and `even` spends most steps where nothing happens.

        Raises:
            ValueError: more steps than there are, or another spacing.
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
            angle = torch.atan2(self.sigma, self.signal)  # (S,), 0 to pi / 2
            wanted = torch.linspace(float(angle[0]), float(angle[last]), steps, dtype=torch.float64)
            kept = (angle - wanted[:, None]).abs().argmin(1)  # (steps,)
            kept[-1] = last  # the first of several that are all noise to the last digit otherwise
            order = torch.arange(steps)
            kept = (kept - order).cummax(0).values + order  # each later than the one before it,
            kept = torch.minimum(kept, last - (steps - 1 - order))  # with room for those that follow
        return Schedule(self.timesteps[kept], self.signal[kept], self.sigma[kept])

    def add_noise(self, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t = signal x_0 + sigma noise; x_0 and noise (B, ...), timestep (B,) indices."""
        return gather(self.signal, timestep, x_0) * x_0 + gather(self.sigma, timestep, x_0) * noise

    def draw(self, kind: str, generator: torch.Generator) -> Tensor:
        """A timestep of training: int64 ().

        Args:
            kind: `uniform` over the timesteps; `angle`, uniform in atan(sigma / signal), where steps of sampling lie;
                or `logit_normal`, timestep / T the sigmoid of a standard normal (Esser et al. 2024, arXiv 2403.03206),
                the middle more often than the ends.
            generator: on the CPU.

        Raises:
            ValueError: another kind.
        """
        if kind == "uniform":
            return torch.randint(len(self), (), generator=generator)
        if kind == "logit_normal":
            part = torch.randn((), generator=generator, dtype=torch.float64).sigmoid()
            return (part * len(self)).long().clamp(max=len(self) - 1)
        if kind != "angle":
            raise ValueError(f"draw {kind!r} is not one of {', '.join(DRAWS)}")
        angle = torch.atan2(self.sigma, self.signal)
        wanted = angle[0] + (angle[-1] - angle[0]) * torch.rand((), generator=generator, dtype=torch.float64)
        return (angle - wanted).abs().argmin()

    # --- what follows from signal and sigma, for every step and the one before it (no noise before the first) --------

    @property
    def alphas_bar(self) -> Tensor:
        """Power of the signal that is left, (S,)."""
        return self.signal.square()

    @property
    def betas(self) -> Tensor:
        """Variance of the noise that each step adds, (S,)."""
        return self.sigma.square() - (self.signal / self._before[0] * self._before[1]).square()

    @property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_s | x_t, x_0), s the step before t (DDPM, eq. 7), (S,)."""
        return self.betas * (self._before[1] / self.sigma).square()

    @property
    def posterior_x0(self) -> Tensor:
        """Coefficient of x_0 in the mean of q(x_s | x_t, x_0), (S,)."""
        return self.betas * self._before[0] / self.sigma.square()

    @property
    def posterior_xt(self) -> Tensor:
        """Coefficient of x_t in that mean, (S,)."""
        return self.signal / self._before[0] * (self._before[1] / self.sigma).square()

    @property
    def _before(self) -> tuple[Tensor, Tensor]:
        signal = torch.cat([self.signal.new_ones(1), self.signal[:-1]])
        return signal, torch.cat([self.sigma.new_zeros(1), self.sigma[:-1]])


def gather(table: Tensor, timestep: Tensor, like: Tensor) -> Tensor:
    """Values of a table (S,) at `timestep` (B,), cast and shaped to multiply `like` (B, ...)."""
    values = table.to(timestep.device)[timestep].to(like.dtype)
    return values.view(-1, *[1] * (like.dim() - 1))
