"""The work of `evaluate_inpainting.evaluate_inpainting`: clips inpainted by every method, scored, written down."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

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
    Motion,
    PerceptualMetrics,
    cosine_distance,
    frechet_distance,
    to_frames,
)
from diffmae_video.masking import Mask, parse_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import denormalize_pixels, normalize_pixels
from diffmae_video.pipelines.console import progress, say, table
from diffmae_video.pipelines.inpaint_report import (
    BEST,
    MEAN,
    ONE_STEP,
    SAMPLE,
    TITLES,
    InpaintingEvaluation,
    Pictures,
    describe_conventions,
    read_inpainting,
    table_rows,
    write_inpainting,
)
from diffmae_video.pipelines.inpainters import check_steps, load_inpainter
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.run import open_run
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training.hardware import autocast

PICTURED = 4
"""Clips that are shown under each mask."""


@dataclass(frozen=True)
class _Plan:
    """Everything an evaluation needs, found and checked before anything is made."""

    model: DiffMAE
    device: torch.device
    settings: Settings
    maskers: dict[str, Callable[[Sequence[int]], Mask]]
    """Mask text -> function from seeds to a Mask."""
    wanted: list[int]
    """Samples of the split."""


@dataclass(frozen=True)
class _Clip:
    """A clip of the split, as results are compared with it."""

    frames: np.ndarray
    """uint8 (T, H, W, 3)."""
    described: np.ndarray | None
    """Deep features of the frames."""
    motion: Motion


@dataclass
class _Score:
    """Sums of one method under one mask."""

    closeness: Closeness = field(default_factory=Closeness)
    features: list[np.ndarray] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    warping: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)

    def add(self, clip: _Clip, result: np.ndarray, hidden: np.ndarray, perceptual: PerceptualMetrics) -> None:
        """Count a result uint8 (T, H, W, 3) whose pixels `hidden` bool (T, H, W) were filled."""
        for before, after, hole in zip(clip.frames, result, hidden, strict=True):
            self.closeness.add(before, after, hole)
        self.warping.append(clip.motion.warping_error(result))
        if perceptual.features is not None and clip.described is not None:
            described = perceptual.features(result)
            self.features.append(described)
            self.distances += cosine_distance(clip.described, described).tolist()
        if perceptual.lpips is not None:
            self.lpips.append(perceptual.lpips(clip.frames, result))

    def figures(self, originals: list[np.ndarray]) -> dict[str, float | None]:
        """The columns of the table; `originals` are the features of all clips."""
        deep = bool(self.features)
        return {
            **self.closeness.figures(),
            "features": float(np.mean(self.distances)) if deep else None,
            "frechet": frechet_distance(np.concatenate(originals), np.concatenate(self.features)) if deep else None,
            "warping": float(np.mean(self.warping)) * 1e3,
            "lpips": float(np.mean(self.lpips)) if self.lpips else None,
        }


def measure_inpainting(job: Job, masks: str | Sequence[str] | None, deep: bool) -> InpaintingEvaluation | None:
    """See `evaluate_inpainting.evaluate_inpainting`."""
    source, model, loaded = load_inpainter(job)
    explicit = job.override("data.path")
    path = job.data or explicit or Workspace.here().require("shards", "--data").path
    manifest = Manifest.load(path)
    held_out = manifest.held_out(loaded.settings.data.eval_split)
    settings = with_overrides(
        loaded.settings,
        data={"path": path, "sources": (), "workers": 0, "repeats": 1, "eval_split": held_out},
        model=model.settings.model_dump(),
    )
    check_steps(settings)
    plan = _plan(model, loaded.device, settings, manifest, masks)
    if job.dry_run:
        return None
    digest = hashlib.sha256(f"{loaded.weights_sha256} {manifest.hash} {settings_toml(settings)}".encode())
    digest.update(json.dumps([list(plan.maskers), deep]).encode())
    with open_run(
        job, {"kind": "eval", "data": digest.hexdigest()}, finished="refuse" if job.resume == "never" else "yield"
    ) as run:
        if run.earlier.get("status") == "finished":
            say(f"{run.directory} holds this evaluation already: done before.")
            return read_inpainting(run.directory)
        started = time.monotonic()
        perceptual = PerceptualMetrics.load(loaded.device) if deep else PerceptualMetrics()
        if deep and perceptual.lpips is None:
            say("LPIPS is left out: its AlexNet (hub/checkpoints in TORCH_HOME) is not here.")
        scores, pictures = _measure(plan, perceptual)
        result = InpaintingEvaluation(
            directory=str(run.directory),
            checkpoint=str(source),
            data=str(path),
            clips=len(plan.wanted),
            seed=settings.seed,
            sampler=settings.render.sampler,
            steps=settings.render.steps,
            samples=settings.evaluate.samples,
            size=(settings.model.frames, *settings.model.size),
            seconds=round(time.monotonic() - started, 1),
            conventions=describe_conventions(settings, len(plan.wanted), perceptual),
            scores=scores,
        )
        write_inpainting(result, settings, pictures)
        run.finish(task="inpaint", checkpoint=str(source))
    for text, methods in result.scores.items():
        table(f"Mask {text}", ["method", *TITLES.values()], table_rows(methods))
    say(result.conventions)
    say(f"Written to {result.directory}.")
    return result


def _plan(
    model: DiffMAE, device: torch.device, settings: Settings, manifest: Manifest, masks: str | Sequence[str] | None
) -> _Plan:
    texts = list(settings.evaluate.masks) if masks is None else masks.split(",") if isinstance(masks, str) else masks
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not texts:
        raise UsageError("--masks is empty; name masks such as random:0.75,center,tube:0.9.")
    maskers = {text: _masker(text, model) for text in texts}
    split = settings.data.eval_split
    count = len(manifest.samples(split, "data.eval_split"))
    wanted = sorted(set(np.linspace(0, count - 1, min(settings.evaluate.clips, count)).round().astype(int).tolist()))
    say(
        f"Data: {settings.data.path}, {len(wanted)} of {count} clips of {split}. Masks: {', '.join(texts)}. "
        f"{settings.render.sampler}, {settings.render.steps} steps, {settings.evaluate.samples} samples a clip."
    )
    return _Plan(model, device, settings, maskers, wanted)


def _masker(text: str, model: DiffMAE) -> Callable[[Sequence[int]], Mask]:
    settings, tubelet = model.settings, _tubelet(model)
    height, width = settings.size
    grid = settings.frames // tubelet, height // settings.patch, width // settings.patch
    try:
        return parse_mask(text, grid, tubelet, settings.patch)
    except ValueError as error:
        raise UsageError(f"--masks {text}: {error}.") from error


def _tubelet(model: DiffMAE) -> int:
    return model.settings.tubelet if model.settings.frames > 1 else 1


def _measure(
    plan: _Plan, perceptual: PerceptualMetrics
) -> tuple[dict[str, dict[str, dict[str, float | None]]], Pictures]:
    """Figures by mask and method, and pictures of the first clips."""
    settings, model = plan.settings, plan.model
    scores: dict[str, dict[str, _Score]] = {text: {} for text in plan.maskers}
    pictures: Pictures = {text: [] for text in plan.maskers}
    originals: list[np.ndarray] = []
    with progress(len(plan.wanted) * len(plan.maskers), "eval inpaint", "clips") as line:
        for number, pixels in enumerate(_clips(settings, plan.wanted)):
            frames = to_frames(pixels[None])[0]
            described = perceptual.features(frames) if perceptual.features else None
            clip = _Clip(frames, described, Motion(frames))
            if described is not None:
                originals.append(described)
            for text, masker in plan.maskers.items():
                mask = masker([settings.seed + number])
                hidden = mask.pixels(_tubelet(model), model.settings.patch)[0].numpy()  # bool (T, H, W)
                results = _results(plan, pixels, mask, hidden, settings.seed + number)
                for name, result in results.items():
                    scores[text].setdefault(name, _Score()).add(clip, result, hidden, perceptual)
                if number < PICTURED:
                    middle = len(frames) // 2
                    shown = {name: result[middle] for name, result in results.items() if name != BEST}
                    masked = np.where(hidden[middle][..., None], np.uint8(127), frames[middle])
                    pictures[text].append({"source": frames[middle], "masked": masked, **shown})
                line.update(1)
    figures = {
        text: {name: score.figures(originals) for name, score in methods.items()} for text, methods in scores.items()
    }
    return figures, pictures


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


def _results(plan: _Plan, clip: Tensor, mask: Mask, hidden: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Every method's answer for a clip: uint8 (T, H, W, 3), pasted into the source."""
    render, norm, count = plan.settings.render, plan.model.settings.pixel_norm, plan.settings.evaluate.samples
    first = last = None
    with torch.inference_mode(), autocast(plan.device, render.precision):
        for step in plan.model.sample_steps(
            normalize_pixels(clip[None].to(plan.device), norm),
            mask.to(plan.device),
            seeds=[seed],
            sampler=render.sampler,
            steps=render.steps,
            eta=render.eta,
            samples=count,
        ):
            first, last = step.clips() if first is None else first, step
        assert first is not None
        assert last is not None
        outputs, one_step = (
            to_frames(denormalize_pixels(clips.float(), norm)) for clips in (last.clips(), first)
        )  # (K, T, H, W, 3)
    source = to_frames(clip[None])[0]
    results = {SAMPLE: outputs[0], ONE_STEP: one_step[0]}
    if count > 1:
        errors = ((outputs.astype(np.float32) - source) ** 2)[:, hidden].mean((1, 2))
        mean = outputs.astype(np.float32).mean(0).round().astype(np.uint8)
        results |= {MEAN: mean, BEST: outputs[int(errors.argmin())]}
    results |= {name: baseline(source, hidden) for name, baseline in BASELINES.items()}
    return {name: np.where(hidden[..., None], result, source) for name, result in results.items()}
