"""The work of `render_inpaint.render`: a plan, then the clip streamed through the model into its files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from diffmae_video.config import RenderSettings, Settings, load_settings, with_overrides
from diffmae_video.data.sampling import stride_at
from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.image_metrics import Closeness
from diffmae_video.mask_text import MaskRequest
from diffmae_video.pipelines.console import format_seconds, progress, say
from diffmae_video.pipelines.inpainters import check_steps, load_inpainter
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.render_report import RenderResult, read_render_result, write_render_result
from diffmae_video.pipelines.render_resume import WORK, WindowFiles, render_identity
from diffmae_video.pipelines.run import open_run
from diffmae_video.registry import samplers
from diffmae_video.rendering.album import Album, write_trajectory
from diffmae_video.rendering.frames import Frame
from diffmae_video.rendering.inpaint import Inpainter
from diffmae_video.rendering.masks import ClipMask, build_mask
from diffmae_video.rendering.sheet import Panels
from diffmae_video.rendering.source import VideoSource
from diffmae_video.rendering.writers import Writer, open_writer, write_png
from diffmae_video.training.signals import stop_on_signal

CHOICES = ("codec", "sampler", "window")
"""Options that take one of a few words."""


@dataclass(frozen=True)
class Plan:
    """Everything a render needs, found and checked before anything is written."""

    source: VideoSource
    inpainter: Inpainter
    mask: ClipMask
    settings: Settings
    checkpoint: str
    weights: str
    """Digest of the model's weights."""
    touched: list[int]
    """Frames in which something is hidden."""


@contextmanager
def plan_render(
    job: Job, clip: Path | str, mask: MaskRequest, options: Mapping[str, Any], fps: float
) -> Iterator[Plan]:
    """Load the model, open the clip, read the mask, and say what is about to happen; closes the clip at the end.

    Args:
        options: fields of the render settings, and `lossless`.
        fps: frame rate of a folder of images.

    Raises:
        UsageError, DataError: see `render_inpaint.render`.
    """
    checkpoint, model, loaded = load_inpainter(job)
    settings = _settings(loaded.settings, job, options)
    with closing(VideoSource(clip, fps)) as source:
        stride = _stride(settings, source, model.settings.frames)
        inpainter = Inpainter(model, settings.render, stride=stride, seed=settings.seed)
        request = mask if mask.texts or mask.track else replace(mask, texts=(settings.render.mask,))
        shape = inpainter.clip_shape((source.height, source.width), source.frames, float(source.fps))
        drawn = build_mask(request, shape)
        share, touched = _survey(drawn, source.frames)
        for note in drawn.notes:
            say(note)
        say(
            f"Clip: {source.path}, {source.width}x{source.height}, {source.frames} frames, "
            f"{source.frames / float(source.fps):.3g} s. Mask: {request}, {share:.1%} hidden. "
            f"Windows of {inpainter.length} frames, stride {stride}, at {inpainter.size[1]}x{inpainter.size[0]}; "
            f"{settings.render.sampler}, {settings.render.steps} steps."
        )
        yield Plan(source, inpainter, drawn, settings, checkpoint, loaded.weights_sha256, touched)


