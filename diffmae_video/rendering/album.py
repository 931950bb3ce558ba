"""What a render keeps to be looked at: a sheet of frames, the spread of samples, and how a clip takes shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from diffmae_video.rendering.frames import Frame
from diffmae_video.rendering.inpaint import Trajectory
from diffmae_video.rendering.sheet import Panels, colour_bar, contact_sheet, heat, spread
from diffmae_video.rendering.writers import VideoWriter

SHEET_COLUMNS = 8
MOVIE_REST = 15  # pictures for which the sample stands still at the end
MOVIE_PICTURES = 30  # pictures of the denoising, at least: few steps stand still for a while
MOVIE_RATE = 10  # pictures a second


class Album:
    """A few of the frames in which something is hidden, evenly spread.

    Args:
        touched: numbers of the frames in which something is hidden.
        title: of the third row of the sheet.
        third: what it shows of a frame, uint8 (H, W, 3).
    """

    def __init__(
        self,
        touched: Sequence[int],
        title: str = "MAE's one step",
        third: Callable[[Frame], np.ndarray] = Frame.one_step,
    ) -> None:
        self.title, self.third = title, third
        places = np.linspace(0, len(touched) - 1, min(SHEET_COLUMNS, len(touched)))
        self.numbers = {touched[place] for place in places.round().astype(int)}
        self.frames: list[Frame] = []

    def add(self, frame: Frame) -> None:
        """Keep a finished frame if it is one of the chosen."""
        if frame.number in self.numbers:
            self.frames.append(frame)

    def sheet(self, title: str) -> np.ndarray:
        """Source, masked, the third row and result of each frame: uint8 (H, W, 3)."""
        rows = [
            ("source", [frame.source for frame in self.frames]),
            ("masked", [frame.masked() for frame in self.frames]),
            (self.title, [self.third(frame) for frame in self.frames]),
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


def write_trajectory(path: Path, trajectory: Trajectory, steps: int) -> None:
    """Write a movie from noise to the sample: the noisy clip above its prediction, ending with the sample.

    Args:
        steps: denoising steps in all.
    """
    columns, height, width = trajectory.states.shape[2:5]
    hold = max(1, MOVIE_PICTURES // len(trajectory.steps))
    pictures = [
        (f"noisy, step {step + 1} of {steps}", "prediction", *state)
        for step, state in zip(trajectory.steps, trajectory.states, strict=True)
        for _ in range(hold)
    ]
    last = trajectory.states[-1, 1]
    pictures += [("sample", "", last, last)] * MOVIE_REST
    blank, rate = [""] * (columns - 1), Fraction(MOVIE_RATE)
    labels = [
        (Panels([above, *blank], height, width), Panels([below, *blank], height, width))
        for above, below, *_ in pictures
    ]
    size = (2 * labels[0][0].size[0], labels[0][0].size[1])
    movie = VideoWriter(path, size, 1 / rate, rate)
    try:
        for number, ((above, below), (_, _, noisy, x0)) in enumerate(zip(labels, pictures, strict=True)):
            movie.write(np.concatenate([above.compose(noisy), below.compose(x0)]), number)
        movie.close()
    except BaseException:
        movie.abort()
        raise
