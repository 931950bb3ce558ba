"""The work of `render_inpaint.render`: a plan, then the clip streamed through the fillers into its files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from diffmae_video.config import RenderSettings, Settings, load_settings, with_overrides
from diffmae_video.config.fit_text import fit_length_on
from diffmae_video.data.sampling import stride_at
from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.image_metrics import Closeness
from diffmae_video.mask_text import MaskRequest
from diffmae_video.models.initial import initial_sha256
from diffmae_video.pipelines.console import format_seconds, progress, say
from diffmae_video.pipelines.find import Fill
from diffmae_video.pipelines.inpainters import Painter, check_steps, choose_painter
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.render_fit import fit_painter, left_over
from diffmae_video.pipelines.render_follow import follow_mask, save_followed
from diffmae_video.pipelines.render_report import (
    RenderResult,
    describe_figures,
    read_render_result,
    write_render_result,
)
from diffmae_video.pipelines.render_resume import WORK, TakenFiles, WindowFiles, render_identity
from diffmae_video.pipelines.run import open_run
from diffmae_video.registry import samplers
from diffmae_video.rendering.album import Album, write_trajectory
from diffmae_video.rendering.fillers import SPECK, Classical, Propagation
from diffmae_video.rendering.frames import Filler, Frame
from diffmae_video.rendering.inpaint import Inpainter
from diffmae_video.rendering.masks import ClipMask, ClipShape, build_mask
from diffmae_video.rendering.sheet import Panels
from diffmae_video.rendering.source import VideoSource
from diffmae_video.rendering.writers import Writer, open_writer, write_png
from diffmae_video.training.hardware import pick_device
from diffmae_video.training.signals import stop_on_signal

CHOICES = ("codec", "sampler", "window")
"""Options that take one of a few words."""
PAINTED = 0.02
"""Share of the hidden pixels from which on the work of the model can be seen."""


@dataclass(frozen=True)
class Plan:
    """Everything a render needs, found and checked before anything is written."""

    source: VideoSource
    propagation: Propagation | None
    """Takes from other frames what they show; None where the model is to fill all of it."""
    classical: Classical
    """Fills what is left before the model: specks; without a model everything."""
    inpainter: Inpainter | None
    mask: ClipMask
    removal: bool
    """Something is removed: the source is no truth to compare with."""
    settings: Settings
    checkpoint: str | None
    """None without a model."""
    weights: str
    """Digest of the model's weights; empty without a model."""
    touched: list[int]
    """Frames in which something is hidden."""
    fit: Fill | None = None
    """A model of the clip itself is to be made, once it is known what is left to fill; it starts from `checkpoint`."""
    fit_steps: int | None = None

    def hidden(self, number: int) -> np.ndarray:
        """What the mask hides of a frame, bool (H, W); frames may be more than the file says."""
        return self.mask(min(number, self.source.frames - 1))

    @property
    def fillers(self) -> list[Filler]:
        """In the order in which frames pass them."""
        before: list[Filler] = [] if self.propagation is None else [self.propagation]
        if self.inpainter is None:
            return [*before, self.classical]
        return [*before, self.classical, self.inpainter] if before else [self.inpainter]


