"""`diffmae render-inpaint`: fill the hidden part of a clip and show what was done."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffmae_video.config import Settings, load_settings, settings_toml, with_overrides
from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.image_metrics import Closeness
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.pipelines.classifiers import find_run, load
from diffmae_video.pipelines.console import format_seconds, progress, say
from diffmae_video.pipelines.recipes import pick_device
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.rendering.inpaint import Frame, Inpainter
from diffmae_video.rendering.masks import Canvas, FrameMask, build_mask
from diffmae_video.rendering.report import Report
from diffmae_video.rendering.sheet import Panels, colour_bar, contact_sheet, heat, spread
from diffmae_video.rendering.video import VideoSource, Writer, open_writer, write_png

WORK = ".work"
SHEET_COLUMNS = 8


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


class _Store:
    """Finished windows on disk, so that an interrupted render continues; removed once the render is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str) -> np.ndarray | None:
        file = self.folder / f"{key}.npy"
        if not file.is_file():
            return None
        try:
            return np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError):
            return None

    def save(self, key: str, clips: np.ndarray) -> None:
        file = self.folder / f"{key}.npy"
        buffer = io.BytesIO()
        np.save(buffer, clips, allow_pickle=False)
        _write_atomic(file, buffer.getvalue())


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
    import torch

    source_run, which = find_run("pretrain", checkpoint)
    say(which)
    target = torch.device(pick_device(device))
    loaded = load(source_run, target, overrides, seed)
    model = loaded.model
    if not isinstance(model, DiffMAE):
        raise UsageError(
            f"{source_run} is a classifier, which cannot inpaint; give a pre-training run as --checkpoint."
        )
    settings = _settings(loaded.settings, recipe, overrides, render or {}, lossless)
    source = VideoSource(clip, fps)
    try:
        return _render(
            source, model, settings, list(masks), track, dilate, invert, out, resume, dry_run,
            checkpoint=str(source_run), weights=loaded.weights_sha256,
        )  # fmt: skip
    finally:
        source.close()


def _settings(
    run: Settings, recipe: str | None, overrides: Sequence[str], render: dict[str, Any], lossless: bool
) -> Settings:
    if recipe not in (None, "auto"):
        run = with_overrides(run, render=load_settings(recipe, "render", tuple(overrides)).render.model_dump())
    chosen = {name: value for name, value in render.items() if value is not None}
    if lossless:
        if chosen.get("codec") not in (None, "ffv1", "png"):
            raise UsageError(f"--lossless cannot go with --codec {chosen['codec']}; choose ffv1 or png.")
        chosen.setdefault("codec", "ffv1")
    return with_overrides(run, render=chosen)


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
    identity = _identity(source, weights, settings, texts, track, dilate, invert, stride)
    directory = _directory(out, identity, resume)
    fresh = not directory.exists()
    work = directory / WORK
    work.mkdir(parents=True, exist_ok=True)
    _write_atomic(work / "identity", identity.encode())
    for stale in directory.glob(".*.tmp"):  # of a render that was killed
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    try:
        result = _run(source, inpainter, mask, texts, directory, work, settings, checkpoint, track, touched)
    except (UsageError, DataError):
        if fresh:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(work)
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
    work: Path,
    settings: Settings,
    checkpoint: str,
    track: str | None,
    touched: list[int],
) -> RenderResult:
    render, started = settings.render, time.monotonic()
    still = source.kind == "image"
    codec = ("png" if render.codec != "gif" else "gif") if still else render.codec
    inpainter.store = _Store(work / "windows")
    journey = _Journey(render.steps)
    inpainter.callback = journey.see
    closeness, album = Closeness(), _Album(touched)
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
    if len(journey.pictures) > 1:
        journey.write(directory, source)
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
    _write_atomic(directory / "config.toml", settings_toml(settings).encode())
    _report(result, settings, directory, still)
    _write_atomic(directory / "result.json", (json.dumps(asdict(result), indent=1) + "\n").encode())
    return result


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


