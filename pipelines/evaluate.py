"""`diffmae eval --task NAME`: multi-view classification of a split, resumable, over any number of processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmae_video._version import __version__
from diffmae_video.errors import DataError, Stopped
from diffmae_video.pipelines import console
from diffmae_video.pipelines.classifiers import find_run, load_classifier
from diffmae_video.pipelines.eval_report import accuracy_rows, write_evaluation
from diffmae_video.pipelines.tasks import check_classes, default_views, find_task_data
from diffmae_video.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from diffmae_video.config import Settings
    from diffmae_video.data.shards import Manifest
    from diffmae_video.evaluation.metrics import ClassificationScores


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation found; `views` maps each protocol to its scores."""

    directory: Path | None
    task: str
    top1: float  # of the last protocol, fraction
    top5: float
    found: int
    used: int
    failed: dict[str, str]  # key -> reason
    scores: dict[str, ClassificationScores]
    report: dict[str, Any]  # what eval.json holds


def evaluate(
    task: str,
    *,
    checkpoint: str | Path | None = None,
    data: str | Path | None = None,
    views: str | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    resume: str = "auto",
    nproc: int = 1,
    dry_run: bool = False,
) -> EvaluateResult | None:
    """Classify every video of the evaluation split, each decoded once for all its views.

    Args:
        task: data set name.
        checkpoint: fine-tuning run or weights; the workspace's newest of the task by default.
        data: shards; the workspace's newest of the task by default.
        views: protocols such as `7x3` or `1x1,5x3`; the data set's usual ones by default.
        overrides: `section.field=value`, on top of the settings saved with the checkpoint.
        out: folder of the results; an unfinished evaluation of the same is continued.
        resume: `never` starts over.
        nproc: processes on this machine.
        dry_run: print the plan and make nothing; returns None.

    Returns:
        The scores; also written as eval.json, predictions.parquet, classes.csv, confusion.png, mistakes.png and
        report.html.

    Raises:
        UsageError, DataError: nothing to evaluate, labels that do not fit, too many unreadable videos.
    """
    arguments = {
        "task": task,
        "checkpoint": checkpoint,
        "data": data,
        "views": views,
        "overrides": list(overrides),
        "seed": seed,
        "device": device,
        "out": out,
        "resume": resume,
        "dry_run": dry_run,
    }
    if nproc > 1 and not dry_run:
        from diffmae_video.training.distributed import launch

        return launch(_evaluate, nproc, **arguments)
    return _evaluate(**arguments)


def _evaluate(
    task: str,
    checkpoint: str | Path | None,
    data: str | Path | None,
    views: str | None,
    overrides: Sequence[str],
    seed: int | None,
    device: str,
    out: Path | None,
    resume: str,
    dry_run: bool,
) -> EvaluateResult | None:
    """The part of one process."""
    from diffmae_video.evaluation.classify import SplitViews, ViewSettings, run_pass, videos_per_block
    from diffmae_video.evaluation.records import PassStore
    from diffmae_video.evaluation.views import parse_views
    from diffmae_video.training.distributed import start
    from diffmae_video.training.signals import stop_on_signal

    with start(device) as processes, stop_on_signal() as stop:
        source, line = find_run("finetune", checkpoint, task)
        console.say(line)
        loaded = load_classifier(source, processes.device, overrides, seed)
        settings = loaded.settings
        manifest, line = find_task_data(task, data, override_of(overrides, "data.path"))
        console.say(line)
        check_classes(source, loaded.classes, manifest)
        split = settings.data.eval_split
        labels = manifest.samples(split).label
        samples = [index for index in range(len(labels)) if labels[index] >= 0]
        if not samples:
            raise DataError(
                f"Split {split} of {manifest.root} has no labelled sample; choose one with data.eval_split."
            )
        protocols = parse_views(views or settings.evaluate.views or default_views(manifest))
        frames = 1 if manifest.kind == "image" else settings.model.frames
        view_settings = ViewSettings(protocols, frames, settings.data.stride, settings.model.size)
        facts = {
            "version": __version__,
            "weights": loaded.weights_sha256,
            "data": manifest.hash,
            "split": split,
            "views": asdict(view_settings),
            "batch_views": settings.evaluate.batch_views,
            "model": settings.model.model_dump(mode="json"),
            "precision": loaded.precision,
            "device": processes.device.type,
        }
        fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        names, size = ",".join(map(str, protocols)), "x".join(map(str, settings.model.size))
        console.say(
            f"Views: {names} of {frames} frames, stride {settings.data.stride}, {size} pixels; {len(samples)} videos "
            f"of {split}; {loaded.precision} on {processes.device.type}, {processes.world} "
            f"process{'es' if processes.world > 1 else ''}."
        )
        if dry_run:
            return None
        directory = Path(processes.broadcast(str(_directory(out, fingerprint, resume)) if processes.main else None))
        dataset = SplitViews(
            manifest,
            split,
            view_settings,
            samples,
            videos_per_block(protocols, settings.evaluate.batch_views),
            settings.data.cache_dir,
            settings.data.cache_gib,
        )
        store = PassStore(directory, fingerprint, processes.rank)
        mine = range(processes.rank, len(dataset), processes.world)
        before = sum(len(dataset.blocks[block]) for block in store.done().intersection(mine))
        if before:
            console.say(f"Continuing {directory}: {before} videos are done.")
        with console.progress(sum(len(dataset.blocks[block]) for block in mine), "eval", "videos") as bar:
            bar.update(before)

            def advance(videos: int, failed: int) -> None:
                bar.update(videos)
                if stop:
                    store.flush()
                    raise Stopped(f"Stopped by {stop.name}; run the same command again to continue {directory}.")

            run_pass(
                loaded.probabilities,
                dataset,
                store,
                batch_views=settings.evaluate.batch_views,
                device=processes.device,
                workers=settings.data.workers,
                rank=processes.rank,
                world=processes.world,
                advance=advance,
            )
        processes.barrier()
        if not processes.main:
            return None
        return _finish(
            task, source, directory, store, manifest, split, dataset, settings, facts, fingerprint, len(labels)
        )


