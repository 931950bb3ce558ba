"""Fill the hidden part of videos of any size and length with a DiffMAE.

The model looks at windows: a rectangle of the frame around what is hidden, over `frames * stride` frames of the
source. With a stride of s a window is s interleaved clips of the model's length, sampled as one batch from the same
noise. What one window has filled is visible context of the next, and frames leave as soon as nothing in them is
hidden, so that memory does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffmae_video.config import RenderSettings
from diffmae_video.errors import UsageError
from diffmae_video.masking import Mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import denormalize_pixels, normalize_pixels
from diffmae_video.rendering.masks import Canvas, FrameMask, build_mask, masks_of_tensor
from diffmae_video.rendering.paste import Hole
from diffmae_video.rendering.windows import Window, certain, enlarge, place_windows, shrink, to_cells
from diffmae_video.training.hardware import autocast


class WindowStore(Protocol):
    """Keeps what was sampled, so that an interrupted render continues."""

    def load(self, key: str) -> np.ndarray | None: ...
    def save(self, key: str, clips: np.ndarray) -> None: ...


@dataclass
class Frame:
    """A frame on its way through: where nothing is open any more, it is finished."""

    number: int
    source: np.ndarray  # uint8 (H, W, 3)
    hidden: np.ndarray  # bool (H, W), what the mask hides
    pts: int = 0
    open: np.ndarray = field(default=None)  # type: ignore[assignment]  # bool (H, W), hidden and not yet filled
    filled: list[np.ndarray] = field(default_factory=list)  # K x uint8 (H, W, 3), one a sample
    first: np.ndarray = field(default=None)  # type: ignore[assignment]  # uint8 (H, W, 3), the first step's answer

    def result(self, sample: int = 0) -> np.ndarray:
        """Sample `sample` of this frame, uint8 (H, W, 3); the source itself where nothing was hidden."""
        return self.filled[sample] if self.filled else self.source

    def one_step(self) -> np.ndarray:
        """The masked autoencoder's answer: the prediction of the first denoising step, uint8 (H, W, 3)."""
        return self.source if self.first is None else self.first

    def masked(self, grey: int = 127) -> np.ndarray:
        """The source with the hidden part in grey, uint8 (H, W, 3)."""
        shown = self.source.copy()
        shown[self.hidden] = grey
        return shown


Callback = Callable[[int, np.ndarray, np.ndarray], None]
"""(step, noisy state x_t, prediction x_0), both uint8 (T, h, w, 3): a window's first clip at the model's size."""


