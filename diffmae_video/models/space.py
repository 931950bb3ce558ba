"""Where patches are noised and predicted: their pixels, or principal components of the training set's patches.

n of the P values of a patch are noised.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diffmae_video.errors import UsageError


class PatchSpace(nn.Module):
    """Patches in pixels, or turned into their principal components, the largest variance first; from their mean on.

    Components keep lengths and angles, so that errors, noise and the loss mean the same in both. Only the first
    `noised` components take part in the diffusion (l-DAE, arXiv 2401.14404); the rest, the finest detail, is predicted
    from them by regression. Statistics are buffers: estimated once from the training set, saved with the weights.

    Args:
        space: `pixel` or `pca:K`.
        values: P.
    """

    mean: Tensor
    """(P,) of patches, pixels."""
    basis: Tensor
    """(P, P) a component in each column."""
    deviation: Tensor
    """(P,) of each component from its mean, the largest first."""
    counted: Tensor
    """How many patches the statistics come from; 0 before `estimate`."""

    def __init__(self, space: str, values: int) -> None:
        super().__init__()
        self.noised = values if space == "pixel" else min(int(space.removeprefix("pca:")), values)
        self.turned, self.values = space != "pixel", values
        if self.turned:
            self.register_buffer("mean", torch.zeros(values))
            self.register_buffer("deviation", torch.ones(values))
            self.register_buffer("counted", torch.zeros((), dtype=torch.int64))
            self.register_buffer("basis", torch.eye(values))

    @property
    def kept(self) -> float:
        """Share of the patches' variance, 0 to 1, that lies in the values that are noised."""
        if not self.turned:
            return 1.0
        variance = self.deviation.double().square()
        return float(variance[: self.noised].sum() / variance.sum())

    @property
    def missing(self) -> bool:
        """Statistics are needed, and have not been estimated."""
        return self.turned and int(self.counted) == 0

    @torch.no_grad()
    def estimate(self, batches: Iterable[Tensor]) -> None:
        """Take mean, components and deviations from patches (..., P) in pixels, in float64.

        Raises:
            UsageError: fewer patches than values.
        """
        total = torch.zeros(self.values, dtype=torch.float64)
        products = torch.zeros(self.values, self.values, dtype=torch.float64)
        count = 0
        for batch in batches:
            rows = batch.detach().reshape(-1, self.values).cpu()
            total += rows.sum(0, dtype=torch.float64)
            products += (rows.mT @ rows).double()
            count += len(rows)
        if count < self.values:
            raise UsageError(
                f"{count} patches are too few to estimate the {self.values} directions of model.space: use more clips, "
                "smaller patches, or model.space = 'pixel'."
            )
        mean = total / count
        covariance = products / count - mean[:, None] * mean
        variance, basis = torch.linalg.eigh(covariance)
        variance, basis = variance.flip(0), basis.flip(1)
        largest = basis.abs().argmax(0, keepdim=True)
        self.basis.copy_(basis * basis.gather(0, largest).sign())  # a sign that no library's version changes
        self.mean.copy_(mean)
        self.deviation.copy_(variance.clamp(min=1e-8).sqrt())
        self.counted.fill_(count)

    def from_pixels(self, patches: Tensor) -> Tensor:
        """Patches (B, K, P) in pixels to components."""
        return self._turn(patches - self.mean, self.basis) if self.turned else patches

    def to_pixels(self, x: Tensor) -> Tensor:
        """And back."""
        return self.turn_back(x) + self.mean if self.turned else x

    def turn_back(self, difference: Tensor) -> Tensor:
        """Differences of components (B, K, P) as differences of pixels: turned, so that squares add up to the same."""
        return self._turn(difference, self.basis.mT) if self.turned else difference

    @staticmethod
    def _turn(x: Tensor, basis: Tensor) -> Tensor:
        """In full precision, also under autocast: a sample is turned and turned back at every step."""
        with torch.autocast(x.device.type, enabled=False):
            return x.to(basis.dtype) @ basis

    def levels(self, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and sigma of every value (B, 1, P), given those of a timestep (B, 1, 1).

        Values that are not noised are as at pure noise, whatever the timestep: x_t says nothing of them, and whoever
        asks for x_0 there asks for a regression.
        """
        if self.noised == self.values:
            return signal, sigma
        inside = torch.arange(self.values, device=signal.device) < self.noised
        return signal * inside, torch.where(inside, sigma, 1.0)
