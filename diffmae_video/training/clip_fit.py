"""A model of one clip: the windows it is trained on, and the task that trains it.

A sample is a window of some frames anywhere in the clip, at the resolution at which the model will look at the hole.
What it hides is the hole itself, as it lies in the model's own window, moved to this place: so the model practises the
very shape that it will have to fill. A token that touches anything hidden in the clip is never seen by the encoder, and
only visible pixels are scored.

After Zhang et al. 2019 ("An internal learning approach to video inpainting") and Cherel et al. 2023 ("Infusion"):
networks that know one video alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffmae_video.config import Settings
from diffmae_video.data.batches import Batch
from diffmae_video.errors import UsageError
from diffmae_video.masking import Mask, pixel_mask_to_grid
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import normalize_pixels, patchify
from diffmae_video.rendering.reduced import ReducedClip
from diffmae_video.training.task import LossOutput

TRIES, MOST_TRIES = 8, 1000
"""Places that are drawn for a sample before the best of them is taken; and where none of them would do."""
ENOUGH = 0.75
"""Visible share of what is hidden for practice with which the search for a place ends."""
STATISTICS = 256
"""Samples that the statistics of patches come from."""


@dataclass
class FitBatch(Batch):
    """Windows of one clip."""

    hidden: Tensor = field(default_factory=lambda: torch.zeros(0))
    """bool (B, T, H, W), hidden in the clip."""
    practice: Tensor = field(default_factory=lambda: torch.zeros(0))
    """bool (B, T, H, W), hidden for practice."""


class FitStream:
    """Endless batches of windows of one clip; sample n depends on the seed and n alone.

    Args:
        clip: at the model's resolution.
        model: frames, size, tubelet and patch of a window: `settings.model`.
        batch_size: windows in a batch.
        seed: of every draw.
        stride: frames of the clip between the frames of a window.
        flip: probability of a horizontal flip.
    """

    def __init__(self, clip: ReducedClip, settings: Settings) -> None:
        self.clip, self.seed, self.batch_size = clip, settings.seed, settings.train.batch_size
        self.stride, self.flip, model = settings.data.stride, settings.data.flip, settings.model
        self.shape, self.tubelet, self.patch = (model.frames, *model.size), model.tubelet, model.patch
        self.samples_per_epoch = max(self.batch_size, len(clip.starts))
        self.consumed = 0

    def __iter__(self) -> Iterator[FitBatch]:
        while True:
            first = self.consumed
            self.consumed += self.batch_size
            yield self.batch(range(first, first + self.batch_size))

    def batch(self, numbers: range) -> FitBatch:
        """The samples of these numbers."""
        rgb, hidden, practice, seeds = zip(*(self.sample(number) for number in numbers), strict=True)
        return FitBatch(
            clips=torch.from_numpy(np.stack(rgb)).permute(0, 1, 4, 2, 3),
            labels=torch.full((len(numbers),), -1),
            keys=[str(number) for number in numbers],
            samples=torch.tensor(list(numbers)),
            seeds=torch.tensor(seeds),
            position=numbers.stop,
            hidden=torch.from_numpy(np.stack(hidden)),
            practice=torch.from_numpy(np.stack(practice)),
        )

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Window uint8 (T, H, W, 3), what of it is hidden in the clip and what for practice, bool (T, H, W); seed.

        Raises:
            UsageError: no window with anything visible is found.
        """
        draw = np.random.default_rng([self.seed, number])
        hole = self._hole(draw)  # bool (T, H, W)
        best, most = None, 0
        for _ in range(TRIES):
            window = self._window(draw)
            scored = self._scored(hole, self.clip.hidden[window])
            if scored > most:
                best, most = window, scored
            if most >= ENOUGH * hole.sum():
                break
        if best is None:
            best, hole = self._thinned(draw)
        parts = [self.clip.frames[best], self.clip.hidden[best], hole]
        if draw.random() < self.flip:
            parts = [part[:, :, ::-1] for part in parts]
        rgb, hidden, practice = (np.ascontiguousarray(part) for part in parts)
        return rgb, hidden, practice, int(draw.integers(2**62))

    def _thinned(self, draw: np.random.Generator) -> tuple[tuple[Any, ...], np.ndarray]:
        """Where the hole leaves nothing visible at any place: a place, and half of the tokens that are visible there.

        Raises:
            UsageError: no place with two of them is found.
        """
        for _ in range(MOST_TRIES):
            window = self._window(draw)
            masked = pixel_mask_to_grid(torch.from_numpy(self.clip.hidden[window]), self.tubelet, self.patch)
            visible = np.flatnonzero(~masked.numpy())
            if len(visible) > 1:
                grid = np.zeros(masked.shape, dtype=bool)
                grid.flat[draw.permutation(visible)[: len(visible) // 2]] = True
                return window, np.kron(grid, np.ones((self.tubelet, self.patch, self.patch), dtype=bool))
        raise UsageError("Too little of the clip is visible to train a model on it; take --fit off.")

    def _scored(self, hole: np.ndarray, hidden: np.ndarray) -> int:
        """Visible pixels that a hole here would hide; 0 where no token stays visible."""
        masked = pixel_mask_to_grid(torch.from_numpy(hole | hidden), self.tubelet, self.patch)
        return 0 if bool(masked.all()) else int((hole & ~hidden).sum())

    def _window(self, draw: np.random.Generator) -> tuple[Any, ...]:
        """A place for a window: indices of frames, rows and columns."""
        last, height, width = (n - 1 for n in self.clip.hidden.shape)
        frames = draw.choice(self.clip.starts) + self.stride * np.arange(self.shape[0])
        top, left = (int(draw.integers(n + 2 - side)) for n, side in zip((height, width), self.shape[1:], strict=True))
        return np.ix_(np.minimum(frames, last), range(top, top + self.shape[1]), range(left, left + self.shape[2]))

    def _hole(self, draw: np.random.Generator) -> np.ndarray:
        """The shape of a hole, mirrored in time and space and moved by up to an eighth of the window, by chance."""
        hole = self.clip.holes[int(draw.integers(len(self.clip.holes)))]
        for axis in range(3):
            if draw.random() < 0.5:
                hole = np.flip(hole, axis)
        shifts = [int(draw.integers(-(side // 8), side // 8 + 1)) for side in self.shape[1:]]
        return np.roll(hole, shifts, (1, 2))

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is."""
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""
        self.consumed = int(state["consumed"])

    def close(self) -> None:
        """Nothing is held."""


class ClipFitTask:
    """DiffMAE's loss on the visible pixels of one clip (`training.task.Task`).

    Args:
        model: to train.
        settings: the recipe's.
        clip: at the model's resolution.
        facts: for model.json.
    """

    monitor = ("val_loss", "min")

    def __init__(self, model: DiffMAE, settings: Settings, clip: ReducedClip, facts: dict[str, Any]) -> None:
        self.model, self.settings, self.clip, self.facts = model, settings, clip, facts

    def open_stream(self, rank: int, world: int) -> FitStream:
        """Windows of the clip; one process."""
        return FitStream(self.clip, self.settings)

    def loss(self, model: nn.Module, batch: FitBatch, device: torch.device) -> LossOutput:
        """Mean squared error of the visible pixels of the masked patches."""
        part = batch.part
        clips = normalize_pixels(batch.clips[part].to(device), self.settings.model.pixel_norm)
        hidden = batch.hidden[part]
        mask = self._mask(hidden | batch.practice[part]).to(device)
        output = model(clips, mask, self.model.draw(batch.seeds[part], mask), ~hidden[:, None].to(device))
        return LossOutput(output.loss, output.per_sample.detach(), {})

    def _mask(self, hidden: Tensor) -> Mask:
        grid = pixel_mask_to_grid(hidden, self.model.tubelet, self.model.patch)  # (B, T/t, H/p, W/p)
        return Mask.from_grid(grid, (grid.shape[1], grid.shape[2], grid.shape[3]))

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Nothing is kept from training: every visible pixel counts."""
        return {}

    def pictures(self, model: nn.Module, step: int) -> dict[str, np.ndarray]:
        """None: the filled clip shows what came of it."""
        return {}

    def info(self) -> dict[str, Any]:
        """For model.json."""
        return dict(self.facts)


def estimate_clip_space(model: DiffMAE, stream: FitStream) -> None:
    """Give a model the statistics of patches that its `space` needs, from patches without hidden pixels.

    Raises:
        UsageError: there are too few.
    """

    def patches() -> Iterator[Tensor]:
        size = 8
        for first in range(0, STATISTICS, size):
            batch = stream.batch(range(2**40 + first, 2**40 + first + size))
            tokens = patchify(normalize_pixels(batch.clips, model.settings.pixel_norm), model.tubelet, model.patch)
            yield tokens[~pixel_mask_to_grid(batch.hidden, model.tubelet, model.patch).flatten(1)]

    model.space.estimate(patches())
