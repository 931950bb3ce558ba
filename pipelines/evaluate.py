"""`diffmae eval --task NAME`: multi-view classification of a split, resumable, over any number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmae_video.errors import UsageError
from diffmae_video.pipelines import console
from diffmae_video.pipelines.find import find_run, find_task_shards
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.run import launch, launches, open_run

if TYPE_CHECKING:
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


def evaluate(job: Job, task: str, views: str | None = None, protocol: str = "head") -> EvaluateResult | None:
    """Classify every video of the evaluation split, each decoded once for all its views.

    Args:
        job: `checkpoint` names a fine-tuning run or weights, the workspace's newest of the task by default; `data`
            shards, the workspace's newest of the task by default; `overrides` change the settings saved with the
            checkpoint. An unfinished evaluation of the same is continued.
        task: data set name.
        views: protocols such as `7x3` or `1x1,5x3`; the data set's usual ones by default.
        protocol: `head`, the classifier's; or `denoise`, by what a pre-training with `model.labels` generates: the
            label under which it denoises best (`evaluation.denoising`).

    Returns:
        The scores; also written as eval.json, predictions.parquet, classes.csv, confusion.png, mistakes.png and
        report.html. None for a dry run, and on all ranks but the first.

    Raises:
        UsageError, DataError: nothing to evaluate, labels that do not fit, too many unreadable videos.
    """
    job.resume_auto_or_never()
    denoise = protocol == "denoise"
    source, line = find_run("pretrain" if denoise else "finetune", job.checkpoint, None if denoise else task)
    path, origin = find_task_shards(job, task)
    if launches(job):
        return launch(evaluate, job, task, views, protocol)
    console.say(line)

    from diffmae_video.pipelines.classifiers import load_classifier, load_denoiser
    from diffmae_video.pipelines.eval_pass import classify_split, conclude, plan_evaluation
    from diffmae_video.pipelines.tasks import open_task_shards
    from diffmae_video.training.distributed import start

    manifest = open_task_shards(task, path, origin)
    console.say(f"Data: {manifest.root} ({origin}).")
    with start(job.device) as processes:
        load = load_denoiser if denoise else load_classifier
        loaded = load(source, processes.device, job.overrides, job.seed)
        plan = plan_evaluation(source, loaded, manifest, views, processes)
        if job.dry_run:
            return None
        with open_run(job, {"kind": "eval", "data": plan.fingerprint}, processes) as run:
            store = classify_split(plan, run)
            if not run.main:
                return None
            result = conclude(plan, store, run.directory)
            run.finish(task=task, dataset=manifest.dataset, top1=result.top1, top5=result.top5)
            return result


def evaluate_task(
    job: Job, task: str, *, views: str | None = None, masks: str | None = None, protocol: str | None = None
) -> None:
    """`eval --task NAME`: the test that the task asks for, its result printed.

    Args:
        job: as the test wants it.
        task: a data set's name, `inpaint` or `propagate`.
        views: of classification, e.g. `7x3`.
        masks: of inpainting, e.g. `center,tube:0.9`.
        protocol: of classification, `head` or `denoise`.

    Raises:
        UsageError: an option that is another test's.
    """
    if task not in ("inpaint", "propagate"):
        if masks is not None:
            raise UsageError(f"--masks {masks} is for --task inpaint: leave it out for --task {task}.")
        if (result := evaluate(job, task, views, protocol or "head")) is not None:
            print_evaluation(result)
        return
    if protocol is not None:
        raise UsageError(f"--protocol {protocol} is for classification: leave it out for --task {task}.")
    if views is not None:
        raise UsageError(f"--views {views} is for classification: leave it out for --task {task}.")
    if task == "propagate":
        if masks is not None:
            raise UsageError(f"--masks {masks} is for --task inpaint: leave it out for --task propagate.")
        from diffmae_video.pipelines.evaluate_propagation import evaluate_propagation

        evaluate_propagation(job)
        return
    from diffmae_video.pipelines.evaluate_inpainting import evaluate_inpainting

    evaluate_inpainting(job, masks=masks)


def print_evaluation(result: EvaluateResult) -> None:
    """Print the accuracies and where the files are."""
    from diffmae_video.pipelines.eval_report import accuracy_rows

    videos = result.report["videos"]
    title = f"{result.task}: {videos['used']} videos used of {videos['found']} found, {videos['failed']} failed"
    rank = list(result.scores.values())[-1].top5_rank
    columns = ["views", "top-1 %", "95% interval", f"top-{rank} %", "mean class %"]
    console.table(title, columns, accuracy_rows(result.scores))
    for key, reason in list(result.failed.items())[:5]:
        console.say(f"Failed: {key}: {reason}")
    if len(result.failed) > 5:
        console.say(f"... and {len(result.failed) - 5} more, in eval.json.")
    console.say(f"Wrote {result.directory}/eval.json and report.html in {result.report['seconds']:.0f} s.")