class Inpainter:
    """Streams frames through a model.

    Args:
        model: a DiffMAE in eval mode, on its device.
        settings: sampling and composition.
        stride: source frames between the frames of a clip.
        seed: of the noise.
        store: keeps finished windows, for `--resume`.
        callback: sees each denoising step of the first window's first clip (sample 0).
    """

    def __init__(
        self,
        model: DiffMAE,
        settings: RenderSettings | None = None,
        *,
        stride: int = 1,
        seed: int = 0,
        store: WindowStore | None = None,
        callback: Callback | None = None,
    ) -> None:
        self.model, self.settings = model, settings or RenderSettings()
        self.stride, self.seed, self.store, self.callback = stride, seed, store, callback
        self.size = model.settings.size
        self.length = model.settings.frames  # T of a clip
        self.tubelet = model.settings.tubelet if self.length > 1 else 1
        self.grid = (self.length // self.tubelet, *(n // model.settings.patch for n in self.size))
        self.device = next(model.parameters()).device
        self.windows = 0  # windows filled so far
        self.restored = 0  # batches of clips taken from the store instead of sampled

    @property
    def span(self) -> int:
        """Source frames that one window covers."""
        return self.length * self.stride

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Fill frames as they come and yield each, in order, once it is finished.

        Raises:
            UsageError: a stretch of the video is hidden whole, with nothing visible to go by.
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
                    buffer.append(self._prepare(frame))
                if buffer[needed].open.any():
                    break
                needed += 1
            yield from buffer[emitted:needed]
            emitted = needed
            buffer, emitted = _drop(buffer, emitted, keep=self.span)
            if ended and emitted == len(buffer):
                return
            while not ended and len(buffer) < emitted + self.span:
                frame = next(source, None)
                ended = frame is None
                if frame is not None:
                    buffer.append(self._prepare(frame))
            self._fill(buffer, emitted, ended)

    def _prepare(self, frame: Frame) -> Frame:
        frame.open = frame.hidden.copy()
        return frame

    def _fill(self, buffer: list[Frame], at: int, ended: bool) -> None:
        """Choose the frames of the next window, all of whose hidden pixels are filled then."""
        total = len(buffer)
        stride = self.stride
        if ended and buffer[0].number + total < self.span:  # the whole video is shorter than a window
            stride = max(1, (buffer[0].number + total) // self.length)
        span, cell = self.length * stride, self.tubelet * stride
        last = max(i for i in range(at, min(at + span, total)) if buffer[i].open.any())
        run = last - at + 1
        gap = run <= span - 2 * cell  # something visible may stand on both sides: put it in the middle
        back = (span - run) // 2 if gap else round(self.settings.overlap * span)
        start = max(at - back, 0)
        if ended:
            start = max(0, min(start, total - span))
        aligned = (buffer[0].number + start) // cell * cell - buffer[0].number  # token edges stay where masks have them
        start = aligned if aligned >= 0 and aligned + span > at else start
        if not buffer[start:at] and all(frame.open.all() for frame in buffer[at : start + span]):
            first, end = buffer[at].number, buffer[min(start + span, total) - 1].number
            raise UsageError(
                f"Frames {first} to {end} are hidden whole and nothing before them is visible; leave some visible."
            )
        places = [min(i, total - 1) for i in range(start, start + span)]  # the last frame stands in beyond the end
        self._fill_frames([buffer[i] for i in places], stride)

    def _fill_frames(self, frames: list[Frame], stride: int) -> None:
        for frame in frames:
            if frame.open.any() and not frame.filled:
                frame.filled = [frame.source.copy() for _ in range(self.settings.samples)]
                frame.first = frame.source.copy()
        union = np.logical_or.reduce([frame.open for frame in frames])
        windows = place_windows(union, self.size, self.settings.margin, self.settings.window)
        for part, window in enumerate(windows):
            clips = [frames[phase::stride] for phase in range(stride)]
            clips = [clip for clip in clips if any(window.of(frame.open).any() for frame in clip)]
            for begin in range(0, len(clips), self.settings.batch):
                # one seed for the interleaved clips of a window: they show the same moment
                seed = self.seed * 1_000_003 + frames[0].number * 1009 + part
                key = f"{frames[0].number}-{part}-{begin}"
                self._fill_clips(clips[begin : begin + self.settings.batch], window, key, seed)
            for frame in frames:
                window.of(frame.open)[:] = False
        self.windows += 1

    def _fill_clips(self, clips: list[list[Frame]], window: Window, key: str, seed: int) -> None:
        """Sample a batch of clips and paste them; every lane (sample) has its own context."""
        cells = np.stack([self._cells(clip, window) for clip in clips])  # bool (B, T/t, H/p, W/p)
        lanes = []
        for lane in range(self.settings.samples):
            name = f"{key}-{lane}"
            outputs = self.store.load(name) if self.store else None
            if outputs is None:
                outputs = self._sample(clips, window, cells, lane, seed)
                if self.store:
                    self.store.save(name, outputs)
            else:
                self.restored += 1
            lanes.append(outputs)  # (B, 2, T, h, w, 3): result, first step
        size = (window.height, window.width)
        for number, clip in enumerate(clips):
            done: set[int] = set()
            for place, frame in enumerate(clip):
                hidden = window.of(frame.open)
                if frame.number in done or not hidden.any():  # a stand-in beyond the end, or nothing to do
                    continue
                done.add(frame.number)
                hole = Hole(hidden, self.settings.feather, self.settings.blend)
                for outputs, filled in zip(lanes, frame.filled, strict=True):
                    hole.paste(window.of(filled), enlarge(outputs[number, 0, place], size))
                hole.paste(window.of(frame.first), enlarge(lanes[0][number, 1, place], size))

    def _cells(self, clip: list[Frame], window: Window) -> np.ndarray:
        per_frame = np.stack([to_cells(window.of(frame.open), self.grid[1:]) for frame in clip])  # (T, H/p, W/p)
        return per_frame.reshape(self.grid[0], -1, *self.grid[1:]).any(1)

    def _sample(self, clips: list[list[Frame]], window: Window, cells: np.ndarray, lane: int, seed: int) -> np.ndarray:
        """Result and first prediction of a batch of clips: uint8 (B, 2, T, h, w, 3)."""
        settings = self.settings
        pixels = [
            [shrink(window.of(frame.result(lane)), window.of(frame.open), self.size) for frame in clip]
            for clip in clips
        ]
        inputs = torch.from_numpy(np.asarray(pixels)).permute(0, 1, 4, 2, 3)  # (B, T, C, H, W)
        mask = Mask.from_grid(torch.from_numpy(cells).flatten(1), self.grid).to(self.device)
        known = self._known(clips, window, cells) if settings.guide else None
        see = self.callback if self.windows == 0 else None
        self.callback = None  # it has seen, or missed, the first clips
        first = output = None
        with torch.inference_mode(), autocast(self.device, settings.precision):
            for step in self.model.sample_steps(
                normalize_pixels(inputs.to(self.device), self.model.settings.pixel_norm),
                mask,
                seeds=[(seed + 7_919_000_003 * lane) % 2**31] * len(clips),
                sampler=settings.sampler,
                steps=settings.steps,
                eta=settings.eta,
                known=None if known is None else torch.from_numpy(known).unsqueeze(1).to(self.device),
            ):
                output = step
                first = self._to_pixels(step.clips()) if first is None else first
                if see is not None:
                    see(step.step, *(self._to_pixels(x[:1])[0] for x in (step.noisy_clips(), step.clips())))
        return np.stack([self._to_pixels(output.clips()), first], axis=1)

    def _known(self, clips: list[list[Frame]], window: Window, cells: np.ndarray) -> np.ndarray | None:
        """Pixels inside masked patches of which nothing is hidden, bool (B, T, h, w); None where there are none."""
        seen = np.stack([[certain(window.of(frame.open), self.size) for frame in clip] for clip in clips])
        patch = self.model.settings.patch
        masked = cells.repeat(self.tubelet, 1).repeat(patch, 2).repeat(patch, 3)  # bool (B, T, h, w)
        known = seen & masked
        return known if known.any() else None

    def _to_pixels(self, clips: Tensor) -> np.ndarray:
        pixels = denormalize_pixels(clips.float(), self.model.settings.pixel_norm)  # (B, T, C, H, W)
        return pixels.permute(0, 1, 3, 4, 2).cpu().numpy()


def _drop(buffer: list[Frame], emitted: int, keep: int) -> tuple[list[Frame], int]:
    """Forget frames that no later window can look back at."""
    gone = max(0, emitted - keep)
    return buffer[gone:], emitted - gone


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
    """
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"a video is uint8 (T, 3, H, W), not {video.dtype} {(*video.shape,)}")
    frames, size = video.shape[0], tuple(video.shape[2:])
    stride = max(1, min(stride, frames // model.settings.frames))  # short clips take all they have
    inpainter = Inpainter(model, settings, stride=stride, seed=seed)
    if isinstance(mask, str):
        canvas = Canvas(*size, frames, 25.0, inpainter.grid, inpainter.span, seed)
        masks: FrameMask = build_mask([mask], canvas)
    else:
        masks = masks_of_tensor(mask, frames, size)
    pixels = video.permute(0, 2, 3, 1).cpu().numpy()
    source = (Frame(i, np.ascontiguousarray(pixels[i]), masks(i)) for i in range(frames))
    samples = inpainter.settings.samples
    was_training = model.training
    model.eval()
    try:
        lanes = [[frame.result(k) for k in range(samples)] for frame in inpainter.stream(source)]
    finally:
        model.train(was_training)
    result = torch.from_numpy(np.asarray(lanes)).permute(1, 0, 4, 2, 3).contiguous()  # (K, T, C, H, W)
    return result[0] if samples == 1 else result
