"""What a render keeps to be looked at: a sheet of frames, the spread of samples, and how a window takes shape."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from diffmae_video.rendering.inpaint import Frame
from diffmae_video.rendering.sheet import Panels, colour_bar, contact_sheet, heat, spread
from diffmae_video.rendering.video import VideoWriter

SHEET_COLUMNS = 8
JOURNEY_FRAMES = 4  # frames of the first clip that are shown
JOURNEY_STEPS = 60  # steps that are shown, at most
JOURNEY_REST = 15  # pictures for which the result stands still
JOURNEY_LENGTH = 30  # pictures of the way there, at least: few steps stand still for a while
JOURNEY_RATE = 10  # pictures a second


class Album:
    """A few of the frames in which something is hidden, evenly spread.

    Args:
        touched: numbers of the frames in which something is hidden.
    """

    def __init__(self, touched: Sequence[int]) -> None:
        places = np.linspace(0, len(touched) - 1, min(SHEET_COLUMNS, len(touched)))
        self.numbers = {touched[place] for place in places.round().astype(int)}
        self.frames: list[Frame] = []

    def add(self, frame: Frame) -> None:
        """Keep a finished frame if it is one of the chosen."""
        if frame.number in self.numbers:
            self.frames.append(frame)

    def sheet(self, title: str) -> np.ndarray:
        """Source, masked, one step and result of each frame: uint8 (H, W, 3)."""
        rows = [
            ("source", [frame.source for frame in self.frames]),
            ("masked", [frame.masked() for frame in self.frames]),
            ("MAE's one step", [frame.one_step() for frame in self.frames]),
            ("result", [frame.result() for frame in self.frames]),
        ]
        return contact_sheet(rows, self._columns(), title)

    def uncertainty(self, title: str) -> np.ndarray:
        """Samples and their standard deviation in each pixel, with a legend: uint8 (H, W, 3)."""
        samples = len(next((frame.filled for frame in self.frames if frame.filled), [0]))
        maps = [spread([frame.result(k) for k in range(samples)]) for frame in self.frames]
        highest = max(max(float(np.percentile(one, 99.8)) for one in maps), 1.0)
        rows = [("source", [frame.source for frame in self.frames])]
        rows += [(f"sample {k + 1}", [frame.result(k) for frame in self.frames]) for k in range(min(samples, 3))]
        rows += [("spread", [heat(one, highest) for one in maps])]
        sheet = contact_sheet(rows, self._columns(), title)
        legend = colour_bar(sheet.shape[1], highest, "of 255, standard deviation")
        return np.concatenate([sheet, legend], axis=0)

    def _columns(self) -> list[str]:
        return [f"frame {frame.number}" for frame in self.frames]


class Journey:
    """From noise to sample: frames of the first clip at denoising steps, the noisy state above its prediction.

    Args:
        steps: of the sampler; up to JOURNEY_STEPS of them are kept, evenly spread.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.chosen = sorted(set(np.linspace(0, steps - 1, min(steps, JOURNEY_STEPS)).round().astype(int).tolist()))
        self.states: list[np.ndarray] = []  # one a chosen step: uint8 (2, 4, h, w, 3), noisy and predicted

    def see(self, step: int, noisy: np.ndarray, x0: np.ndarray) -> None:
        """Keep a step: both uint8 (T, h, w, 3)."""
        if step == 0:
            self.states.clear()
        if step in self.chosen:
            frames = np.linspace(0, len(x0) - 1, min(JOURNEY_FRAMES, len(x0))).round().astype(int)
            self.states.append(np.stack([noisy[frames], x0[frames]]))

    @property
    def whole(self) -> bool:
        """Whether there is a way to show, from the first step to the last."""
        return len(self.chosen) > 1 and len(self.states) == len(self.chosen)

    def write(self, path: Path) -> None:
        """Write the movie; it ends with the sample, which the last prediction is."""
        _, columns, height, width, _ = self.states[0].shape
        movie: VideoWriter | None = None
        steps = zip(self.chosen, self.states, strict=True)
        hold = max(1, JOURNEY_LENGTH // len(self.chosen))
        pictures = [
            (f"noisy, step {step + 1} of {self.steps}", "prediction", *state)
            for step, state in steps
            for _ in range(hold)
        ]
        pictures += [("sample", "", self.states[-1][1], self.states[-1][1])] * JOURNEY_REST
        blank = [""] * (columns - 1)
        try:
            for number, (above, below, noisy, x0) in enumerate(pictures):
                rows = [
                    Panels([above, *blank], height, width).compose(noisy),
                    Panels([below, *blank], height, width).compose(x0),
                ]
                frame = np.concatenate(rows)
                if movie is None:
                    rate = Fraction(JOURNEY_RATE)
                    movie = VideoWriter(path, frame.shape[:2], 1 / rate, rate)
                movie.write(frame, number)
            movie.close()
        except BaseException:
            if movie is not None:
                movie.abort()
            raise