@contextmanager
def plan_render(
    job: Job, clip: Path | str, mask: MaskRequest, fill: Fill, options: Mapping[str, Any], fps: float | None
) -> Iterator[Plan]:
    """Choose the model, open the clip, read the mask, and say what is about to happen; closes the clip at the end.

    Args:
        fill: what the job says of the ways to fill.
        options: fields of the render settings, and `lossless`.
        fps: frame rate of a folder of images; 24 without it.

    Raises:
        UsageError, DataError: see `render_inpaint.render`.
    """
    painter = choose_painter(job, fill)
    settings = _settings(painter.settings, job, {**options, "propagate": fill.propagate})
    _check_label(settings, options, painter)
    rate = 24.0 if fps is None else fps
    with closing(VideoSource(clip, rate)) as source:
        if fps is not None and source.kind != "folder":
            raise UsageError(f"--fps {fps:g}: {clip} has times of its own; leave it out, it is for folders of images.")
        inpainter, model = None, painter.model
        if model is not None:
            stride = _stride(settings, source, model.settings.frames)
            inpainter = Inpainter(model, settings.render, stride=stride, seed=settings.seed)
        request = mask if mask.texts or mask.track else replace(mask, texts=(settings.render.mask,))
        shape = _shape(source, settings, inpainter)
        if request.follow:
            drawn = follow_mask(source.path, request, shape, rate, job.device)
        else:
            drawn = build_mask(request, shape)
        share, touched = _survey(drawn, source.frames)
        for note in drawn.notes:
            say(note)
        if source.interlaced:
            say(
                f"{source.path} is interlaced and rendered frame by frame: put it through ffmpeg's filter bwdif before."
            )
        fill = replace(fill, generated=request.generated)  # of the mask that the model's own settings name
        propagation = Propagation() if fill.looks_elsewhere else None
        ways = [] if propagation is None else ["What other frames show is taken from there."]
        if painter.fitted:
            length = fit_length_on(fill.fit_length, pick_device(job.device).type)
            ways += [f"The rest is painted by a small model that is first trained on the clip, {length}."]
        if inpainter is not None:
            ways += [
                f"Windows of {inpainter.length} frames, stride {inpainter.stride}, at "
                f"{inpainter.size[1]}x{inpainter.size[0]}; {settings.render.sampler}, {settings.render.steps} steps."
            ]
        say(
            f"Clip: {source.path}, {source.width}x{source.height}, {source.frames} frames, "
            f"{source.frames / float(source.fps):.3g} s. Mask: {request}, {share:.1%} hidden. {' '.join(ways)}"
        )
        yield Plan(
            source,
            propagation,
            Classical(None if inpainter is None else SPECK),
            inpainter,
            drawn,
            not request.generated,
            settings,
            painter.checkpoint,
            f"fit {_initial(painter.checkpoint)}" if painter.fitted else painter.weights_sha256,
            touched,
            fill if painter.fitted else None,
        )


def _check_label(settings: Settings, options: Mapping[str, Any], painter: Painter) -> None:
    """Refuse a label where no model is told of it."""
    label = settings.render.label
    if label is None:
        if (guidance := options.get("guidance")) is not None:
            raise UsageError(f"--guidance {guidance:g} says how far a label is followed: give --label NAME, too.")
    elif painter.model is None:
        raise UsageError(
            f"--label {label}: no model that knows labels is asked here; give one trained with model.labels = data as "
            "--checkpoint."
        )


def _initial(checkpoint: str | None) -> str:
    return "" if checkpoint is None else initial_sha256(checkpoint)


