"""A render whose model is made on the spot: what is left to fill is looked up first, then a model is fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from diffmae_video.pipelines.classifiers import Loaded, load
from diffmae_video.pipelines.console import progress
from diffmae_video.pipelines.find import Fill
from diffmae_video.pipelines.fit import ClipFit, Fitted, Masks, fit
from diffmae_video.pipelines.job import Job
from diffmae_video.rendering.fillers import SPECK, Classical, Propagation
from diffmae_video.rendering.frames import Frame
from diffmae_video.rendering.hidden_file import pack_hidden, unpack_hidden
from diffmae_video.rendering.source import VideoSource
from diffmae_video.training.hardware import pick_device


def left_over(
    frames: Iterable[Frame], count: int, propagation: Propagation, check: Callable[[], None]
) -> list[bytes] | None:
    """What other frames do not show, a packed mask a frame; None where that is nothing but specks.

    Args:
        frames: of the clip, as they come.
        count: how many there are.
        propagation: keeps what it finds for the render that follows.
        check: called between frames; raises where a signal has asked to stop.
    """
    left, something = list[bytes](), False
    with progress(count, "other frames", "frames") as line:
        for frame in Classical(SPECK).stream(propagation.stream(frames)):
            left.append(pack_hidden(lambda number, mask=frame.unfilled: mask, 1))
            something = something or bool(frame.unfilled.any())
            line.update(1)
            check()
    return left if something else None


def fit_painter(
    job: Job, source: VideoSource, hidden: Masks, left: list[bytes] | None, fill: Fill, init: str | None
) -> tuple[Fitted, Loaded]:
    """A model of the clip, for what is left of the hole.

    Args:
        hidden: what the mask hides of a frame.
        left: from `left_over`; without it all of that is to be filled.
        fill: length and recipe.
        init: weights to start from.

    Raises:
        UsageError, Stopped: see `pipelines.fit.fit`.
    """

    def asked(number: int) -> np.ndarray:
        return hidden(number) if left is None else next(unpack_hidden(left[min(number, len(left) - 1)]))

    work = ClipFit(job, source, hidden, asked, fill.fit_length, fill.fit_recipe, init, keep_size=fill.generated)
    made = fit(work)
    return made, load(made.directory, pick_device(job.device), job.overrides, job.seed)
