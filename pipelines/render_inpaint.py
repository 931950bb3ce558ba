"""`diffmae render-inpaint`: fill the hidden part of a clip and show what was done."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from diffmae_video.config import RenderSettings, Settings, load_settings, settings_toml, with_overrides
from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.image_metrics import Closeness
from diffmae_video.files import write_atomic
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.pipelines.console import format_seconds, progress, say
from diffmae_video.pipelines.inpainters import check_steps, load_inpainter
from diffmae_video.pipelines.render_resume import WORK, WindowFiles, identity, open_directory, render_directory
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.rendering.album import Album, Journey
from diffmae_video.rendering.inpaint import Frame, Inpainter
from diffmae_video.rendering.masks import Canvas, FrameMask, build_mask
from diffmae_video.rendering.report import Report
from diffmae_video.rendering.sheet import Panels
from diffmae_video.rendering.video import VideoSource, Writer, open_writer, write_png

CHOICES = ("codec", "sampler", "window")
"""Options that take one of a few words."""
EMBEDDED_MEGABYTES = 8
"""Largest video that report.html plays inside."""


@dataclass(frozen=True)
class RenderResult:
    """What `render_inpaint` made and measured; also written as result.json."""

    directory: str
    video: str
    clip: str
    mask: list[str]
    frames: int
    size: list[int]
    psnr_masked: float
    ssim_masked: float
    psnr_full: float
    ssim_full: float
    masked_share: float
    seconds: float
    windows: int
    windows_resumed: int
    steps: int
    sampler: str
    samples: int
    stride: int
    seed: int
    checkpoint: str


def render_inpaint(
    clip: Path | str,
    *,
    masks: Sequence[str] = (),
    track: str | None = None,
    dilate: int = 0,
    invert: bool = False,
    checkpoint: str | Path | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    render: dict[str, Any] | None = None,
    lossless: bool = False,
    fps: float = 24.0,
    out: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    resume: str = "auto",
    dry_run: bool = False,
) -> RenderResult | None:
    """Inpaint a video, an image or a folder of frames, and write the result beside pictures and figures.

    Args:
        clip: video, image, or folder of images.
        masks: what to hide (rendering.masks); the recipe's without it.
        track: a box that moves between key frames.
        dilate: pixels by which masks grow.
        invert: hide what the masks show.
        checkpoint: a pre-training run; the workspace's newest without it.
        recipe: whose `render` settings apply; those saved with the run without it.
        overrides: `section.field=value` texts.
        render: single fields of the render settings, which win over all others.
        lossless: FFV1 output (PNG for an image), bit-equal outside the mask.
        fps: frame rate of a folder of images.
        out: folder for the results.
        seed: of noise and generated masks.
        resume: `auto` continues an interrupted render of the same clip, mask, model and settings; `never` starts anew.
        dry_run: print the plan and make nothing.

    Returns:
        What was made and measured; None for a dry run.

    Raises:
        UsageError: no model, a mask that does not fit, an output folder in use.
        DataError: a clip that cannot be read.
    """
    source_run, loaded = load_inpainter(checkpoint, device, overrides, seed)
    settings = _settings(loaded.settings, recipe, overrides, render or {}, lossless)
    source = VideoSource(clip, fps)
    try:
        return _render(
            source, loaded.model, settings, list(masks), track, dilate, invert, out, resume, dry_run,
            checkpoint=source_run, weights=loaded.weights_sha256,
        )  # fmt: skip
    finally:
        source.close()


def _settings(
    run: Settings, recipe: str | None, overrides: Sequence[str], render: dict[str, Any], lossless: bool
) -> Settings:
    if recipe not in (None, "auto"):
        run = with_overrides(run, render=load_settings(recipe, "render", tuple(overrides)).render.model_dump())
    chosen = {name: value for name, value in render.items() if value is not None}
    for name in CHOICES:
        allowed = get_args(RenderSettings.model_fields[name].annotation)
        if name in chosen and chosen[name] not in allowed:
            raise UsageError(f"--{name} {chosen[name]}: choose {', '.join(allowed[:-1])} or {allowed[-1]}.")
    if lossless:
        if chosen.get("codec") not in (None, "ffv1", "png"):
            raise UsageError(f"--lossless cannot go with --codec {chosen['codec']}; choose ffv1 or png.")
        chosen.setdefault("codec", "ffv1")
    settings = with_overrides(run, render=chosen)
    check_steps(settings)
    return settings


def _render(
    source: VideoSource,
    model: DiffMAE,
    settings: Settings,
    masks: list[str],
    track: str | None,
    dilate: int,
    invert: bool,
    out: Path | None,
    resume: str,
    dry_run: bool,
    *,
    checkpoint: str,
    weights: str,
) -> RenderResult | None:
    render = settings.render
    texts = masks or ([] if track else [render.mask])
    stride = _stride(settings, source, model)
    inpainter = Inpainter(model, render, stride=stride, seed=settings.seed)
    canvas = Canvas(
        source.height, source.width, source.frames, float(source.fps), inpainter.grid, inpainter.span, settings.seed
    )
    mask = build_mask(texts, canvas, track=track, dilate=dilate, invert=invert)
    share, touched = _survey(mask, source.frames, texts, track)
    seconds = source.frames / float(source.fps)
    say(
        f"Clip: {source.path}, {source.width}x{source.height}, {source.frames} frames, {seconds:.3g} s. "
        f"Mask: {', '.join([*texts, *(['--track'] if track else [])])}, {share:.1%} hidden. "
        f"Windows of {model.settings.frames} frames, stride {stride}, at "
        f"{model.settings.size[1]}x{model.settings.size[0]}; {render.sampler}, {render.steps} steps."
    )
    if dry_run:
        return None
    mark = identity(source, weights, settings, texts, track, dilate, invert, stride)
    directory = render_directory(out, mark, resume)
    fresh = not directory.exists()
    inpainter.store = open_directory(directory, mark)
    try:
        result = _run(source, inpainter, mask, texts, directory, settings, checkpoint, track, touched)
    except (UsageError, DataError):
        if fresh:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory / WORK)
    Workspace.here().record("render", directory, clip=str(source.path), mask=result.mask, checkpoint=checkpoint)
    say(
        f"Done in {format_seconds(result.seconds)}: {result.video}. Hidden region against the source: "
        f"PSNR {result.psnr_masked:.2f} dB, SSIM {result.ssim_masked:.3f}. Pictures and report.html lie beside it."
    )
    return result


def _run(
    source: VideoSource,
    inpainter: Inpainter,
    mask: FrameMask,
    texts: list[str],
    directory: Path,
    settings: Settings,
    checkpoint: str,
    track: str | None,
    touched: list[int],
) -> RenderResult:
    render, started = settings.render, time.monotonic()
    still = source.kind == "image"
    codec = ("png" if render.codec != "gif" else "gif") if still else render.codec
    journey = _journey(inpainter, render.steps, directory / WORK)
    closeness, album = Closeness(), Album(touched)
    hidden_pixels = 0
    labels = ["source", "masked", "MAE's one step", "result"]
    panels = Panels(labels, source.height, source.width)
    with ExitStack() as undo:

        def writer(stem: str, kind: str, size: tuple[int, int] | None = None) -> Writer:
            made = open_writer(directory, stem, source, kind, render.crf, size)
            undo.callback(made.abort)
            return made

        results = [writer("inpainted" if k == 0 else f"inpainted-{k + 1}", codec) for k in range(render.samples)]
        comparison = writer("comparison", "png" if still else "h264", panels.size)
        with progress(source.frames, "render-inpaint", "frames") as line:
            for frame in inpainter.stream(_frames(source, mask)):
                for k, made in enumerate(results):
                    made.write(frame.result(k), frame.pts)
                comparison.write(
                    panels.compose([frame.source, frame.masked(), frame.one_step(), frame.result()]), frame.pts
                )
                closeness.add(frame.source, frame.result(), frame.hidden)
                hidden_pixels += int(frame.hidden.sum())
                album.add(frame)
                line.update(1, windows=inpainter.windows)
        if hidden_pixels == 0:
            raise UsageError(f"--mask {', '.join(texts)} hides nothing of the clip; choose what to inpaint.")
        outputs = [made.path for made in results]
        for made in [*results, comparison]:
            made.close()
        undo.pop_all()
    if still:
        outputs = [_single(path) for path in outputs]
        _single(comparison.path)
    write_png(directory / "sheet.png", album.sheet(f"{source.path.name}, {', '.join(texts) or 'track'}"))
    if render.samples > 1:
        write_png(directory / "uncertainty.png", album.uncertainty(f"Spread of {render.samples} samples"))
    if journey.whole:
        journey.write(directory / "trajectory.mp4")
    result = RenderResult(
        directory=str(directory),
        video=str(outputs[0]),
        clip=str(source.path),
        mask=[*texts, *([f"track {track}"] if track else [])],
        frames=closeness.frames,
        size=[source.width, source.height],
        masked_share=hidden_pixels / (closeness.frames * source.height * source.width),
        seconds=round(time.monotonic() - started, 3),
        windows=inpainter.windows,
        windows_resumed=inpainter.restored,
        steps=render.steps,
        sampler=render.sampler,
        samples=render.samples,
        stride=inpainter.stride,
        seed=settings.seed,
        checkpoint=checkpoint,
        **closeness.figures(),
    )
    write_atomic(directory / "config.toml", settings_toml(settings))
    _report(result, settings, directory, still)
    write_atomic(directory / "result.json", json.dumps(asdict(result), indent=1) + "\n")
    return result


def _journey(inpainter: Inpainter, steps: int, work: Path) -> Journey:
    """Follows the first window, or takes what an interrupted render has kept of it."""
    journey, store = Journey(steps), WindowFiles(work)
    kept = store.load("trajectory")
    if kept is not None:
        journey.states = list(kept)

    def see(step: int, noisy: np.ndarray, x0: np.ndarray) -> None:
        journey.see(step, noisy, x0)
        if journey.whole:
            store.save("trajectory", np.stack(journey.states))

    inpainter.callback = see
    return journey


def _frames(source: VideoSource, mask: FrameMask) -> Iterator[Frame]:
    for number, frame in enumerate(source):
        yield Frame(number, frame.rgb, mask(min(number, source.frames - 1)), frame.pts)


def _stride(settings: Settings, source: VideoSource, model: DiffMAE) -> int:
    """The stride asked for, or the one the model was trained with, as far as the clip is long enough for it."""
    stride = settings.render.stride or settings.data.stride
    return max(1, min(stride, source.frames // model.settings.frames))


def _survey(mask: FrameMask, frames: int, texts: list[str], track: str | None) -> tuple[float, list[int]]:
    """Share of the clip that is hidden, and the frames concerned; refuses a mask that hides nothing or everything."""
    total = hidden = 0
    touched = []
    for number in range(frames):
        one = mask(number)
        count = int(np.count_nonzero(one))
        hidden, total = hidden + count, total + one.size
        if count:
            touched.append(number)
    name = ", ".join(texts) or f"--track {track}"
    if hidden == 0:
        raise UsageError(f"--mask {name} hides nothing of the clip; choose what to inpaint.")
    if hidden == total:
        raise UsageError(f"--mask {name} hides the whole clip; leave something visible to go by.")
    return hidden / total, touched


def _single(folder: Path) -> Path:
    """A folder with one picture becomes the picture."""
    file = folder.with_suffix(".png")
    if folder.is_dir():
        os.replace(folder / "00000.png", file)
        folder.rmdir()
        return file
    return folder


def _report(result: RenderResult, settings: Settings, directory: Path, still: bool) -> None:
    report = Report(f"Inpainting of {Path(result.clip).name}")
    report.text(
        f"Mask **{', '.join(result.mask)}**, {result.masked_share:.1%} of the pixels hidden; {result.sampler}, "
        f"{result.steps} steps, seed {result.seed}; {result.windows} windows in {result.seconds:.1f} s.\n\n"
        "PSNR and SSIM compare the result with the source. One sample of a sharp model has a lower PSNR than the "
        "blurred mean of all plausible answers, which is what one step shows."
    )
    report.table(
        "Against the source",
        ["region", "PSNR, dB", "SSIM"],
        [["hidden", result.psnr_masked, result.ssim_masked], ["whole frame", result.psnr_full, result.ssim_full]],
    )
    if still:
        report.image("Comparison", directory / "comparison.png")
    else:
        _video(report, "Source, masked, one step, result", directory / "comparison.mp4")
        if Path(result.video).suffix in (".mp4", ".gif"):
            _video(report, "Result", Path(result.video))
    report.image("Frames", directory / "sheet.png")
    if (directory / "uncertainty.png").is_file():
        report.image("Uncertainty", directory / "uncertainty.png")
    if (directory / "trajectory.mp4").is_file():
        report.video("From noise to the sample: state and prediction", directory / "trajectory.mp4")
    report.settings(settings_toml(settings))
    report.write(directory / "report.html")


def _video(report: Report, title: str, path: Path) -> None:
    """Embed a video, or say where it is: a page is held in memory whole, by us and by the browser."""
    megabytes = path.stat().st_size / 1e6
    if megabytes <= EMBEDDED_MEGABYTES:
        report.video(title, path)
    else:
        report.text(f"**{title}**: `{path.name}`, {megabytes:.0f} MB, too large for this page, lies beside it.")