def _shape(source: VideoSource, settings: Settings, inpainter: Inpainter | None) -> ClipShape:
    """What the mask must fit; generated ones lie on the grid of the model, or, without one, of that in the settings."""
    size, fps = (source.height, source.width), float(source.fps)
    if inpainter is not None:
        return inpainter.clip_shape(size, source.frames, fps)
    model = settings.model
    grid = (max(1, model.frames // model.tubelet), model.size[0] // model.patch, model.size[1] // model.patch)
    return ClipShape(*size, source.frames, fps, grid, model.frames, settings.seed)


def run_render(job: Job, plan: Plan) -> RenderResult:
    """Render in the folder of this run, or read the result of one that is done.

    Raises:
        UsageError, DataError, Stopped: see `render_inpaint.render`.
    """
    began = time.monotonic()
    inpainter, propagation = plan.inpainter, plan.propagation
    stride = 1 if inpainter is None else inpainter.stride
    identity = render_identity(plan.source, plan.weights, plan.settings, plan.mask.request, stride)
    with open_run(job, identity, finished="refuse" if job.resume == "never" else "yield") as run:
        if run.earlier.get("status") == "finished":
            say(f"{run.directory} holds this render already: done before.")
            return read_render_result(run.directory)
        if job.resume == "never":
            shutil.rmtree(run.directory / WORK, ignore_errors=True)
        if plan.mask.request.follow:
            size = (plan.source.height, plan.source.width)
            save_followed(plan.mask, run.directory, plan.source.frames, size, float(plan.source.fps))
        with stop_on_signal() as signals:

            def check() -> None:
                signals.check(f"the same command continues the render of {plan.source.path}")

            work = run.directory / WORK
            try:
                if propagation is not None:
                    propagation.store, propagation.between_frames = TakenFiles(work / "taken"), check
                if plan.fit is not None:
                    plan = _fitted(job, plan, check)
                    inpainter = plan.inpainter
                if inpainter is not None:
                    windows = "windows" if plan.fit is None else f"windows-{plan.weights[:12]}"
                    inpainter.store, inpainter.between_steps = WindowFiles(work / windows), check
                result = _write(plan, run.directory, check)
            except (UsageError, DataError):
                if not run.earlier:
                    shutil.rmtree(run.directory / WORK, ignore_errors=True)  # so that the folder is given back
                raise
        shutil.rmtree(run.directory / WORK, ignore_errors=True)
        run.finish(clip=str(plan.source.path), mask=result.mask, checkpoint=plan.checkpoint)
    say(
        f"Done in {format_seconds(time.monotonic() - began)}: {result.video}. {describe_figures(result)} "
        f"{_next(plan, result)}"
    )
    return result


def _next(plan: Plan, result: RenderResult) -> str:
    """What to look at and what to try where it is not right, as the end of the last line."""
    text = "Look at report.html beside it."
    if plan.removal:
        text += f" If an edge of the thing is left: --dilate {plan.mask.request.growth + 4}."
        if plan.fit is not None and plan.fit.fit == "auto" and result.modelled_share > PAINTED:
            text += " If what was painted is soft: --fit 10m."
    return text


def _fitted(job: Job, plan: Plan, check: Callable[[], None]) -> Plan:
    """The plan with a model of the clip, made for what no other frame shows; without one where that is nothing."""
    assert plan.fit is not None
    left, again = None, plan.propagation
    if plan.propagation is not None:
        left, again = left_over(_frames(plan), plan.source.frames, plan.propagation, check), Propagation()
        again.store, again.between_frames = plan.propagation.store, check
        if left is None:
            say("Other frames show all of it: no model is needed.")
            return replace(plan, propagation=again, classical=Classical(), checkpoint=None)
    made, loaded = fit_painter(job, plan.source, plan.hidden, left, plan.fit, plan.checkpoint)
    settings = with_overrides(loaded.settings, render=plan.settings.render.model_dump())
    inpainter = Inpainter(
        loaded.model,
        settings.render,
        stride=_stride(settings, plan.source, settings.model.frames),
        seed=settings.seed,
    )
    return replace(
        plan,
        propagation=again,
        classical=Classical(SPECK),
        inpainter=inpainter,
        settings=settings,
        checkpoint=str(made.directory),
        weights=loaded.weights_sha256,
        fit_steps=made.steps,
    )


def _settings(run: Settings, job: Job, options: Mapping[str, Any]) -> Settings:
    if job.recipe != "auto":
        run = with_overrides(run, render=load_settings(job.recipe, "render", job.overrides).render.model_dump())
    chosen = {name: value for name, value in options.items() if value is not None}
    lossless = chosen.pop("lossless", False)
    for name in CHOICES:
        allowed = samplers.names() if name == "sampler" else get_args(RenderSettings.model_fields[name].annotation)
        if name in chosen and chosen[name] not in allowed:
            raise UsageError(f"--{name} {chosen[name]}: choose {', '.join(allowed[:-1])} or {allowed[-1]}.")
    if lossless:
        if chosen.get("codec") not in (None, "ffv1", "png"):
            raise UsageError(f"--lossless cannot go with --codec {chosen['codec']}; choose ffv1 or png.")
        chosen.setdefault("codec", "ffv1")
    settings = with_overrides(run, render=chosen)
    check_steps(settings)
    return settings


def _stride(settings: Settings, source: VideoSource, length: int) -> int:
    """The stride asked for, or the speed the model was trained at, as far as the clip is long enough for it."""
    stride = settings.render.stride or stride_at(settings.data, length, float(source.fps))
    return max(1, min(stride, source.frames // length))


def _survey(mask: ClipMask, frames: int) -> tuple[float, list[int]]:
    """Share of the clip that is hidden, and the frames concerned; refuses a mask that hides nothing or everything."""
    total = hidden = 0
    touched = []
    with progress(frames, "mask", "frames") as line:
        for number in range(frames):
            one = mask(number)
            count = int(np.count_nonzero(one))
            hidden, total = hidden + count, total + one.size
            if count:
                touched.append(number)
            line.update(1)
    if hidden == 0:
        read = f" ({' '.join(mask.notes)})" if mask.notes else ""
        raise UsageError(f"--mask {mask.request} hides nothing of the clip{read}; choose what to inpaint.")
    if hidden == total:
        raise UsageError(f"--mask {mask.request} hides the whole clip; leave something visible to go by.")
    return hidden / total, touched


def _frames(plan: Plan) -> Iterator[Frame]:
    for number, frame in enumerate(plan.source):
        yield Frame(number, frame.rgb, plan.hidden(number), frame.pts)


def _write(plan: Plan, directory: Path, check: Callable[[], None]) -> RenderResult:
    """Stream the clip through the fillers into its files, then write what is read off it.

    Args:
        check: called between frames; raises where a signal has asked to stop.
    """
    started, settings = time.monotonic(), plan.settings
    source, inpainter, propagation = plan.source, plan.inpainter, plan.propagation
    samples = settings.render.samples if inpainter is not None else 1
    closeness, hidden, count = Closeness(), 0, 0
    title, third = (
        ("MAE's one step", Frame.one_step) if propagation is None else ("from other frames", Frame.from_others)
    )
    album = Album(plan.touched, title, third)
    panels = Panels(["source", "masked", title, "result"], source.height, source.width)
    with ExitStack() as undo:

        def writer(stem: str, codec: str, size: tuple[int, int] | None = None) -> Writer:
            made = open_writer(directory, stem, source, codec, settings.render.crf, size)
            undo.callback(made.abort)
            return made

        names = ["inpainted", *(f"inpainted-{k}" for k in range(2, samples + 1))]
        results = [writer(name, settings.render.codec) for name in names]
        comparison = writer("comparison", "h264", panels.size)
        with progress(source.frames, "render-inpaint", "frames") as line:
            stream = _frames(plan)
            for filler in plan.fillers:
                stream = filler.stream(stream)
            for frame in stream:
                for k, made in enumerate(results):
                    made.write(frame.result(k), frame.pts)
                pictures = [frame.source, frame.masked(), third(frame), frame.result()]
                comparison.write(panels.compose(pictures), frame.pts)
                if not plan.removal:
                    closeness.add(frame.source, frame.result(), frame.hidden)
                hidden, count = hidden + int(frame.hidden.sum()), count + 1
                album.add(frame)
                line.update(1, **({} if inpainter is None else {"windows": inpainter.windows}))
                check()
        if hidden == 0:  # of the frames that could be decoded
            raise UsageError(f"--mask {plan.mask.request} hides nothing of the clip; choose what to inpaint.")
        for made in [*results, comparison]:
            made.close()
        undo.pop_all()
    write_png(directory / "sheet.png", album.sheet(f"{source.path.name}, {plan.mask.request}"))
    if samples > 1:
        write_png(directory / "uncertainty.png", album.uncertainty(f"Spread of {samples} samples"))
    if inpainter is not None and inpainter.trajectory is not None and len(inpainter.trajectory.steps) > 1:
        write_trajectory(directory / "trajectory.mp4", inpainter.trajectory, settings.render.steps)
    result = RenderResult(
        directory=str(directory),
        video=str(results[0].path),
        clip=str(source.path),
        mask=plan.mask.request.names(),
        frames=count,
        size=[source.width, source.height],
        masked_share=hidden / (count * source.height * source.width),
        seconds=round(time.monotonic() - started, 3),
        samples=samples,
        seed=settings.seed,
        checkpoint=plan.checkpoint,
        fit_steps=plan.fit_steps,
        removal=plan.removal,
        **_shares(plan, hidden),
        **({} if inpainter is None else _sampling(inpainter)),
    )
    if not plan.removal:
        result = replace(result, **closeness.figures())
    write_render_result(result, settings)
    return result


def _shares(plan: Plan, hidden: int) -> dict[str, Any]:
    """How the hidden pixels were filled, as shares that add up to 1."""
    taken, classical = 0 if plan.propagation is None else plan.propagation.pixels, plan.classical.pixels
    shares = {"propagated_share": taken / hidden, "classical_share": classical / hidden}
    if plan.propagation is not None and taken:
        shares["propagated_confidence"] = plan.propagation.confidence / taken
    return {**shares, "modelled_share": (hidden - taken - classical) / hidden}


def _sampling(inpainter: Inpainter) -> dict[str, Any]:
    return {
        "windows": inpainter.windows,
        "windows_resumed": inpainter.restored,
        "steps": inpainter.settings.steps,
        "sampler": inpainter.settings.sampler,
        "stride": inpainter.stride,
    }
