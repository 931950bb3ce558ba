"""A model of the clip itself: a small DiffMAE, trained for a bounded time on what is visible of one clip.

Its run lies in the workspace (`runs/fit-001`). It is used again for the same clip as long as nothing is hidden that was
visible to it: a pixel that is to be filled was never trained on.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmae_video.config import Settings, load_settings, with_overrides
from diffmae_video.config.fit_text import FitLength, fit_length_on
from diffmae_video.files import sha256_of, write_atomic
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.initial import initial_sha256, start_from
from diffmae_video.pipelines.console import format_seconds, progress, say
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.run import open_run, run_folders
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.rendering.hidden_file import hides_all_of, pack_hidden
from diffmae_video.rendering.reduced import Look, ReducedClip, largest, plan_looks, reduce_clip, window_size
from diffmae_video.rendering.source import VideoSource
from diffmae_video.training.clip_fit import ClipFitTask, FitStream, estimate_clip_space
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.hardware import pick_device, resolve_precision
from diffmae_video.training.loop import train
from diffmae_video.training.meter import Meter
from diffmae_video.training.run import Run, read_status, run_identity
from diffmae_video.training.signals import StopRequest
from diffmae_video.training.stepper import Stepper

HIDDEN = "hidden.bin"
"""What was hidden from a fit, beside its weights."""
UNTIMED, TIMED = 2, 8
"""Steps that are taken to see how fast this machine is; the first ones do not count."""
LEAST_STEPS = 20
SCALES = 1.5
"""Factor in the scale of the windows up to which a model of the same clip is used again."""

Masks = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Fitted:
    """A model of a clip."""

    directory: Path
    """Its run."""
    steps: int
    """Optimizer steps that were taken: the same number gives the same weights."""
    seconds: float
    """Spent now; 0 where it was there."""
    reused: bool = False


@dataclass(frozen=True)
class ClipFit:
    """A clip and its hole, and how long a model is trained on the rest.

    Args:
        job: seed, device and `resume`; a fit has its own folder, whatever `out` says.
        source: the clip.
        hidden: what is hidden of a frame, bool (H, W): neither read nor scored.
        asked: what of that the model will have to fill.
        length: without one, by the device.
        recipe: of the fit.
        init: weights to start from; they decide the model's settings.
        keep_size: windows have the recipe's size, whatever the shape of the hole.
    """

    job: Job
    source: VideoSource
    hidden: Masks
    asked: Masks
    length: FitLength | None = None
    recipe: str = "fit-clip"
    init: str | None = None
    keep_size: bool = False

    @cached_property
    def device(self) -> torch.device:
        """What it is trained on."""
        return pick_device(self.job.device)

    @cached_property
    def asked_length(self) -> FitLength:
        """How long to train."""
        return fit_length_on(self.length, self.device.type)

    @cached_property
    def settings(self) -> Settings:
        """The recipe's, at the resolution and in the shape of the largest window, without a number of steps."""
        settings = load_settings(self.recipe, "pretrain")
        if self.init is not None:
            from diffmae_video.models.importers import load_pretrained

            given = load_pretrained(self.init)
            changes = {"model": given.settings.model_dump(), "diffusion": getattr(given, "diffusion", None)}
            changes["diffusion"] = (changes["diffusion"] or settings.diffusion).model_dump()
            settings = with_overrides(settings, **changes)
        if self.job.seed is not None:
            settings = with_overrides(settings, seed=self.job.seed)
        stride = max(1, min(settings.data.stride, self.source.frames // settings.model.frames))
        size = settings.model.size
        if self.init is None and not self.keep_size:
            size = window_size(self.looks_at(settings, stride), size, settings.model.patch)
        return with_overrides(settings, model={"size": size}, data={"stride": stride})

    def looks_at(self, settings: Settings, stride: int) -> list[Look]:
        """Where a model of these settings will look."""
        model, render = settings.model, settings.render
        span = model.frames * stride
        return plan_looks(self.asked, self.source.frames, span, model.size, render.margin, render.window)

    @cached_property
    def looks(self) -> list[Look]:
        """Where the model will look."""
        return self.looks_at(self.settings, self.settings.data.stride)

    @cached_property
    def scale(self) -> float:
        """Pixels of the model for each of the source, along a side."""
        return float(self.settings.model.size[0] / largest(self.looks).height)

    @cached_property
    def clip_sha256(self) -> str:
        """Digest of the clip's bytes."""
        files = [self.source.path] if self.source.path.is_file() else sorted(self.source.files)
        return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()

    @cached_property
    def packed(self) -> bytes:
        """What is hidden, as it is kept beside the weights."""
        return pack_hidden(self.hidden, self.source.frames)

    def facts(self) -> dict[str, Any]:
        """What a run says of itself, so that it is found again."""
        settings = self.settings.model_dump(mode="json", exclude_none=True)
        kept = {name: settings[name] for name in ("seed", "diffusion", "mask")}
        kept |= {"model": {key: value for key, value in settings["model"].items() if key != "size"}}
        kept |= {"data": {key: settings["data"][key] for key in ("stride", "flip")}}
        kept |= {"train": {key: settings["train"][key] for key in ("batch_size", "base_lr", "ema", "optimizer")}}
        return {
            "clip": self.clip_sha256,
            "settings": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(),
            "init": None if self.init is None else initial_sha256(self.init),
            "length": str(self.asked_length),
        }

    def known(self) -> Path | None:
        """The newest finished fit of this clip that serves: same settings, and nothing hidden that it has seen.

        Without a length any does.
        """
        wanted = self.facts()
        if self.length is None:
            del wanted["length"]
        for directory in reversed(run_folders(Workspace.here().folder, "fit")):
            status = read_status(directory) or {}
            told = status.get("identity", {}).get("fit", {})
            if status.get("status") != "finished" or any(told.get(name) != value for name, value in wanted.items()):
                continue
            ratio = self.scale / float(told.get("scale", 0) or 1e-9)
            if 1 / SCALES <= ratio <= SCALES and hides_all_of(directory / HIDDEN, self.hidden, self.source.frames):
                return directory
        return None

    def begun(self, data: str) -> int | None:
        """Steps of an unfinished run of the very same."""
        for directory in reversed(run_folders(Workspace.here().folder, "fit")):
            status = read_status(directory) or {}
            identity = status.get("identity", {})
            if status.get("status") != "finished" and identity.get("data") == data:
                return int(identity["settings.train"]["steps"])
        return None

    def reduced(self) -> ReducedClip:
        """The clip as it is trained on."""
        model, stride = self.settings.model, self.settings.data.stride
        shape, count = (model.frames, *model.size), self.source.frames
        looks = self.looks
        with progress(count, "read", "frames") as line:

            def pictures() -> Iterator[np.ndarray]:
                for frame in self.source:
                    yield frame.rgb
                    line.update(1)

            return reduce_clip(pictures(), self.hidden, self.asked, looks, count, shape, stride)


def fit(work: ClipFit) -> Fitted:
    """Train a model on what is visible of a clip, or find the one that was.

    An interrupted fit of the same continues. The time, where a time was asked for, is turned into a number of steps by
    how fast the first ones are, once; so a fit that is continued, or repeated with that number, gives the same weights.

    Raises:
        UsageError: too little is visible; weights to start from that do not fit.
        Stopped: a signal came; the same call continues.
    """
    began = time.perf_counter()
    never = work.job.resume == "never"
    directory = None if never else work.known()
    if directory is not None:
        steps = int((read_status(directory) or {}).get("step", 0))
        say(f"Model: {directory}, trained on this clip before ({steps} steps).")
        return Fitted(directory, steps, 0.0, reused=True)
    facts = work.facts()
    asked = hashlib.sha256(work.packed)
    asked.update(json.dumps([facts, [[look.first, *vars(look.window).values()] for look in work.looks]]).encode())
    data = asked.hexdigest()
    what = "a small one" if work.init is None else f"{work.init}"
    say(
        f"Model: {what} is trained on what is visible of the clip, {work.asked_length} (--fit 10m: longer; --fit off: "
        "not at all)."
    )
    clip = work.reduced()
    settings = work.settings
    processes = Distributed(device=work.device)
    steps = work.asked_length.steps or (None if never else work.begun(data))
    if steps is None:
        assert work.asked_length.seconds is not None
        each = seconds_a_step(settings, clip, processes)
        steps = max(LEAST_STEPS, int((work.asked_length.seconds - (time.perf_counter() - began)) / each))
    settings = with_overrides(settings, train={"steps": steps})
    identity = run_identity(settings, "fit", data) | {"fit": {**facts, "scale": work.scale}}
    with open_run(work.job.with_(out=None), identity, processes, finished="yield") as run:
        model = first_model(settings, clip, work.init)
        info = {"dataset": work.source.path.name, "recipe": work.recipe, "media": "video", "fit_steps": steps}
        task: Any = ClipFitTask(model, settings, clip, info)  # made here: no settings alone tell what a clip shows
        result = train(task, settings, run)
        write_atomic(run.directory / HIDDEN, work.packed)
        run.record(clip=str(work.source.path.resolve()))
    seconds = time.perf_counter() - began
    loss = result.metrics.get("loss")
    shown = "" if loss is None else f", loss {loss:.4g}"
    say(f"Fitted in {format_seconds(seconds)}: {result.step} steps{shown}; the model is kept in {run.directory}.")
    return Fitted(run.directory, result.step, seconds)


def first_model(settings: Settings, clip: ReducedClip, init: str | None = None) -> DiffMAE:
    """The model before its first step."""
    model = DiffMAE(settings.model, settings.diffusion, seed=settings.seed)
    if init is not None:
        say(start_from(model, init))
    if model.space.missing:
        estimate_clip_space(model, FitStream(clip, settings))
    return model


def seconds_a_step(settings: Settings, clip: ReducedClip, processes: Distributed) -> float:
    """How long an optimizer step takes here, by a few steps of a model that is thrown away."""
    precision = resolve_precision(settings.train.precision, processes.device)
    settings = with_overrides(settings, train={"precision": precision, "steps": UNTIMED + TIMED})
    model = first_model(settings, clip).to(processes.device).train()
    task: Any = ClipFitTask(model, settings, clip, {})
    batches = iter(task.open_stream(0, 1))
    with tempfile.TemporaryDirectory() as folder:
        here = Run(Path(folder), {}, processes=processes)
        stepper = Stepper(task, settings, here, Meter(processes.device), UNTIMED + TIMED, 0.0)
        began = time.perf_counter()
        for number in range(UNTIMED + TIMED):
            if number == UNTIMED:
                began = time.perf_counter()
            stepper.step(batches, number, StopRequest())
        return (time.perf_counter() - began) / TIMED