def _identity(source: VideoSource, weights: str, settings: Settings, *rest: Any) -> str:
    """What must be equal for finished windows to be used again."""
    digest = hashlib.sha256()
    files = [source.path] if source.path.is_file() else sorted(source.files)
    texts = rest[0]
    for text in texts:  # drawn masks may change under the same name
        path = Path(text)
        files += [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else []
    for file in files:
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    look = settings.render.model_dump(exclude={"codec", "crf", "mask"})  # these change no window
    digest.update(json.dumps([weights, look, settings.seed, rest], default=str, sort_keys=True).encode())
    return digest.hexdigest()


def _directory(out: Path | None, identity: str, resume: str) -> Path:
    """The folder of an interrupted render of the same thing, or a new one."""
    workspace = Workspace.here()
    if resume not in ("auto", "never"):
        raise UsageError(f"--resume {resume}: a render knows auto and never; name its folder with --out.")
    candidates = [out] if out is not None else sorted((workspace.folder / "runs").glob("render-*"), reverse=True)
    for folder in candidates:
        file = folder / WORK / "identity"
        if file.is_file():
            if resume == "auto" and file.read_text() == identity:
                say(f"Continuing the interrupted render in {folder}.")
                return folder
            if out is not None and resume == "never":
                shutil.rmtree(folder)  # it holds an unfinished render and nothing else
            elif out is not None:
                raise UsageError(
                    f"--out {out} holds an interrupted render of something else; name another folder or --resume never."
                )
    return workspace.new_run_directory("render", out)


def _single(folder: Path) -> Path:
    """A folder with one picture becomes the picture."""
    file = folder.with_suffix(".png")
    if folder.is_dir():
        os.replace(folder / "00000.png", file)
        folder.rmdir()
        return file
    return folder


class _Album:
    """A few of the frames in which something is hidden, evenly spread, for the sheet."""

    def __init__(self, touched: list[int]) -> None:
        places = np.linspace(0, len(touched) - 1, min(SHEET_COLUMNS, len(touched)))
        self.numbers = {touched[place] for place in places.round().astype(int)}
        self.frames: list[Frame] = []

    def add(self, frame: Frame) -> None:
        if frame.number in self.numbers:
            self.frames.append(frame)

    def sheet(self, title: str) -> np.ndarray:
        rows = [
            ("source", [frame.source for frame in self.frames]),
            ("masked", [frame.masked() for frame in self.frames]),
            ("MAE's one step", [frame.one_step() for frame in self.frames]),
            ("result", [frame.result() for frame in self.frames]),
        ]
        return contact_sheet(rows, [f"frame {frame.number}" for frame in self.frames], title)

    def uncertainty(self, title: str) -> np.ndarray:
        samples = len(next((frame.filled for frame in self.frames if frame.filled), [0]))
        maps = [spread([frame.result(k) for k in range(samples)]) for frame in self.frames]
        highest = max(max(float(np.percentile(one, 99.8)) for one in maps), 1.0)
        rows = [("source", [frame.source for frame in self.frames])]
        rows += [(f"sample {k + 1}", [frame.result(k) for frame in self.frames]) for k in range(min(samples, 3))]
        rows += [("spread", [heat(one, highest) for one in maps])]
        sheet = contact_sheet(rows, [f"frame {frame.number}" for frame in self.frames], title)
        legend = colour_bar(sheet.shape[1], highest, "of 255, standard deviation")
        return np.concatenate([sheet, legend], axis=0)


class _Journey:
    """How the first window takes shape: four frames of it at each denoising step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.pictures: list[list[np.ndarray]] = []

    def see(self, window: int, step: int, frames: list[Frame], x0: np.ndarray) -> None:
        if window == 0 and step == len(self.pictures):
            chosen = sorted(set(np.linspace(0, len(x0) - 1, 4).round().astype(int).tolist()))
            self.pictures.append([x0[i] for i in chosen])

    def write(self, directory: Path, source: VideoSource) -> None:
        height, width = self.pictures[0][0].shape[:2]
        movie: Writer | None = None
        try:
            for step, pictures in enumerate(self.pictures):
                labels = [f"step {step + 1} of {len(self.pictures)}", *[""] * (len(pictures) - 1)]
                panels = Panels(labels, height, width)
                if movie is None:
                    movie = _still_rate_writer(directory, panels.size)
                movie.write(panels.compose(pictures), step)
            for extra in range(10):  # rest on the result
                movie.write(panels.compose(pictures), len(self.pictures) + extra)
            movie.close()
        except BaseException:
            if movie is not None:
                movie.abort()
            raise


def _still_rate_writer(directory: Path, size: tuple[int, int]) -> Writer:
    from fractions import Fraction

    from diffmae_video.rendering.video import VideoWriter

    return VideoWriter(directory / "trajectory.mp4", size, Fraction(1, 10), Fraction(10))


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
        report.video("Source, masked, one step, result", directory / "comparison.mp4")
        if Path(result.video).suffix in (".mp4", ".gif"):
            report.video("Result", result.video)
    report.image("Frames", directory / "sheet.png")
    for name, title in (("uncertainty.png", "Uncertainty"),):
        if (directory / name).is_file():
            report.image(title, directory / name)
    if (directory / "trajectory.mp4").is_file():
        report.video("From the first step to the sample", directory / "trajectory.mp4")
    report.settings(settings_toml(settings))
    report.write(directory / "report.html")


def _write_atomic(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
