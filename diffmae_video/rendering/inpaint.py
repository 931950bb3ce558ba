"""Fill the hidden part of videos of any size and length with a DiffMAE.

The model looks at windows: a rectangle of the frame around what is unfilled, over `frames * stride` frames of the
source. With a stride of s a window is s interleaved clips of the model's length, sampled as one batch from the same
noise. What one window has filled is visible context of the next, and frames leave as soon as nothing in them is
unfilled. See `frames` for the stream around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffmae_video.config import RenderSettings
from diffmae_video.errors import DataError, UsageError
from diffmae_video.masking import Mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.labels import find_label
from diffmae_video.models.patches import denormalize_pixels, normalize_pixels
from diffmae_video.rendering.drawn import FrameMask, mask_of_array
from diffmae_video.rendering.frames import Frame
from diffmae_video.rendering.masks import ClipShape, build_mask
from diffmae_video.rendering.paste import Hole
from diffmae_video.rendering.windows import Window, enlarge, place_windows, shrink, to_cells
from diffmae_video.training.hardware import autocast, swap_kernels

TRAJECTORY_STEPS = 60
"""Denoising steps that are kept to be shown, at most."""
TRAJECTORY_FRAMES = 4
"""Frames of the clip that are kept of each step."""


@dataclass(frozen=True)
class Trajectory:
    """How a clip takes shape: some frames of it at some denoising steps."""

    steps: tuple[int, ...]
    """Numbers of the S steps that were kept, from 0."""
    states: np.ndarray
    """uint8 (S, 2, F, h, w, 3): the noisy x_t and the prediction x_0, pasted into the clip."""


@dataclass(frozen=True)
class Sampled:
    """A batch of clips as the model filled them."""

    results: np.ndarray
    """uint8 (B, T, h, w, 3)."""
    first: np.ndarray
    """The same after the first denoising step."""
    trajectory: Trajectory | None = None
    """Of the first clip, where it was asked for."""


class WindowStore(Protocol):
    """Keeps what was sampled, so that an interrupted render continues."""

    def load(self, key: str) -> Sampled | None:
        """What was saved under a key; None where nothing was."""
        ...

    def save(self, key: str, sampled: Sampled) -> None:
        """Keep a batch, whole or not at all."""
        ...


@dataclass(frozen=True)
class Batch:
    """Clips that are sampled together, and where they lie."""

    clips: list[list[Frame]]
    """B clips of T frames; a frame may stand several times."""
    window: Window
    key: str
    """Name of the batch in the store, unlike that of any other."""
    seed: int


class Inpainter:
    """The filler that asks a model (`frames.Filler`).

    Args:
        model: a DiffMAE in eval mode, on its device.
        settings: sampling and composition.
        stride: source frames between the frames of a clip.
        seed: of the noise.
        store: keeps finished batches, to continue after an interruption.
        between_steps: called between denoising steps; what it raises (a signal has asked to stop) ends the stream.

    Raises:
        UsageError: `render.label` is no class that the model knows.

    Attributes:
        windows: windows filled so far.
        restored: batches of clips taken from the store instead of sampled.
        trajectory: how the first clip of sample 0 took shape; None before.
    """

    def __init__(
        self,
        model: DiffMAE,
        settings: RenderSettings | None = None,
        *,
        stride: int = 1,
        seed: int = 0,
        store: WindowStore | None = None,
        between_steps: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.settings = model, settings or RenderSettings()
        self.stride, self.seed, self.store, self.between_steps = stride, seed, store, between_steps
        height, width = model.settings.size
        self.size = height, width
        self.length = model.settings.frames  # T of a clip
        self.tubelet = model.settings.tubelet if self.length > 1 else 1
        patch = model.settings.patch
        self.grid = (self.length // self.tubelet, height // patch, width // patch)
        self.device = next(model.parameters()).device
        swap_kernels(model, self.device, self.settings.precision)
        self.label = None if self.settings.label is None else find_label(model, self.settings.label)
        self.windows = self.restored = 0
        self.trajectory: Trajectory | None = None

    @property
    def span(self) -> int:
        """Source frames that one window covers."""
        return self.length * self.stride

    def clip_shape(self, size: tuple[int, int], frames: int, fps: float) -> ClipShape:
        """What a mask must fit, for a clip of this size (height, width), length and rate."""
        return ClipShape(*size, frames, fps, self.grid, self.span, self.seed)

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Fill frames as they come and yield each, in order, once it is finished.

        Raises:
            UsageError: a stretch of the video is hidden whole, with nothing visible to go by.
            DataError: the model answers with values that are not finite.
        """
        source = iter(frames)
        buffer: list[Frame] = []  # finished context, then frames in work
        emitted = 0  # frames of the buffer that were yielded
        ended = False
        while True:
            needed = emitted  # first frame that is not finished
            while True:
                if needed == len(buffer):
                    frame = None if ended else next(source, None)
                    if frame is None:
                        ended = True
                        break
                    buffer.append(frame)
                if buffer[needed].unfilled.any():
                    break
                needed += 1
            yield from buffer[emitted:needed]
            gone = max(0, needed - self.span)  # no later window can look back at these
            buffer, emitted = buffer[gone:], needed - gone
            if ended and emitted == len(buffer):
                return
            while not ended and len(buffer) < emitted + self.span:
                frame = next(source, None)
                ended = frame is None
                if frame is not None:
                    buffer.append(frame)
            self._fill(buffer, emitted, ended)

    def _fill(self, buffer: list[Frame], at: int, ended: bool) -> None:
        """Choose the frames of the next window, all of whose hidden pixels are filled then."""
        total = len(buffer)
        stride = self.stride
        if ended and buffer[0].number + total < self.span:  # the whole video is shorter than a window
            stride = max(1, (buffer[0].number + total) // self.length)
        span, cell = self.length * stride, self.tubelet * stride
        last = max(i for i in range(at, min(at + span, total)) if buffer[i].unfilled.any())
        run = last - at + 1
        gap = run <= span - 2 * cell  # something visible may stand on both sides: put it in the middle
        back = (span - run) // 2 if gap else round(self.settings.overlap * span)
        start = max(at - back, 0)
        if ended:
            start = max(0, min(start, total - span))
        aligned = (buffer[0].number + start) // cell * cell - buffer[0].number  # token edges stay where masks have them
        start = aligned if aligned >= 0 and aligned + span > at else start
        if not buffer[start:at] and all(frame.unfilled.all() for frame in buffer[at : start + span]):
            first, end = buffer[at].number, buffer[min(start + span, total) - 1].number
            raise UsageError(
                f"Frames {first} to {end} are hidden whole and nothing before them is visible; leave some visible."
            )
        places = [min(i, total - 1) for i in range(start, start + span)]  # the last frame is repeated beyond the end
        self._fill_frames([buffer[i] for i in places], stride)

    def _fill_frames(self, frames: list[Frame], stride: int) -> None:
        for frame in frames:
            if frame.unfilled.any():
                frame.open_samples(self.settings.samples)
        union = np.logical_or.reduce([frame.unfilled for frame in frames])
        windows = place_windows(union, self.size, self.settings.margin, self.settings.window)
        for part, window in enumerate(windows):
            clips = [frames[phase::stride] for phase in range(stride)]
            clips = [clip for clip in clips if any(window.of(frame.unfilled).any() for frame in clip)]
            # one seed for the interleaved clips of a window: they show the same moment
            seed = self.seed * 1_000_003 + frames[0].number * 1009 + part
            for begin in range(0, len(clips), self.settings.batch):
                key = f"{frames[0].number}-{part}-{begin}"
                self._fill_batch(Batch(clips[begin : begin + self.settings.batch], window, key, seed))
            for frame in frames:
                window.of(frame.unfilled)[:] = False
        self.windows += 1

    def _fill_batch(self, batch: Batch) -> None:
        """Sample a batch of clips and paste them; every sample has its own context."""
        samples = [self._load_or_sample(batch, number) for number in range(self.settings.samples)]
        window, size = batch.window, (batch.window.height, batch.window.width)
        for number, clip in enumerate(batch.clips):
            done: set[int] = set()
            for place, frame in enumerate(clip):
                hidden = window.of(frame.unfilled)
                if frame.number in done or not hidden.any():  # repeated beyond the end, or nothing to do
                    continue
                done.add(frame.number)
                hole = Hole(hidden, self.settings.feather, self.settings.blend)
                for sampled, filled in zip(samples, frame.filled, strict=True):
                    hole.paste(window.of(filled), enlarge(sampled.results[number, place], size))
                assert frame.first is not None
                hole.paste(window.of(frame.first), enlarge(samples[0].first[number, place], size))

    def _load_or_sample(self, batch: Batch, sample: int) -> Sampled:
        key = f"{batch.key}-{sample}"
        sampled = self.store.load(key) if self.store is not None else None
        if sampled is None:
            # the trajectory lies in the first batch of all: whoever restores that batch has it again
            sampled = self._sample(batch, sample, watched=self.trajectory is None)
            if self.store is not None:
                self.store.save(key, sampled)
        else:
            self.restored += 1
        self.trajectory = self.trajectory or sampled.trajectory
        return sampled

    def _sample(self, batch: Batch, sample: int, watched: bool) -> Sampled:
        settings, window = self.settings, batch.window
        pixels = [
            [shrink(window.of(frame.result(sample)), window.of(frame.unfilled), self.size) for frame in clip]
            for clip in batch.clips
        ]
        inputs = torch.from_numpy(np.asarray(pixels)).permute(0, 1, 4, 2, 3)  # uint8 (B, T, C, H, W)
        cells = torch.from_numpy(np.stack([self._cells(clip, window) for clip in batch.clips]))
        mask = Mask.from_grid(cells.flatten(1), self.grid).to(self.device)
        chosen = _spread(settings.steps, TRAJECTORY_STEPS) if watched else []
        steps, states = [], []
        first = last = None
        with torch.inference_mode(), autocast(self.device, settings.precision):
            for step in self.model.sample_steps(
                normalize_pixels(inputs.to(self.device), self.model.settings.pixel_norm),
                mask,
                seeds=[(batch.seed + 7_919_000_003 * sample) % 2**31] * len(batch.clips),
                sampler=settings.sampler,
                steps=settings.steps,
                eta=settings.eta,
                labels=None if self.label is None else [self.label] * len(batch.clips),
                guidance=settings.guidance,
            ):
                self.between_steps()
                last = step
                if first is None:
                    first = self._to_pixels(step.clips())
                if step.step in chosen:
                    frames = _spread(self.length, TRAJECTORY_FRAMES)
                    pair = [self._to_pixels(clips[:1])[0, frames] for clips in (step.noisy_clips(), step.clips())]
                    steps.append(step.step)
                    states.append(np.stack(pair))
            assert first is not None
            assert last is not None
            results = self._to_pixels(last.clips())
        trajectory = Trajectory(tuple(steps), np.stack(states)) if states else None
        return Sampled(results, first, trajectory)

    def _cells(self, clip: list[Frame], window: Window) -> np.ndarray:
        """Tokens of a clip in which something is unfilled: bool (T/t, H/p, W/p)."""
        per_frame = np.stack([to_cells(window.of(frame.unfilled), self.grid[1:]) for frame in clip])  # (T, H/p, W/p)
        return np.asarray(per_frame.reshape(self.grid[0], -1, *self.grid[1:]).any(axis=1))

    def _to_pixels(self, clips: Tensor) -> np.ndarray:
        """float (B, C, T, H, W) -> uint8 (B, T, H, W, C)."""
        if not bool(torch.isfinite(clips).all()):
            raise DataError(
                "The model answers with values that are not finite, since its weights are damaged or the precision is "
                "too low; check --checkpoint or give --set render.precision=fp32."
            )
        pixels = denormalize_pixels(clips.float(), self.model.settings.pixel_norm)  # (B, T, C, H, W)
        return pixels.permute(0, 1, 3, 4, 2).cpu().numpy()


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers from 0 to count - 1, evenly spread, with the first and the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def inpaint(
    model: DiffMAE,
    video: Tensor,
    mask: Tensor | str,
    *,
    settings: RenderSettings | None = None,
    stride: int = 1,
    seed: int = 0,
) -> Tensor:
    """Fill the hidden part of a video.

    Args:
        model: a DiffMAE that predicts pixels.
        video: uint8 (T, C, H, W), any size and length.
        mask: bool (T, H, W) or (H, W), True = hidden; or text such as `random:0.75` (see rendering.masks).
        settings: sampling and composition; the defaults without it.
        stride: frames of the video between the frames of the model's clips.
        seed: of noise and generated masks.

    Returns:
        uint8 (T, C, H, W), or (K, T, C, H, W) for K > 1 samples; pixels outside the mask are the video's own.

    Raises:
        ValueError: a video or mask of another type or shape.
        UsageError: a text that is no mask, or nothing is visible.
    """
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"a video is uint8 (T, 3, H, W), not {video.dtype} {(*video.shape,)}")
    frames, height, width = video.shape[0], video.shape[2], video.shape[3]
    stride = max(1, min(stride, frames // model.settings.frames))  # short clips take all they have
    inpainter = Inpainter(model, settings, stride=stride, seed=seed)
    if isinstance(mask, str):
        masks: FrameMask = build_mask([mask], inpainter.clip_shape((height, width), frames, 25.0))
    else:
        masks = mask_of_array(mask, frames, (height, width))
    pixels = video.permute(0, 2, 3, 1).cpu().numpy()
    source = (Frame(i, np.ascontiguousarray(pixels[i]), masks(i)) for i in range(frames))
    samples = inpainter.settings.samples
    was_training = model.training
    model.eval()
    try:
        results = [[frame.result(k) for k in range(samples)] for frame in inpainter.stream(source)]
    finally:
        model.train(was_training)
    result = torch.from_numpy(np.asarray(results)).permute(1, 0, 4, 2, 3).contiguous()  # (K, T, C, H, W)
    return result[0] if samples == 1 else result
