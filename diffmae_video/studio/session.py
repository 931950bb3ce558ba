"""What the studio holds: a clip, what is marked in it, what was followed, and what was rendered. No page is needed."""

from __future__ import annotations

import math
import shlex
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from diffmae_video.errors import DataError, UsageError
from diffmae_video.mask_text import MaskRequest
from diffmae_video.pipelines.console import Step, format_seconds, listen
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.render_follow import find_in_box, follow_clip, read_frames, write_mask_video
from diffmae_video.pipelines.render_inpaint import render
from diffmae_video.pipelines.render_report import RenderResult
from diffmae_video.rendering.follow import Followed, resized
from diffmae_video.rendering.frame_store import FrameStore
from diffmae_video.rendering.source import VideoSource

SIDE = 960
"""Longer side of the pictures that the page shows."""
MOST_FRAMES = 36_000
"""Longest clip, frames: 20 minutes at 30 a second."""
MARK_PIXELS = 4096 * 4096
"""Largest mask that a page may send."""


@dataclass
class Clip:
    """An open clip: frames at hand in small, marks, and results."""

    path: Path
    frames: FrameStore
    size: tuple[int, int]
    """Height and width of the clip, pixels."""
    fps: float
    keys: dict[int, np.ndarray] = field(default_factory=dict)
    """Frame -> all that is marked in it, bool (H, W)."""
    followed: Followed | None = None
    stale: bool = False
    """Something was marked since it was followed."""
    result: RenderResult | None = None
    after: FrameStore | None = None
    """Frames of the result."""