def print_evaluation(result: EvaluateResult) -> None:
    """Print the accuracies and where the files are."""
    videos = result.report["videos"]
    title = f"{result.task}: {videos['used']} videos used of {videos['found']} found, {videos['failed']} failed"
    columns = ["views", "top-1 %", "95% interval", f"top-{_last(result.scores).top5_rank} %", "mean class %"]
    console.table(title, columns, accuracy_rows(result.scores))
    for key, reason in list(result.failed.items())[:5]:
        console.say(f"Failed: {key}: {reason}")
    if len(result.failed) > 5:
        console.say(f"... and {len(result.failed) - 5} more, in eval.json.")
    console.say(f"Wrote {result.directory}/eval.json and report.html in {result.report['seconds']:.0f} s.")


def _last(scores: dict[str, ClassificationScores]) -> ClassificationScores:
    return list(scores.values())[-1]


def override_of(overrides: Sequence[str], key: str) -> str | None:
    """The text that `--set key=...` gives, the last one."""
    values = [text.partition("=")[2].strip().strip('"') for text in overrides if text.partition("=")[0].strip() == key]
    return values[-1] if values else None


def _directory(out: Path | None, fingerprint: str, resume: str) -> Path:
    """The folder of this evaluation: the unfinished one of the same fingerprint, or a new one."""
    workspace = Workspace.here()
    part = f"partial-{fingerprint[:16]}"
    candidates = [out] if out is not None else sorted((workspace.folder / "runs").glob("eval-*"), reverse=True)
    for folder in candidates:
        if (folder / part).is_dir() and not (folder / "eval.json").exists():
            if resume != "never":
                return folder
            import shutil

            shutil.rmtree(folder / part)
    directory = workspace.new_run_directory("eval", out)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _finish(
    task: str,
    source: str,
    directory: Path,
    store: Any,
    manifest: Manifest,
    split: str,
    dataset: Any,
    settings: Settings,
    facts: dict[str, Any],
    fingerprint: str,
    rows: int,
) -> EvaluateResult:
    """Collect what all processes found, score it, write the files."""
    import torch

    from diffmae_video.evaluation.metrics import classification_scores
    from diffmae_video.evaluation.predictions import Predictions

    samples, failed, seconds = store.summary()
    found = sum(len(block) for block in dataset.blocks)
    if len(samples) + len(failed) != found:
        raise RuntimeError(f"{found} videos were to be evaluated, {len(samples) + len(failed)} were")
    table = manifest.samples(split)
    reasons = {table.key(index): failed[index] for index in sorted(failed)}
    if len(failed) > settings.data.max_bad_fraction * found or len(samples) == 0:
        key, reason = next(iter(reasons.items()))
        raise DataError(
            f"{len(failed)} of {found} videos cannot be read, more than data.max_bad_fraction allows; the first is "
            f"{key} ({reason.rstrip('.')}); repair the shards or raise data.max_bad_fraction: what is done is kept."
        )
    labels = torch.tensor([int(table.label[index]) for index in samples])
    keys = [table.key(index) for index in samples]
    values = {views: store.collect(views) for views in map(str, dataset.settings.protocols)}
    predictions = Predictions(keys, labels, manifest.classes, values)
    scores = {
        views: classification_scores(values[views], labels, bootstrap=settings.evaluate.bootstrap, seed=settings.seed)
        for views in values
    }
    last = _last(scores)
    report = {
        "task": task,
        "dataset": manifest.dataset,
        "split": split,
        "top1": last.top1,
        "top5": last.top5,
        "mean_class_accuracy": last.mean_class_accuracy,
        "views": {views: _numbers(one) for views, one in scores.items()},
        "videos": {"found": rows, "unlabelled": rows - found, "used": len(samples), "failed": len(failed)},
        "failed": reasons,
        "classes": len(manifest.classes),
        "frames": dataset.settings.frames,
        "stride": dataset.settings.stride,
        "size": list(dataset.settings.size),
        "checkpoint": source,
        "weights_sha256": facts["weights"],
        "data": manifest.root,
        "data_hash": manifest.hash,
        "settings_hash": fingerprint,
        "device": facts["device"],
        "precision": facts["precision"],
        "bootstrap": settings.evaluate.bootstrap,
        "seed": settings.seed,
        "seconds": round(seconds, 3),
        "version": __version__,
    }
    write_evaluation(directory, report, predictions, scores, dataset, settings)
    store.remove()
    Workspace.here().record("eval", directory, task=task, dataset=manifest.dataset, top1=last.top1, top5=last.top5)
    return EvaluateResult(directory, task, last.top1, last.top5, found, len(samples), reasons, scores, report)


def _numbers(scores: ClassificationScores) -> dict[str, Any]:
    names = ("top1", "top5", "top5_rank", "mean_class_accuracy")
    intervals = {
        name: [interval.low, interval.high] if interval else None
        for name, interval in (("top1_interval", scores.top1_interval), ("top5_interval", scores.top5_interval))
    }
    return {name: getattr(scores, name) for name in names} | intervals
