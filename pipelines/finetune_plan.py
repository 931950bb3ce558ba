"""What a fine-tuning will do, decided before the first step: data, weights, recipe, model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from diffmae_video.config import Settings, load_settings, read_recipe, recipe_chain, recipe_names, with_overrides
from diffmae_video.config.settings import DataSettings
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.order import label_subset
from diffmae_video.errors import DataError, UsageError
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.encoder import Encoder
from diffmae_video.pipelines import console
from diffmae_video.pipelines.classifiers import CLIP_FACTS, FIXED_BY_WEIGHTS
from diffmae_video.pipelines.find import find_init, find_task_shards
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.plan import Plan, check_plan, make_plan, print_plan
from diffmae_video.pipelines.recipes import choose_recipe, planned_device, planned_world
from diffmae_video.pipelines.tasks import open_task_shards
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training.finetuning import freeze_first
from diffmae_video.training.footprint import Footprint, measure_step, shapes_only
from diffmae_video.training.hardware import parse_memory
from diffmae_video.training.task import need_clips

_ENCODER = ("preset", "width", "depth", "heads", "frames", "size", "tubelet", "patch", "positions")


@dataclass(frozen=True)
class FinetunePlan:
    """Everything that was decided before the first step."""

    task: str
    source: str | None  # None = scratch
    recipe: str
    settings: Settings
    manifest: Manifest

    @property
    def facts(self) -> dict[str, Any]:
        """What model.json says about the run."""
        return {
            "task": self.task,
            "dataset": self.manifest.dataset,
            "classes": self.manifest.classes,
            "recipe": self.recipe,
            "init": self.source or "scratch",
            "protocol": self.settings.finetune.protocol,
            "frames": 1 if self.manifest.kind == "image" else self.settings.model.frames,
            "size": list(self.settings.model.size),
            **{key: value for key in CLIP_FACTS if (value := getattr(self.settings.data, key))},
        }


def plan_finetune(job: Job, task: str, init: str = "auto", protocol: str | None = None) -> FinetunePlan:
    """Decide everything, saying what was picked and why; the arguments are those of `finetune`."""
    configured = None
    if job.recipe != "auto" and job.data is None:
        configured = load_settings(job.recipe, "finetune").data.path
    path, origin = find_task_shards(job, task, configured)
    manifest = open_task_shards(task, path, origin)
    console.say(f"Data: {manifest.root} ({origin}).")
    source, line = find_init(init)
    console.say(line)
    description = _read_description(source) if source else None
    name, why = _choose_recipe(job, task, description, manifest)
    console.say(f"Recipe: {name} ({why}).")
    settings = load_settings(name, "finetune", job.overrides)
    tested = load_settings(name, "evaluate", job.overrides).evaluate
    held_out = manifest.held_out(settings.data.eval_split)
    changes: dict[str, Any] = {
        "data": {"path": manifest.root, "sources": [], "eval_split": held_out},
        "evaluate": tested.model_dump(),
    }
    if protocol:
        changes["finetune"] = {"protocol": protocol}
    if job.seed is not None:
        changes["seed"] = job.seed
    if description:
        changes["model"] = _model_of_weights(description["model"], settings, name, job.overrides, source)
    settings = with_overrides(settings, **changes)
    check_probe(settings.finetune.protocol, settings.finetune.pool, settings.model.class_token)
    _check_labels(settings, manifest)
    if source is None:
        _tell_other_model(settings)
    if settings.finetune.protocol == "finetune":
        clips = training_samples(manifest, settings.data) * settings.data.repeats
        need_clips(settings, clips, planned_world(job))
    return FinetunePlan(task, source, name, settings, manifest)


def _tell_other_model(settings: Settings) -> None:
    """Say where the model from scratch is another one than that of the newest pre-training: they are often compared."""
    entry = Workspace.here().latest("pretrain")
    try:
        known = _read_description(entry.path)["model"] if entry else {}
    except (DataError, KeyError, UsageError):
        return
    own = settings.model.model_dump(mode="json")
    other = [f"model.{key}={known[key]}" for key in _ENCODER if known.get(key, own[key]) != own[key]]
    if entry and other:
        console.say(
            f"Note: the newest pre-training ({entry.path}) has {', '.join(other)}; for a comparison with it, give "
            "the same with --set."
        )


def check_probe(protocol: str, pool: str, class_token: bool) -> None:
    """Refuse what cannot be probed before anything is computed."""
    if pool == "class" and not class_token:
        raise UsageError("finetune.pool=class: this encoder has no class token; use mean or attentive.")
    if protocol == "attentive" and pool == "class":
        raise UsageError("finetune.pool=class: the attentive probe pools by attention; leave finetune.pool out.")


def _check_labels(settings: Settings, manifest: Manifest) -> None:
    """Both splits must be there with labels, and, for fine-tuning, all of the training split."""
    for key, split in (("split", settings.data.split), ("eval_split", settings.data.eval_split)):
        if not manifest.splits.get(split):
            known = ", ".join(manifest.splits) or "none"
            raise DataError(f"{manifest.root} has no split {split} (it has {known}); set data.{key} to one of them.")
        if (manifest.samples(split).label < 0).all():
            raise DataError(f"Split {split} of {manifest.root} has no labels; choose another with data.{key}.")
    unlabelled = int((manifest.samples(settings.data.split).label < 0).sum())
    if unlabelled and settings.finetune.protocol == "finetune":
        raise DataError(
            f"{unlabelled} samples of {settings.data.split} in {manifest.root} have no label; shard them apart."
        )


def _read_description(source: str) -> dict[str, Any]:
    """model.json of a run; the weights themselves are read later, by the process that trains."""
    import json

    path = Path(source) if Path(source).is_dir() else Path(source).parent
    try:
        return dict(json.loads((path / "model.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(
            f"--init {source} holds no model.json: give a run or export of ours, or turn another project's file into "
            "one with `diffmae import`."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'model.json'} cannot be read ({error}); copy or make it again.") from error


def _choose_recipe(job: Job, task: str, description: dict[str, Any] | None, manifest: Manifest) -> tuple[str, str]:
    if job.recipe != "auto":
        return job.recipe, "chosen by --recipe"
    place = planned_device(job).type
    if description and place == "cuda":
        own = f"finetune-{task}-{description['model'].get('preset')}"
        if own in recipe_names():
            return own, "the peers' settings for this task and model size"
    of_run = (description or {}).get("info", {}).get("recipe")
    if of_run in recipe_names() and read_recipe(of_run).summary:
        return of_run, "the recipe of the pre-training run"
    for path in (Path(of_run), Workspace.here().folder / of_run) if of_run else ():
        # a user's own recipe, if it says how to fine-tune: its [train] alone is about pre-training
        if path.is_file() and any("finetune" in part.stages for part in recipe_chain(str(path))):
            return str(path), "the recipe of the pre-training run"
    return choose_recipe("finetune", manifest, place, manifest.kind)


def _model_of_weights(
    model: dict[str, Any], settings: Settings, recipe: str, overrides: Sequence[str], source: str | None
) -> dict[str, Any]:
    """The checkpoint's model, with what [stage.finetune.model] of the recipe and --set change of it.

    A recipe's plain [model] describes pre-training; the weights have decided that already.
    """
    keys = {key for part in recipe_chain(recipe) for key in part.stages.get("finetune", {}).get("model", {})}
    for text in overrides:
        section, _, key = text.partition("=")[0].strip().partition(".")
        if section == "model":
            keys.add(key.partition(".")[0])
    merged = dict(model)
    for key in keys:
        value = settings.model.model_dump(mode="json")[key]
        if key in FIXED_BY_WEIGHTS and model.get(key, value) != value:
            raise UsageError(f"model.{key} = {value}: the weights of {source} have {model.get(key)}; leave it out.")
        merged[key] = value
    return merged


def describe_plan(plan: FinetunePlan, job: Job) -> None:
    """Say what will be done."""
    settings = plan.settings
    counts = f"{plan.manifest.splits[settings.data.split]} training videos of {len(plan.manifest.classes)} classes"
    if settings.data.label_fraction < 1 or settings.data.labels_per_class:
        counts += f", {training_samples(plan.manifest, settings.data)} of their labels"
    size, train = "x".join(map(str, settings.model.size)), settings.train
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    work = f"{length} of {train.batch_size} clips"
    if settings.finetune.protocol != "finetune":
        work = f"one pass for the features{f', {work}' if settings.finetune.protocol == 'attentive' else ''}"
    console.say(
        f"Plan: {settings.finetune.protocol} of {settings.model.preset} at {settings.model.frames}x{size}, {counts}, "
        f"{work} on {planned_device(job).type}."
    )


def training_samples(manifest: Manifest, data: DataSettings) -> int:
    """How many samples of the training split are used: those of `data.label_fraction` and `data.labels_per_class`."""
    if data.label_fraction >= 1 and not data.labels_per_class:
        return manifest.splits[data.split]
    labels, seed = manifest.samples(data.split).label, 0  # the number is the same for every seed
    chosen = label_subset(labels, data.label_fraction, data.labels_per_class, seed)
    return manifest.splits[data.split] if chosen is None else max(1, len(chosen))


def predict_plan(plan: FinetunePlan, job: Job) -> Plan:
    """FLOPs, memory and hours of a fine-tuning, or of the pass over the data that a probe costs; shown as a table.

    A probe reads every video of both splits once, in the forward pass alone; fitting its head costs little beside that.
    """
    settings, manifest, data = plan.settings, plan.manifest, plan.settings.data
    probes = settings.finetune.protocol != "finetune"
    world, splits = planned_world(job), [data.split]
    samples = training_samples(manifest, data)
    if probes:
        splits.append(data.eval_split)
        samples += manifest.splits[data.eval_split]
        batch = settings.evaluate.batch_views * world
        once = {"steps": None, "epochs": 1.0, "batch_size": batch, "accumulate": 1, "sharding": "ddp", "ema": 0.0}
        settings = with_overrides(settings, data={"repeats": 1}, train=once)

    def measured(changed: Settings, clips: int) -> Footprint:
        return measure_classifier(changed, manifest, clips)

    predicted = make_plan(
        settings,
        samples,
        sum(shard.bytes for shard in manifest.shards if shard.split in splits),
        world=world,
        device=planned_device(job),
        memory=parse_memory(job.device_memory) if job.device_memory else None,
        measured=measured,
    )
    print_plan(predicted, world)
    if not probes:
        check_plan(predicted, settings, world, measured, free_model=plan.source is None)
    return predicted


def measure_classifier(settings: Settings, manifest: Manifest, clips: int) -> Footprint:
    """Cost of a step with `clips` clips: of everything that is trained, or, of a probe, of the head alone."""
    tuning, clips = settings.finetune, max(1, clips)
    frames = 1 if manifest.kind == "image" else settings.model.frames
    with shapes_only():
        encoder = Encoder(settings.model)
        model = Classifier(encoder, len(manifest.classes), tuning.pool, tuning.dropout, tuning.drop_path).train()
        freeze_first(model, tuning.freeze)
        if tuning.protocol != "finetune":
            encoder.requires_grad_(False)
        pixels = torch.empty(clips, 3, frames, *settings.model.size)  # (B, C, T, H, W)
        labels = torch.zeros(clips, dtype=torch.long)
        return measure_step(model, lambda: F.cross_entropy(model(pixels), labels), settings.train, clips)
