"""`diffmae finetune --task NAME`: a classifier on a pre-trained encoder, by the training loop of pre-training."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffmae_video.pipelines import console
from diffmae_video.pipelines.find import find_init, find_task_shards
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.run import RunFolder, launch, launches, open_run

if TYPE_CHECKING:
    import torch

    from diffmae_video.config import Settings
    from diffmae_video.pipelines.classifiers import Loaded
    from diffmae_video.pipelines.finetune_plan import FinetunePlan
    from diffmae_video.training.footprint import Footprint

_SHOWN = ("loss", "train_top1", "val_loss", "val_top1", "val_top5")


@dataclass(frozen=True)
class FinetuneResult:
    """A fine-tuning run."""

    directory: Path
    task: str
    init: str  # `scratch`, or where the weights came from
    step: int
    metrics: dict[str, float] = field(default_factory=dict)


def finetune(job: Job, task: str, init: str = "auto", protocol: str | None = None) -> FinetuneResult | None:
    """Train a classifier on the training split of a task, or probe a frozen encoder.

    Args:
        job: `data` names shards; the workspace's newest of the task by default. `recipe="auto"` takes the peers' for
            this task and model size on a GPU, else that of the pre-training run, else what fits the device.
        task: data set name, as its shards say.
        init: `auto` (the workspace's newest pre-training), `scratch`, or a run, export or import of `diffmae import`.
        protocol: `finetune`, `linear`, `attentive` or `knn`; the recipe's by default.

    Returns:
        The run; None for a dry run, which prints FLOPs, memory and hours.

    Raises:
        UsageError, DataError: see the messages.
    """
    if job.recipe == "auto":  # else the recipe may name the shards
        find_task_shards(job, task)
    find_init(init)
    if launches(job):
        return launch(finetune, job, task, init, protocol)

    from diffmae_video.pipelines.finetune_plan import describe_plan, plan_finetune, predict_plan

    plan = plan_finetune(job, task, init, protocol)
    describe_plan(plan, job)
    if job.dry_run:
        predict_plan(plan, job)
        return None

    from diffmae_video.training.distributed import start
    from diffmae_video.training.run import run_identity

    with start(job.device) as processes:
        probes = plan.settings.finetune.protocol != "finetune"
        identity = run_identity(plan.settings, "finetune", f"{plan.manifest.hash} from {_digest(plan.source)}")
        with open_run(job, identity, processes, finished="refuse" if probes else "yield") as run:
            result = (_probe if probes else _train)(plan, run)
            facts = {"task": task, "dataset": plan.manifest.dataset, "init": plan.facts["init"]}
            if plan.settings.finetune.protocol == "knn":
                run.mark_finished()  # it leaves no classifier
            else:
                run.finish(**facts)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    console.say(f"Done: {result.directory} ({shown}).")
    if plan.settings.finetune.protocol != "knn":  # which leaves no classifier
        console.say(f"Next: diffmae eval --task {shlex.quote(task)}.")
    return result


def _train(plan: FinetunePlan, run: RunFolder) -> FinetuneResult:
    """Fine-tune through the training loop."""
    from diffmae_video.pipelines.finetune_plan import measure_classifier
    from diffmae_video.pipelines.plan import settle_parts
    from diffmae_video.pipelines.run_report import write_run_report
    from diffmae_video.registry import tasks
    from diffmae_video.training.loop import train
    from diffmae_video.training.task import TaskSetup

    assert run.processes is not None
    setup = TaskSetup(plan.settings, run.processes, plan.facts, plan.source, console.say)
    task = tasks.get(plan.settings.train.task or "finetune").build(setup)

    def cost(settings: Settings, clips: int) -> Footprint:
        return measure_classifier(settings, plan.manifest, clips)

    parts = settle_parts(plan.settings, run.processes, cost, free_model=plan.source is None)
    result = train(task, plan.settings, replace(run, report=write_run_report, parts=parts))
    metrics = {key: result.metrics[key] for key in _SHOWN if key in result.metrics}
    return FinetuneResult(run.directory, plan.task, plan.facts["init"], result.step, metrics)


def _probe(plan: FinetunePlan, run: RunFolder) -> FinetuneResult:
    """Probe the frozen encoder."""
    from diffmae_video.pipelines.probe import probe

    assert run.processes is not None
    metrics = probe(run, _frozen(plan, run.processes.device), plan.manifest, plan.facts)
    return FinetuneResult(run.directory, plan.task, plan.facts["init"], 0, metrics)


def _digest(source: str | None) -> str:
    from diffmae_video.models.weights import saved_sha256

    return "scratch" if source is None else saved_sha256(source)


def _frozen(plan: FinetunePlan, device: torch.device) -> Loaded:
    """The model a probe looks at."""
    from diffmae_video.models.classifier import Classifier
    from diffmae_video.models.encoder import Encoder
    from diffmae_video.models.weights import load_model
    from diffmae_video.pipelines.classifiers import Loaded

    settings, digest = plan.settings, _digest(plan.source)
    if plan.source is None:
        model = Classifier(Encoder(settings.model, settings.seed), 0)
        digest = f"scratch {settings.seed} {settings.model}"
    else:
        model = load_model(plan.source)
    return Loaded(model.to(device).eval().requires_grad_(False), settings, dict(model.info), digest, device)
