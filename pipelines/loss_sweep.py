"""`diffmae loss-sweep RUN`: denoising error by timestep and mask ratio, which tells whether training works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffmae_video.errors import DataError
from diffmae_video.pipelines import console
from diffmae_video.pipelines.find import find_run
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.workspace import Workspace

RATIOS = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class LossSweep:
    """Mean squared error on masked patches, in the units of the model's target."""

    directory: Path | None
    timesteps: tuple[int, ...]  # 0-based, ascending
    errors: dict[str, tuple[float, ...]]  # mask ratio -> error at each timestep
    mean_prediction: dict[str, float]  # mask ratio -> error of predicting each clip's mean masked patch
    signal: tuple[float, ...]  # share of signal power at each timestep
    clips: int


def loss_sweep(
    job: Job, run: str | Path | None = None, clips: int = 64, steps: int = 11, ratios: Sequence[float] = ()
) -> LossSweep | None:
    """Measure the training loss at fixed timesteps on clips of the evaluation split.

    The same masks and noise are used at every timestep, so that points of a curve differ by the timestep alone.

    Args:
        job: `data` names shards; those the run was trained on by default. `out` is the folder for loss_sweep.json,
            loss_sweep.png and report.html.
        run: pre-training run; `job.checkpoint`, then the workspace's newest, by default.
        clips: how many clips, from the start of the split.
        steps: timesteps, from the first to the last, spread evenly over the angle between clean and noise.
        ratios: mask ratios; those in RATIOS and the run's own by default.

    Raises:
        UsageError, DataError: no run, no data, or weights that do not denoise.
    """
    source, line = find_run("pretrain", run or job.checkpoint)
    console.say(line)

    import torch

    from diffmae_video.config import with_overrides
    from diffmae_video.data.manifest import Manifest
    from diffmae_video.data.stream import build_stream
    from diffmae_video.masking import make_mask
    from diffmae_video.models.patches import grid_shape
    from diffmae_video.pipelines.classifiers import load
    from diffmae_video.training.hardware import pick_device

    place = pick_device(job.device)
    loaded = load(source, place, job.overrides, job.seed)
    settings, model = loaded.settings, loaded.model
    if loaded.info.get("kind") != "diffmae":
        raise DataError(f"{source} is a classifier, which denoises nothing; give a pre-training run.")
    model.feature_decoder = None  # the sweep is over what is denoised
    path = job.data or settings.data.path or Workspace.here().require("shards", "--data").path
    split = Manifest.load(path).held_out(settings.data.eval_split)
    settings = with_overrides(settings, data={"path": str(path), "sources": [], "eval_split": split})
    ratios = tuple(ratios) or tuple(sorted({*RATIOS, settings.mask.ratio}))
    last = len(model.schedule) - 1
    timesteps = model.schedule.respace(steps).timesteps.tolist()  # dense where the signal goes, as samplers take them
    if not model.objective.noise:
        timesteps = [last]  # it has no timestep: one point
    batch = max(1, min(clips, 16))
    console.say(
        f"Loss at {len(timesteps)} timesteps and mask ratios {', '.join(map(str, ratios))} on up to {clips} clips of "
        f"{settings.data.eval_split}, {path}."
    )
    if job.dry_run:
        return None
    directory = Workspace.here().new_run_directory("loss-sweep", job.out)
    totals = {ratio: [0.0] * len(timesteps) for ratio in ratios}
    means = dict.fromkeys(ratios, 0.0)
    seen = 0
    stream = build_stream(settings, split=settings.data.eval_split, batch_size=batch, training=False)
    with stream, torch.inference_mode(), console.progress(clips, "loss-sweep", "clips") as bar:
        for part in stream:
            kept = part.clips[: clips - seen].to(place)
            pixels = loaded.prepare(kept)  # (B, C, T, H, W)
            shape = grid_shape(*pixels.shape[2:], tubelet=settings.model.tubelet, patch=settings.model.patch)
            seeds = part.seeds[: len(kept)]
            for ratio in ratios:
                mask = make_mask("random", ratio, shape, seeds).to(place)
                draw = model.draw(seeds, mask)
                for index, timestep in enumerate(timesteps):
                    fixed = draw._replace(timestep=torch.full_like(draw.timestep, timestep))
                    with loaded.autocast():
                        output = model(pixels, mask, fixed)
                    totals[ratio][index] += output.per_sample.double().sum().item()
                means[ratio] += _mean_error(model, pixels, mask).sum().item()
            seen += len(kept)
            bar.update(len(kept))
            if seen >= clips:
                break
    if not seen:
        raise DataError(f"Split {settings.data.eval_split} of {path} holds no clip; choose one with data.eval_split.")
    result = LossSweep(
        directory,
        tuple(timesteps),
        {str(ratio): tuple(total / seen for total in totals[ratio]) for ratio in ratios},
        {str(ratio): means[ratio] / seen for ratio in ratios},
        tuple(model.schedule.alphas_bar[timesteps].tolist()),
        seen,
    )
    _write(result, source)
    console.table(f"Denoising error, {seen} clips", ["timestep", "signal", *map(str, ratios)], _rows(result))
    console.say(f"Wrote {directory}/report.html.")
    return result


def _mean_error(model, pixels, mask):
    """Squared error (B,) of the mean of each clip's masked patches: what predicting without looking reaches."""
    from diffmae_video.models.patches import gather_tokens, patchify

    hidden = gather_tokens(patchify(pixels, model.tubelet, model.patch), mask.masked)  # (B, M, P)
    hidden = model.target.from_pixels(hidden)
    return (hidden - hidden.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2)).double()


def _rows(result: LossSweep) -> list[list[float]]:
    columns = list(result.errors.values())
    return [
        [timestep, round(result.signal[index], 4), *(round(column[index], 5) for column in columns)]
        for index, timestep in enumerate(result.timesteps)
    ]


def _write(result: LossSweep, source: str) -> None:
    from dataclasses import asdict

    from diffmae_video.evaluation.predictions import write_json
    from diffmae_video.rendering.figures import sweep_figure
    from diffmae_video.rendering.report import Report

    directory = result.directory
    assert directory is not None  # a dry run writes nothing
    directory.mkdir(parents=True, exist_ok=True)
    picture = sweep_figure(result.timesteps, dict(result.errors), result.signal, result.mean_prediction)
    (directory / "loss_sweep.png").write_bytes(picture)
    report = Report("Denoising error by timestep and mask ratio")
    report.text(
        f"Run `{source}`, {result.clips} clips. A model that uses the noisy patch has a small error at early "
        "timesteps; at the last timestep, where no signal is left, it can only predict from what is visible, as an "
        "MAE does. "
        "Curves that stay flat say that the decoder ignores the noisy patch; curves at the level of the clip's mean "
        "patch (dashed) say that it ignores everything."
    )
    report.image("Error", picture)
    report.table("Error", ["timestep", "signal", *result.errors], _rows(result))
    means = [[ratio, round(error, 5)] for ratio, error in result.mean_prediction.items()]
    report.table("Error of each clip's mean masked patch", ["mask ratio", "error"], means)
    report.write(directory / "report.html")
    write_json(directory / "loss_sweep.json", asdict(result) | {"directory": str(directory), "run": source})
