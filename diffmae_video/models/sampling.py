"""What surrounds a sampler: the seeds of its noise, and predictions of masked patches pasted into their clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffmae_video.masking import Mask
from diffmae_video.models.patches import gather_tokens, grid_shape, patchify, scatter_tokens, unpatchify


class SampleStep(NamedTuple):
    """One denoising step of `DiffMAE.sample_steps`; clips are made when asked for."""

    step: int
    """0 for the first."""
    timestep: int
    """Index of the training schedule."""
    x_t: Tensor
    """(B', M, P) the noisy state of the masked patches."""
    x_0: Tensor
    """(B', M, P) the prediction made from it."""
    paste: Callable[[Tensor], Tensor]
    """Masked patches (B', M, P) to clips."""

    def clips(self) -> Tensor:
        """The prediction of x_0 pasted into the clips, (B', C, T, H, W), samples of a clip in a row."""
        return self.paste(self.x_0)

    def noisy_clips(self) -> Tensor:
        """The noisy state x_t likewise; noise goes beyond black and white."""
        return self.paste(self.x_t)


class Paste:
    """Puts masked patches into clips; visible and known pixels stay bit for bit.

    Args:
        clips: (B, C, T, H, W).
        mask: of the samples, (B', N).
        known: bool (B, 1 or C, T, H, W), True = pixels inside masked patches that are known.
        tubelet: frames t of a patch.
        patch: pixels p on its sides.
    """

    def __init__(self, clips: Tensor, mask: Mask, known: Tensor | None, tubelet: int, patch: int) -> None:
        self.mask, self.tubelet, self.patch = mask, tubelet, patch
        times = mask.batch // len(clips)
        self.shape = grid_shape(*clips.shape[2:], tubelet=tubelet, patch=patch)
        self.clips = clips.repeat_interleave(times, 0)  #                        (B', C, T, H, W)
        self.patches = patchify(clips, tubelet, patch).repeat_interleave(times, 0)  # (B', N, P)
        self.truth = gather_tokens(self.patches, mask.masked)  #                 (B', M, P), what stands under the mask
        self.hidden = mask.pixels(tubelet, patch)[:, None, : clips.shape[2]]  #  bool (B', 1, T, H, W)
        self.known: Tensor | None = None  #                                      bool (B', M, P)
        if known is not None:
            self.hidden = self.hidden & ~known.repeat_interleave(times, 0)
            tokens = patchify(known.expand_as(clips), tubelet, patch).repeat_interleave(times, 0)
            self.known = gather_tokens(tokens, mask.masked)

    def keep(self, pixels: Tensor) -> Tensor:
        """Masked patches (B', M, P) with the true values where they are known."""
        return pixels if self.known is None else torch.where(self.known, self.truth, pixels)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Masked patches (B', M, P) to clips (B', C, T, H, W)."""
        filled = scatter_tokens(self.patches, self.mask.masked, pixels, self.mask.masked_valid)
        filled = unpatchify(filled, self.shape, self.tubelet, self.patch)  #     (B', C, T, H, W)
        if self.clips.shape[2] == 1:  # an image: the tubelet's frames are views of one
            filled = filled.mean(2, keepdim=True)
        return torch.where(self.hidden, filled, self.clips)


def sample_generators(seeds: Sequence[int] | Tensor, samples: int) -> list[torch.Generator]:
    """One generator a sample: the first of a clip has the clip's own seed, the others are spread by an odd constant."""
    return [
        torch.Generator().manual_seed((seed + k * 0x9E3779B97F4A7C15) % 2**63)
        for seed in torch.as_tensor(seeds).tolist()
        for k in range(samples)
    ]
