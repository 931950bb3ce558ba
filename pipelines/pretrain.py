"""`diffmae pretrain`: DiffMAE on shards of videos, images, or a mix of both."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffmae_video.config import load_settings
from diffmae_video.errors import Stopped, UsageError
from diffmae_video.pipelines import console
from diffmae_video.pipelines.find import find_first_weights
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.run import launch, launches, open_run
from diffmae_video.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from diffmae_video.pipelines.plan import Plan

Kind = Literal["video", "image", "joint"]


@dataclass(frozen=True)
class PretrainResult:
    """What a pre-training came to; `plan` alone of a dry run."""

    directory: Path | None
    step: int = 0
    total: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    plan: Plan | None = None
    task: str | None = None
    """Name of the labels of its data; None where there are none."""


def pretrain(job: Job, kind: Kind = "video", throughput: float | None = None, init: str = "scratch") -> PretrainResult:
    """Pre-train a model, continuing an interrupted run of the same settings and data where there is one.

    Args:
        job: `data` names shards (several for `joint`, with commas between them); without it `data.path`, then the
            workspace. `recipe="auto"` chooses by data, device and kind.
        kind: `video`, `image`, or `joint` (sources from `data.sources`, or all that `job.data` names).
        throughput: clips a second, for the predicted time of a dry run.
        init: weights to start from (`models.initial`): `scratch`, a path, or a name on a hub (`models.hub`).

    Raises:
        UsageError, DataError: what cannot be done as asked; Stopped after a signal; DiffmaeError where training fails.
    """
    if throughput and not job.dry_run:
        raise UsageError(
            f"--throughput {throughput:g} is for plans: add --dry-run; a training measures its rate itself."
        )
    _expect_data(job, kind)
    source = find_first_weights(init)
    if launches(job):
        return launch(pretrain, job, kind, throughput, init)

    from diffmae_video.models.initial import initial_sha256
    from diffmae_video.pipelines.plan import settle_parts
    from diffmae_video.pipelines.pretrain_plan import plan_pretrain, predict_pretrain, useful_flops
    from diffmae_video.pipelines.run_report import write_run_report
    from diffmae_video.registry import tasks
    from diffmae_video.training.distributed import start
    from diffmae_video.training.loop import train
    from diffmae_video.training.run import run_identity
    from diffmae_video.training.task import TaskSetup

    settings, recipe, manifests = plan_pretrain(job, kind)
    if job.dry_run:
        return PretrainResult(None, plan=predict_pretrain(settings, job, manifests, throughput))
    dataset = "+".join(manifest.dataset for manifest in manifests)
    classes = manifests[0].classes if len(manifests) == 1 else []
    facts = {"dataset": dataset, "classes": classes, "recipe": recipe, "media": kind}
    data = "+".join(manifest.hash for manifest in manifests)
    if source is not None:
        facts["init"] = init
        data += f" from {initial_sha256(source)}"
    identity = run_identity(settings, "pretrain", data)
    with start(job.device) as processes, open_run(job, identity, processes, finished="yield") as run:
        task = tasks.get(settings.train.task or "pretrain").build(
            TaskSetup(settings, processes, facts, source, console.say)
        )
        try:
            flops = useful_flops(settings) if run.main else None
            parts = settle_parts(settings, processes)
            here = replace(run, report=write_run_report, flops_per_clip=flops, parts=parts)
            result = train(task, settings, here)
        except Stopped:
            if (run.directory / "weights.safetensors").exists():
                run.record(dataset=dataset, media=kind)
            raise
        run.record(dataset=dataset, media=kind)
    labelled = dataset if classes else None
    return PretrainResult(run.directory, result.step, result.total, result.metrics, result.seconds, task=labelled)


def _expect_data(job: Job, kind: Kind) -> None:
    """Say at once, before anything heavy is imported, that there is no such recipe or setting, or that no shards are
    known; a recipe may name them."""
    if job.recipe != "auto":
        load_settings(job.recipe, "pretrain", job.overrides)
    if job.data is not None and "://" not in job.data:
        from diffmae_video.data.manifest import MANIFEST, Manifest

        for place in job.data.split(","):
            if not (Path(place) / MANIFEST).exists():
                Manifest.load(place)  # raises, and says what to do
    if job.recipe == "auto" and job.data is None and kind != "joint" and job.override("data.path") is None:
        Workspace.here().require("shards", "--data", media=kind)


def print_pretrain(result: PretrainResult) -> None:
    """Say what came of it and where it lies."""
    if result.directory is not None:
        loss = result.metrics.get("loss")
        shown = "" if loss is None else f", loss {loss:.4g}"
        console.say(
            f"Done: step {result.step} of {result.total}{shown}; weights and report.html in {result.directory}."
        )
        first = "diffmae features" if result.task is None else f"diffmae finetune --task {shlex.quote(result.task)}"
        console.say(f"Look at report.html, then: {first}, or diffmae render-inpaint CLIP to see what it fills in.")