def run_render(job: Job, plan: Plan) -> RenderResult:
    """Render in the folder of this run, or read the result of one that is done.

    Raises:
        UsageError, DataError, Stopped: see `render_inpaint.render`.
    """
    inpainter, request = plan.inpainter, plan.mask.request
    identity = render_identity(plan.source, plan.weights, plan.settings, request, inpainter.stride)
    with open_run(job, identity, finished="refuse" if job.resume == "never" else "yield") as run:
        if run.earlier.get("status") == "finished":
            say(f"{run.directory} holds this render already: done before.")
            return read_render_result(run.directory)
        if job.resume == "never":
            shutil.rmtree(run.directory / WORK, ignore_errors=True)
        inpainter.store = WindowFiles(run.directory / WORK / "windows")
        with stop_on_signal() as signals:
            inpainter.between_steps = lambda: signals.check(
                f"the same command continues the render of {plan.source.path}"
            )
            try:
                result = _write(plan, run.directory)
            except (UsageError, DataError):
                if not run.earlier:
                    shutil.rmtree(run.directory / WORK, ignore_errors=True)  # so that the folder is given back
                raise
        shutil.rmtree(run.directory / WORK)
        run.finish(clip=str(plan.source.path), mask=result.mask, checkpoint=plan.checkpoint)
    say(
        f"Done in {format_seconds(result.seconds)}: {result.video}. Hidden region against the source: "
        f"PSNR {result.psnr_masked:.2f} dB, SSIM {result.ssim_masked:.3f}. Pictures and report.html lie beside it."
    )
    return result


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
    for number in range(frames):
        one = mask(number)
        count = int(np.count_nonzero(one))
        hidden, total = hidden + count, total + one.size
        if count:
            touched.append(number)
    if hidden == 0:
        read = f" ({' '.join(mask.notes)})" if mask.notes else ""
        raise UsageError(f"--mask {mask.request} hides nothing of the clip{read}; choose what to inpaint.")
    if hidden == total:
        raise UsageError(f"--mask {mask.request} hides the whole clip; leave something visible to go by.")
    return hidden / total, touched


def _frames(plan: Plan) -> Iterator[Frame]:
    for number, frame in enumerate(plan.source):
        yield Frame(number, frame.rgb, plan.mask(min(number, plan.source.frames - 1)), frame.pts)


def _write(plan: Plan, directory: Path) -> RenderResult:
    """Stream the clip through the model into its files, then write what is read off it."""
    started, settings = time.monotonic(), plan.settings
    source, inpainter, samples = plan.source, plan.inpainter, settings.render.samples
    closeness, album, hidden = Closeness(), Album(plan.touched), 0
    panels = Panels(["source", "masked", "MAE's one step", "result"], source.height, source.width)
    with ExitStack() as undo:

        def writer(stem: str, codec: str, size: tuple[int, int] | None = None) -> Writer:
            made = open_writer(directory, stem, source, codec, settings.render.crf, size)
            undo.callback(made.abort)
            return made

        names = ["inpainted", *(f"inpainted-{k}" for k in range(2, samples + 1))]
        results = [writer(name, settings.render.codec) for name in names]
        comparison = writer("comparison", "h264", panels.size)
        with progress(source.frames, "render-inpaint", "frames") as line:
            for frame in inpainter.stream(_frames(plan)):
                for k, made in enumerate(results):
                    made.write(frame.result(k), frame.pts)
                pictures = [frame.source, frame.masked(), frame.one_step(), frame.result()]
                comparison.write(panels.compose(pictures), frame.pts)
                closeness.add(frame.source, frame.result(), frame.hidden)
                hidden += int(frame.hidden.sum())
                album.add(frame)
                line.update(1, windows=inpainter.windows)
                inpainter.between_steps()
        if hidden == 0:  # of the frames that could be decoded
            raise UsageError(f"--mask {plan.mask.request} hides nothing of the clip; choose what to inpaint.")
        for made in [*results, comparison]:
            made.close()
        undo.pop_all()
    write_png(directory / "sheet.png", album.sheet(f"{source.path.name}, {plan.mask.request}"))
    if samples > 1:
        write_png(directory / "uncertainty.png", album.uncertainty(f"Spread of {samples} samples"))
    if inpainter.trajectory is not None and len(inpainter.trajectory.steps) > 1:
        write_trajectory(directory / "trajectory.mp4", inpainter.trajectory, settings.render.steps)
    result = RenderResult(
        directory=str(directory),
        video=str(results[0].path),
        clip=str(source.path),
        mask=plan.mask.request.names(),
        frames=closeness.frames,
        size=[source.width, source.height],
        masked_share=hidden / (closeness.frames * source.height * source.width),
        seconds=round(time.monotonic() - started, 3),
        windows=inpainter.windows,
        windows_resumed=inpainter.restored,
        steps=settings.render.steps,
        sampler=settings.render.sampler,
        samples=samples,
        stride=inpainter.stride,
        seed=settings.seed,
        checkpoint=plan.checkpoint,
        **closeness.figures(),
    )
    write_render_result(result, settings)
    return result
