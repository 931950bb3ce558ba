"""The stream of frames: source -> fillers -> writers.

A source (`source.VideoSource`) yields pictures; each becomes a `Frame` that knows what the mask hides and what of that
is still unfilled. A filler takes frames in order and yields them in order, with pixels filled in; it may hold back as
many as it needs to look ahead. `fillers.Propagation` takes from other frames what they show; `inpaint.Inpainter` is the
last filler: whatever those before it have left is filled by the model, with all that is filled already as its context.
Without a model `fillers.Classical` stands in its place. Writers (`writers.open_writer`) take finished frames one at a
time, so that memory does not grow with the length of the video.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(eq=False)
class Frame:
    """A frame on its way from the source to the writers; finished once nothing of it is unfilled."""

    number: int
    source: np.ndarray
    """uint8 (H, W, 3)."""
    hidden: np.ndarray
    """bool (H, W), what the mask hides."""
    pts: int = 0
    """When it is shown, in units of the source's time base."""
    unfilled: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """bool (H, W), hidden and not filled yet."""
    filled: list[np.ndarray] = field(default_factory=list)
    """K x uint8 (H, W, 3), one a sample; empty where nothing was filled."""
    first: np.ndarray | None = None
    """uint8 (H, W, 3), filled with the model's answer of the first denoising step."""
    seen: np.ndarray | None = None
    """bool (H, W), what of the hidden part was taken from other frames; None where nobody looked."""

    def __post_init__(self) -> None:
        if self.unfilled.shape != self.hidden.shape:
            self.unfilled = self.hidden.copy()

    def open_samples(self, samples: int) -> None:
        """Make sure that there are `samples` pictures to fill, and one for the first step."""
        while len(self.filled) < samples:
            self.filled.append(self.result().copy())
        if self.first is None:
            self.first = self.result().copy()

    def result(self, sample: int = 0) -> np.ndarray:
        """Sample `sample` of this frame, uint8 (H, W, 3); the source itself where nothing was hidden.

        What is filled before the model is asked is the same in all samples, and kept once.
        """
        return self.filled[min(sample, len(self.filled) - 1)] if self.filled else self.source

    def one_step(self) -> np.ndarray:
        """The masked autoencoder's answer: the prediction of the first denoising step, uint8 (H, W, 3)."""
        return self.result() if self.first is None else self.first

    def from_others(self, grey: int = 127) -> np.ndarray:
        """The source with what other frames show of its hidden part, the rest in grey: uint8 (H, W, 3)."""
        if self.seen is None:
            return self.masked(grey)
        shown = self.result().copy()
        shown[self.hidden & ~self.seen] = grey
        return shown

    def masked(self, grey: int = 127) -> np.ndarray:
        """The source with the hidden part in grey, uint8 (H, W, 3)."""
        shown = self.source.copy()
        shown[self.hidden] = grey
        return shown


class Filler(Protocol):
    """Fills hidden pixels of frames as they pass, in order."""

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Yield every frame, in order; what it filled is no longer `unfilled`."""
        ...
