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
from diffmae_video.pipelines.tasks import check_classes, default_views, find_task_data
from diffmae_video.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from diffmae_video.config import Settings
    from diffmae_video.data.shards import Manifest
    from diffmae_video.evaluation.metrics import ClassificationScores
    from diffmae_video.evaluation.predictions import Predictions

MOST_CONFIDENT = 8  # mistakes in the picture strip


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

        return launch(_evaluate, arguments, nproc)
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
            f"of {split}; {loaded.precision} on {processes.device.type}, {processes.world} process(es)."
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
    _write(directory, report, predictions, scores, dataset, settings)
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


def _write(
    directory: Path,
    report: dict[str, Any],
    predictions: Predictions,
    scores: dict[str, ClassificationScores],
    dataset: Any,
    settings: Any,
) -> None:
    """Write every file of an evaluation; eval.json last, for it says that the others are whole."""
    from diffmae_video.config import settings_toml
    from diffmae_video.evaluation.figures import confusion_figure, mistakes, strip_picture
    from diffmae_video.evaluation.predictions import FILE, write_json, write_predictions
    from diffmae_video.rendering.report import Report

    views, last = list(scores.items())[-1]
    (directory / "config.toml").write_text(settings_toml(settings), encoding="utf-8")
    write_predictions(directory / FILE, predictions)
    rows = _class_rows(last, predictions)
    _write_csv(directory / "classes.csv", rows)
    confusion = confusion_figure(last.confusion, predictions.classes, f"{report['task']}, {views}")
    (directory / "confusion.png").write_bytes(confusion)
    page = Report(f"Evaluation of {report['task']}: {report['top1'] * 100:.2f}% top-1")
    page.text(
        f"Checkpoint `{report['checkpoint']}` on `{report['data']}`, split {report['split']}. Videos: "
        f"{report['videos']['used']} used of {report['videos']['found']} found, {report['videos']['failed']} failed, "
        f"{report['videos']['unlabelled']} without a label."
    )
    page.table("Accuracy, %", ["views", "top-1", "95% interval", "top-5", "mean class"], accuracy_rows(scores))
    wrong = mistakes(predictions.probabilities[views], predictions.labels, MOST_CONFIDENT)
    if wrong:
        strip = _mistake_strip(dataset, predictions, views, wrong, strip_picture)
        (directory / "mistakes.png").write_bytes(strip)
        page.image("The most confident mistakes", strip)
    page.image("Confusion", confusion)
    page.table("By class, worst first", ["class", "videos", "top-1 %", "most often taken for"], rows)
    if report["failed"]:
        page.table("Videos that could not be read", ["key", "reason"], list(report["failed"].items()))
    page.settings(settings_toml(settings))
    page.write(directory / "report.html")
    write_json(directory / "eval.json", report)


def accuracy_rows(scores: dict[str, ClassificationScores]) -> list[list[Any]]:
    """One row per protocol: views, top-1, its interval, top-5, mean class accuracy; in percent."""
    return [
        [
            views,
            round(one.top1 * 100, 2),
            f"{one.top1_interval.low * 100:.2f} to {one.top1_interval.high * 100:.2f}" if one.top1_interval else "-",
            round(one.top5 * 100, 2),
            round(one.mean_class_accuracy * 100, 2),
        ]
        for views, one in scores.items()
    ]


def _class_rows(scores: ClassificationScores, predictions: Predictions) -> list[list[Any]]:
    rows = []
    for index, name in enumerate(predictions.classes):
        count = int(scores.support[index])
        if count:
            others = scores.confusion[index].clone()
            others[index] = 0
            confused = predictions.classes[int(others.argmax())] if others.max() else "-"
            rows.append([name, count, round(scores.per_class[index].item() * 100, 2), confused])
    return sorted(rows, key=lambda row: (row[2], row[0]))


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    import csv

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "videos", "top1_percent", "most_often_taken_for"])
        writer.writerows(rows)


def _mistake_strip(dataset: Any, predictions: Predictions, views: str, wrong: list[int], draw: Any) -> bytes:
    """Pictures of the videos in these rows of the predictions, each with what it is and what it was taken for."""
    from diffmae_video.data.shards import ShardReader
    from diffmae_video.evaluation.classify import ViewSettings, decode_views
    from diffmae_video.evaluation.views import Protocol

    table = dataset.manifest.samples(dataset.split)
    wanted = {predictions.keys[row]: row for row in wrong}
    places = {table.key(index): index for block in dataset.blocks for index in block if table.key(index) in wanted}
    settings = dataset.settings
    one = ViewSettings((Protocol(1, 1),), settings.frames, settings.stride, settings.size)
    clips, captions = [], []
    with ShardReader(dataset.manifest, *dataset._cache) as reader:
        for key, row in wanted.items():
            clips.append(decode_views(reader.read(dataset.split, places[key], meta=False).data, one).view(0))
            probability, taken = predictions.probabilities[views][row].max(dim=0)
            truth = predictions.classes[int(predictions.labels[row])]
            captions.append(f"{truth}\ntaken for {predictions.classes[int(taken)]}\n({probability:.0%}) {key[:24]}")
    return draw(clips, captions)
