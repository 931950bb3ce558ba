"""`diffmae eval --task inpaint`: score inpainting over a data set, beside the baselines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffmae_video.config import Settings, settings_toml, with_overrides
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.stream import build_stream
from diffmae_video.errors import UsageError
from diffmae_video.evaluation.image_metrics import Closeness
from diffmae_video.evaluation.inpainting import (
    BASELINES,
    DeepFeatures,
    Motion,
    cosine_distance,
    frechet_distance,
    load_lpips,
    to_frames,
)
from diffmae_video.files import write_atomic
from diffmae_video.masking import Mask, parse_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import denormalize_pixels, grid_shape, normalize_pixels
from diffmae_video.pipelines.console import progress, say, table
from diffmae_video.pipelines.inpainters import check_steps, load_inpainter
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.rendering.report import Report
from diffmae_video.rendering.sheet import contact_sheet
from diffmae_video.rendering.video import write_png
from diffmae_video.training.hardware import autocast

SAMPLE, MEAN, BEST, ONE_STEP = (
    "DiffMAE, one sample",
    "DiffMAE, mean of samples",
    "DiffMAE, best of samples",
    "MAE's one step",
)
COLUMNS = ("psnr_masked", "ssim_masked", "psnr_full", "ssim_full", "features", "frechet", "warping", "lpips")
TITLES = {
    "psnr_masked": "PSNR hidden", "ssim_masked": "SSIM hidden", "psnr_full": "PSNR full", "ssim_full": "SSIM full",
    "features": "feature dist.", "frechet": "Frechet", "warping": "warp err. x1e3", "lpips": "LPIPS",
}  # fmt: skip
PICTURED = 4


@dataclass(frozen=True)
class InpaintingEvaluation:
    """What was measured; also written as inpaint.json. `scores[mask][method][column]`."""

    directory: str
    checkpoint: str
    data: str
    clips: int
    seed: int
    sampler: str
    steps: int
    samples: int
    size: tuple[int, ...]
    seconds: float
    conventions: str
    scores: dict[str, dict[str, dict[str, float | None]]]


@dataclass(frozen=True)
class _Judges:
    """Networks that look at results; absent ones leave their columns empty."""

    features: DeepFeatures | None = None
    lpips: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


@dataclass
class _Score:
    """Sums of one method under one mask."""

    closeness: Closeness = field(default_factory=Closeness)
    features: list[np.ndarray] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    warping: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)


def evaluate_inpainting(
    *,
    checkpoint: str | Path | None = None,
    data: str | None = None,
    masks: str | Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    deep: bool = True,
    dry_run: bool = False,
) -> InpaintingEvaluation | None:
    """Inpaint clips of a split under each mask and compare with the source, beside one step and the baselines.

    Args:
        checkpoint: a pre-training run; the workspace's newest without it.
        data: shards; those of the workspace without it.
        masks: masks over the token grid, as a list or a text with commas; `evaluate.masks` without it.
        overrides: `section.field=value`; `evaluate.clips`, `evaluate.samples`, `render.steps`, ...
        out: folder for inpaint.json, config.toml, pictures and report.html.
        deep: also measure feature, Frechet and LPIPS distances; without them no network but the model runs.

    Raises:
        UsageError: no model, no data, an unknown mask, or, with `deep`, no feature network.
    """
    source, loaded = load_inpainter(checkpoint, device, overrides, seed)
    model, target = loaded.model, loaded.device
    explicit = any(text.startswith("data.path") for text in overrides)
    path = (
        data or (loaded.settings.data.path if explicit else None) or Workspace.here().require("shards", "--data").path
    )
    settings = with_overrides(
        loaded.settings,
        data={"path": path, "sources": (), "workers": 0, "repeats": 1},
        model=model.settings.model_dump(),
    )
    check_steps(settings)
    texts = _mask_texts(masks, settings)
    model_settings = model.settings
    tubelet = model_settings.tubelet if model_settings.frames > 1 else 1
    shape = grid_shape(model_settings.frames, *model_settings.size, tubelet, model_settings.patch)
    makers = {text: _maker(text, shape, model) for text in texts}
    count = len(Manifest.load(path).samples(settings.data.eval_split))
    wanted = _spread(count, settings.evaluate.clips)
    say(
        f"Data: {path}, {len(wanted)} of {count} clips of {settings.data.eval_split}. Masks: {', '.join(texts)}. "
        f"{settings.render.sampler}, {settings.render.steps} steps, {settings.evaluate.samples} samples a clip."
    )
    if dry_run:
        return None
    directory = Workspace.here().new_run_directory("eval", out)
    started = time.monotonic()
    judges = _Judges(DeepFeatures(target), load_lpips()) if deep else _Judges()
    if deep and judges.lpips is None:
        say("LPIPS is left out: the lpips package or its AlexNet (hub/checkpoints in TORCH_HOME) is not here.")
    scores: dict[str, dict[str, _Score]] = {text: {} for text in texts}
    originals: list[np.ndarray] = []
    pictures: dict[str, list[dict[str, np.ndarray]]] = {text: [] for text in texts}
    with progress(len(wanted) * len(texts), "eval inpaint", "clips") as line:
        for number, clip in enumerate(_clips(settings, wanted)):
            frames = to_frames(clip[None])[0]  # uint8 (T, H, W, 3)
            original = judges.features(frames) if judges.features else None
            if original is not None:
                originals.append(original)
            motion = Motion(frames)
            for text, maker in makers.items():
                mask = maker([settings.seed + number])
                hidden = mask.pixels(tubelet, model_settings.patch)[0].numpy()  # bool (T, H, W)
                results = _results(model, clip, mask, hidden, settings, settings.seed + number, target)
                for name, result in results.items():
                    score = scores[text].setdefault(name, _Score())
                    _count(score, frames, result, hidden, original, motion, judges)
                if number < PICTURED:
                    middle = len(frames) // 2
                    shown = {name: result[middle] for name, result in results.items() if name != BEST}
                    masked = np.where(hidden[middle][..., None], np.uint8(127), frames[middle])
                    pictures[text].append({"source": frames[middle], "masked": masked, **shown})
                line.update(1)
    figures = {
        text: {name: _figures(score, originals) for name, score in methods.items()} for text, methods in scores.items()
    }
    result = InpaintingEvaluation(
        directory=str(directory),
        checkpoint=str(source),
        data=str(path),
        clips=len(wanted),
        seed=settings.seed,
        sampler=settings.render.sampler,
        steps=settings.render.steps,
        samples=settings.evaluate.samples,
        size=(model_settings.frames, *model_settings.size),
        seconds=round(time.monotonic() - started, 1),
        conventions=_conventions(settings, len(wanted), judges),
        scores=figures,
    )
    _write(result, settings, directory, pictures)
    Workspace.here().record("eval", directory, task="inpaint", checkpoint=str(source))
    for text, methods in figures.items():
        table(f"Mask {text}", ["method", *TITLES.values()], _rows(methods))
    say(result.conventions)
    say(f"Written to {directory}.")
    return result


def _mask_texts(masks: str | Sequence[str] | None, settings: Settings) -> list[str]:
    if masks is None:
        return list(settings.evaluate.masks)
    texts = masks.split(",") if isinstance(masks, str) else list(masks)
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not texts:
        raise UsageError("--masks is empty; name masks such as random:0.75,center,tube:0.9.")
    return texts


def _maker(text: str, shape: tuple[int, int, int], model: DiffMAE) -> Callable[[Sequence[int]], Mask]:
    try:
        return parse_mask(text, shape, model.settings.tubelet, model.settings.patch)
    except ValueError as error:
        raise UsageError(f"--masks {text}: {error}.") from error


def _spread(count: int, wanted: int) -> list[int]:
    return sorted(set(np.linspace(0, count - 1, min(wanted, count)).round().astype(int).tolist()))


def _clips(settings: Settings, wanted: list[int]) -> Iterator[Tensor]:
    """The wanted clips of the split, uint8 (T, C, H, W): centre clip, centre crop."""
    chosen = set(wanted)
    stream = build_stream(settings, split=settings.data.eval_split, batch_size=8, training=False)
    try:
        for batch in stream:
            for clip, sample in zip(batch.clips, batch.samples.tolist(), strict=True):
                if sample in chosen:
                    yield clip
            if batch.samples.max() >= wanted[-1]:
                return
    finally:
        stream.close()


def _results(
    model: DiffMAE, clip: Tensor, mask: Mask, hidden: np.ndarray, settings: Settings, seed: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Every method's answer for a clip: uint8 (T, H, W, 3), pasted into the source."""
    render, norm = settings.render, model.settings.pixel_norm
    count = settings.evaluate.samples
    with torch.inference_mode(), autocast(device, render.precision):
        first = None
        for last in model.sample_steps(
            normalize_pixels(clip[None].to(device), norm),
            mask.to(device),
            seeds=[seed],
            sampler=render.sampler,
            steps=render.steps,
            eta=render.eta,
            samples=count,
        ):
            first = first or last
    source = to_frames(clip[None])[0]
    outputs = to_frames(denormalize_pixels(last.clips().float(), norm))  # (K, T, H, W, 3)
    one_step = to_frames(denormalize_pixels(first.clips().float(), norm))[0]
    mean = outputs.astype(np.float32).mean(0).round().astype(np.uint8)
    errors = ((outputs.astype(np.float32) - source) ** 2)[:, hidden].mean((1, 2))
    results = {SAMPLE: outputs[0], ONE_STEP: one_step}
    if count > 1:
        results |= {MEAN: mean, BEST: outputs[int(errors.argmin())]}
    results |= {name: baseline(source, hidden) for name, baseline in BASELINES.items()}
    return {name: np.where(hidden[..., None], result, source) for name, result in results.items()}