class Session:
    """One person's work on one clip at a time.

    Args:
        job: what renders take from the command line: checkpoint, recipe, device, seed.
        folder: where clips that were uploaded, masks and results are kept.
        options: fields of the render settings.
    """

    def __init__(self, job: Job, folder: Path, options: dict[str, Any] | None = None) -> None:
        self.job, self.folder, self.options = job, Path(folder), options or {}
        self.clip: Clip | None = None
        self.version = 0
        """Rises with every change, so that a page knows what it has."""
        self.lock = threading.RLock()

    def open(self, path: Path | str, keep: bool = False) -> str:
        """Open a clip with the product's own reader and say what it is.

        Args:
            path: video, image, or folder of images.
            keep: copy it beside its results, since it lies in a temporary place.

        Raises:
            DataError: it cannot be read, or is too long.
        """
        path = Path(path)
        with closing(VideoSource(path)) as source:
            if source.frames > MOST_FRAMES:
                raise DataError(f"{path.name} has {source.frames} frames; cut it to {MOST_FRAMES} or fewer.")
            frames = read_frames(source, SIDE)
            size, fps = (source.height, source.width), float(source.fps)
        if keep:
            kept = self._place(path.stem) / f"clip{path.suffix}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            path = Path(shutil.copyfile(path, kept))
        with self.lock:
            if self.clip is not None:
                self.clip.frames.close()
            self.clip = Clip(path, frames, size, fps)
            self.version += 1
        length = len(frames) / fps
        return f"{path.name}: {size[1]}x{size[0]}, {len(frames)} frames, {length:.3g} s. Mark what should go."

    def need(self) -> Clip:
        """The open clip.

        Raises:
            UsageError: none is open.
        """
        if self.clip is None:
            raise UsageError("No clip is open; open one first.")
        return self.clip

    def mask(self, number: int) -> np.ndarray:
        """What is hidden in a frame so far: bool (H, W)."""
        clip = self.need()
        if number in clip.keys:
            return clip.keys[number]
        return np.zeros(clip.size, dtype=bool) if clip.followed is None else clip.followed(number)

    def mark(self, number: int, png: bytes) -> None:
        """Take what a page painted on a frame, a picture that is bright where something is marked.

        An empty one says that the object is not there.

        Raises:
            UsageError: no such frame, or no picture.
        """
        head = np.frombuffer(png[:24], np.uint8)
        if len(head) < 24 or png[:8] != b"\x89PNG\r\n\x1a\n":
            raise UsageError("What was painted did not arrive as a picture; reload the page.")
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        if width * height > MARK_PIXELS:
            raise UsageError("What was painted is too large; reload the page.")
        picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)
        if picture is None:
            raise UsageError("What was painted did not arrive whole; paint it again.")
        self._set(number, resized(picture > 127, self.need().size))

    def mark_box(self, number: int, box: tuple[float, float, float, float]) -> None:
        """Add the object that is found in a box to what is marked in a frame.

        Args:
            box: left, top, width and height as shares of the frame, from 0 to 1.

        Raises:
            UsageError: no such frame, or no box inside it.
        """
        clip = self.need()
        self._check(number)
        left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
        if not all(map(math.isfinite, box)) or not (0 <= left < right <= 1.001 and 0 <= top < bottom <= 1.001):
            raise UsageError("This box does not lie in the picture; draw it inside.")
        height, width = clip.size
        hidden = np.zeros(clip.size, dtype=bool)
        hidden[int(top * height) : math.ceil(bottom * height), int(left * width) : math.ceil(right * width)] = True
        self._set(number, self.mask(number) | find_in_box(clip.frames, number, hidden))

    def forget(self, number: int) -> None:
        """Take back what was marked in a frame; what was followed to it counts again."""
        clip = self.need()
        with self.lock:
            clip.keys.pop(number, None)
            clip.stale = True
            if not clip.keys:
                clip.followed = None
            self.version += 1

    def _check(self, number: int) -> None:
        if not 0 <= number < len(self.need().frames):
            raise UsageError(f"The clip has frames 0 to {len(self.need().frames) - 1}; choose one of them.")

    def _set(self, number: int, hidden: np.ndarray) -> None:
        self._check(number)
        with self.lock:
            clip = self.need()
            clip.keys[number] = hidden
            clip.stale = True
            self.version += 1

    def follow(self, still: bool = False, told: Callable[[Step], None] = lambda step: None) -> list[str]:
        """Let what is marked follow its object through the clip; returns where it was lost, in words.

        Args:
            still: it does not move; each frame takes the marks of the nearest marked frame.
            told: called with every step.

        Raises:
            UsageError: nothing is marked.
        """
        clip = self.need()
        with self.lock:
            keys = dict(clip.keys)
        if not any(one.any() for one in keys.values()):
            raise UsageError("Nothing is marked; draw a box or brush over what should go.")
        if still:
            followed = Followed(clip.size, len(clip.frames))
            for number in range(len(clip.frames)):
                followed.set(number, keys[min(keys, key=lambda key: abs(key - number))])
        else:
            with listen(told):
                followed = follow_clip(clip.frames, keys, fps=clip.fps, again="mark it there and follow again")
        with self.lock:
            clip.followed, clip.stale = followed, False
            self.version += 1
        return followed.notes

    def run(
        self, dilate: int = 4, still: bool = False, told: Callable[[Step], None] = lambda step: None
    ) -> RenderResult:
        """Follow if something was marked since, write the mask, and render as the command line does.

        Args:
            dilate: pixels by which the mask grows.
            still: see `follow`.
            told: called with every step; what it raises ends the work, and the next call continues it.

        Raises:
            UsageError, DataError, Stopped: see `pipelines.render_inpaint.render`.
        """
        clip = self.need()
        if clip.followed is None or clip.stale:
            self.follow(still, told)
        count = len(clip.frames)
        path = self.mask_path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mask_video(path, (self.mask(number) for number in range(count)), clip.size, clip.fps)
        with listen(told):
            result = render(self.job, clip.path, self._request(dilate), options={**self.options, "codec": "h264"})
            assert result is not None
            with closing(VideoSource(result.video)) as source:
                after = read_frames(source, SIDE)
        with self.lock:
            if clip.after is not None:
                clip.after.close()
            clip.result, clip.after = result, after
            self.version += 1
        return result

    @property
    def mask_path(self) -> Path:
        """Where the mask of the open clip is written."""
        path = self.need().path
        return (path.parent if path.stem == "clip" and self.folder in path.parents else self._place(path.stem)) / (
            "mask.mp4"
        )

    def command(self, dilate: int) -> str:
        """The command line that repeats the last run."""
        words = [
            "diffmae",
            "render-inpaint",
            str(self.need().path),
            "--mask",
            str(self.mask_path),
            "--dilate",
            str(dilate),
            *job_words(self.job),
        ]
        for name, value in {**self.options, "codec": "h264"}.items():
            words += [f"--{name}", str(value)] if value is not None else []
        return shlex.join(words)

    def _request(self, dilate: int) -> MaskRequest:
        return MaskRequest((str(self.mask_path),), dilate=dilate)

    def _place(self, stem: str) -> Path:
        return self.folder / ("".join(c if c.isalnum() or c in "-_" else "_" for c in stem)[:60] or "clip")

    def state(self) -> dict[str, Any]:
        """What a page must know to show the clip."""
        with self.lock:
            clip = self.clip
            if clip is None:
                return {"version": self.version, "frames": 0}
            height, width = clip.frames.shape
            return {
                "version": self.version,
                "name": clip.path.name,
                "frames": len(clip.frames),
                "fps": clip.fps,
                "width": width,
                "height": height,
                "marked": sorted(clip.keys),
                "followed": clip.followed is not None,
                "result": 0 if clip.after is None else len(clip.after),
            }


def job_words(job: Job) -> list[str]:
    """The options of the command line that make a job."""
    words = [] if job.recipe == "auto" else ["--recipe", job.recipe]
    words += [] if job.checkpoint is None else ["--checkpoint", job.checkpoint]
    words += [] if job.seed is None else ["--seed", str(job.seed)]
    words += [] if job.device == "auto" else ["--device", job.device]
    for text in job.overrides:
        words += ["--set", text]
    return words


def describe(step: Step) -> str:
    """A step in words: `follow: 12 of 120 frames, 35s left`."""
    text = f"{step.label}: {step.done}{f' of {step.total}' if step.total else ''} {step.unit}"
    return text + (f", {format_seconds(step.seconds_left)} left" if step.seconds_left is not None else "")