def _count(
    score: _Score,
    source: np.ndarray,
    result: np.ndarray,
    hidden: np.ndarray,
    original: np.ndarray | None,
    motion: Motion,
    judges: _Judges,
) -> None:
    for before, after, hole in zip(source, result, hidden, strict=True):
        score.closeness.add(before, after, hole)
    score.warping.append(motion.warping_error(result))
    if judges.features is not None:
        described = judges.features(result)
        score.features.append(described)
        score.distances += cosine_distance(original, described).tolist()
    if judges.lpips is not None:
        score.lpips += judges.lpips(source, result).tolist()


def _figures(score: _Score, originals: list[np.ndarray]) -> dict[str, float | None]:
    deep = bool(score.features)
    return {
        **score.closeness.figures(),
        "features": float(np.mean(score.distances)) if deep else None,
        "frechet": frechet_distance(np.concatenate(originals), np.concatenate(score.features)) if deep else None,
        "warping": float(np.mean(score.warping)) * 1e3,
        "lpips": float(np.mean(score.lpips)) if score.lpips else None,
    }


def _rows(methods: dict[str, dict[str, float | None]]) -> list[list[object]]:
    return [
        [name, *("-" if figures[key] is None else figures[key] for key in COLUMNS)] for name, figures in methods.items()
    ]


def _conventions(settings: Settings, clips: int, judges: _Judges) -> str:
    height, width = settings.model.size
    deep = (
        "Feature distance: 1 - cosine of pooled EfficientNet-Lite0 features; Frechet: between the same features of all "
        "frames (small sets bias it upwards; compare within the table only). "
    )
    return (
        f"{clips} clips of {settings.model.frames} frames at {width}x{height}, stride {settings.data.stride}, centre "
        f"crop, seed {settings.seed}, {settings.evaluate.samples} samples a clip; results pasted into the source. PSNR "
        "and SSIM (Gaussian window 11, sigma 1.5), uint8 RGB: hidden region pooled over all hidden pixels, full frame "
        "averaged over frames (100 dB where nothing is hidden); best of samples: by hidden PSNR against the source. "
        + (deep if judges.features else "")
        + "Warping error: mean squared, values in [0, 1], times 1000. "
        + ("LPIPS: AlexNet, v0.1, full frame." if judges.lpips else "LPIPS: not measured (weights not present).")
    )


def _write(
    result: InpaintingEvaluation, settings: Settings, directory: Path, pictures: dict[str, list[dict[str, np.ndarray]]]
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    report = Report("Inpainting evaluation")
    report.text(result.conventions)
    for text, methods in result.scores.items():
        rows = [[name, *(figures[key] for key in COLUMNS)] for name, figures in methods.items()]
        report.table(f"Mask {text}", ["method", *TITLES.values()], rows)
        shown = pictures[text]
        if shown:
            grid = [(name, [clip[name] for clip in shown]) for name in shown[0]]
            sheet = contact_sheet(grid, [f"clip {n + 1}" for n in range(len(shown))], f"Mask {text}, middle frames")
            file = directory / f"{text.replace(':', '-').replace(',', '-')}.png"
            write_png(file, sheet)
            report.image(f"Mask {text}", file)
    report.settings(settings_toml(settings))
    report.write(directory / "report.html")
    (directory / "config.toml").write_text(settings_toml(settings), encoding="utf-8")
    write_atomic(directory / "inpaint.json", json.dumps(asdict(result), indent=1) + "\n")
