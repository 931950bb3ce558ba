"""What a fine-tuning will do, decided before the first step: data, weights, recipe, model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmae_video.config import Settings, load_settings, read_recipe, recipe_chain, recipe_names, with_overrides
from diffmae_video.errors import DataError, UsageError
from diffmae_video.pipelines import console
from diffmae_video.pipelines.classifiers import FIXED_BY_WEIGHTS
from diffmae_video.pipelines.evaluate import override_of
from diffmae_video.pipelines.probe import check_probe
from diffmae_video.pipelines.recipes import choose_recipe
from diffmae_video.pipelines.tasks import find_task_data
from diffmae_video.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from diffmae_video.data.shards import Manifest
    from diffmae_video.pipelines.plan import Plan
    from diffmae_video.training.footprint import Footprint


@dataclass(frozen=True)
class FinetunePlan:
    """Everything that was decided before the first step."""

    task: str
    source: str | None  # None = scratch
    recipe: str
    settings: Settings
    manifest: Manifest


def plan_finetune(
    task: str,
    init: str,
    protocol: str | None,
    data: str | Path | None,
    recipe: str,
    overrides: Sequence[str],
    seed: int | None,
    device: str,
) -> FinetunePlan:
    """Decide everything, saying what was picked and why; the arguments are those of `finetune`."""
    configured = override_of(overrides, "data.path")
    if data is None and configured is None and recipe != "auto":
        configured = load_settings(recipe, "finetune").data.path
    manifest, line = find_task_data(task, data, configured)
    console.say(line)
    source, line = _find_init(init)
    console.say(line)
    description = _read_description(source) if source else None
    name, why = _choose_recipe(recipe, task, description, manifest, device)
    console.say(f"Recipe: {name} ({why}).")
    settings = load_settings(name, "finetune", tuple(overrides))
    tested = load_settings(name, "evaluate", tuple(overrides)).evaluate
    changes: dict[str, Any] = {"data": {"path": manifest.root, "sources": []}, "evaluate": tested.model_dump()}
    if protocol:
        changes["finetune"] = {"protocol": protocol}
    if seed is not None:
        changes["seed"] = seed
    if description:
        changes["model"] = _model_of_weights(description["model"], settings, name, overrides, source)
    settings = with_overrides(settings, **changes)
    check_probe(settings.finetune.protocol, settings.finetune.pool, settings.model.class_token)
    for split in (settings.data.split, settings.data.eval_split):
        if (manifest.samples(split).label < 0).all():
            raise DataError(f"Split {split} of {manifest.root} has no labels; choose another with data.{split}.")
    if (manifest.samples(settings.data.split).label < 0).any() and settings.finetune.protocol == "finetune":
        count = int((manifest.samples(settings.data.split).label < 0).sum())
        raise DataError(f"{count} samples of {settings.data.split} in {manifest.root} have no label; shard them apart.")
    return FinetunePlan(task, source, name, settings, manifest)


def _find_init(init: str) -> tuple[str | None, str]:
    if init == "scratch":
        return None, "Weights: from scratch (--init scratch)."
    if init != "auto":
        if not Path(init).exists():
            raise UsageError(f"--init {init}: there is no such run; give a folder, `scratch` or `auto`.")
        return init, f"Weights: {init} (--init)."
    entry = Workspace.here().latest("pretrain")
    if entry is None:
        raise UsageError(
            f"No pre-training is known in {Workspace.here().folder}: run `diffmae pretrain --video` first, or give "
            "--init PATH or --init scratch."
        )
    return entry.path, f"Weights: {entry.path} (the newest pre-training)."


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


def _choose_recipe(
    recipe: str, task: str, description: dict[str, Any] | None, manifest: Manifest, device: str
) -> tuple[str, str]:
    if recipe != "auto":
        return recipe, "chosen by --recipe"
    from diffmae_video.training.hardware import pick_device

    place = pick_device(device).type
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


def describe_plan(plan: FinetunePlan, device: str) -> None:
    """Say what will be done."""
    from diffmae_video.training.hardware import pick_device

    settings = plan.settings
    counts = f"{plan.manifest.splits[settings.data.split]} training videos of {len(plan.manifest.classes)} classes"
    if settings.data.label_fraction < 1:
        counts += f", {settings.data.label_fraction:.0%} of their labels"
    size, train = "x".join(map(str, settings.model.size)), settings.train
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    work = f"{length} of {train.batch_size} clips"
    if settings.finetune.protocol != "finetune":
        work = f"one pass for the features{f', {work}' if settings.finetune.protocol == 'attentive' else ''}"
    console.say(
        f"Plan: {settings.finetune.protocol} of {settings.model.preset} at {settings.model.frames}x{size}, {counts}, "
        f"{work} on {pick_device(device).type}."
    )


def predict_plan(plan: FinetunePlan, device: str, nproc: int = 1) -> Plan:
    """FLOPs, memory and hours of a fine-tuning, or of the pass over the data that a probe costs; shown as a table.

    A probe reads every video of both splits once, in the forward pass alone; fitting its head costs little beside that.
    """
    from diffmae_video.pipelines.plan import make_plan, print_plan
    from diffmae_video.training.distributed import ranks_from_environment
    from diffmae_video.training.hardware import pick_device

    settings, manifest, data = plan.settings, plan.manifest, plan.settings.data
    world, splits = max(nproc, ranks_from_environment()[1]), [data.split]
    samples = max(1, round(manifest.splits[data.split] * data.label_fraction))
    if settings.finetune.protocol != "finetune":
        splits.append(data.eval_split)
        samples += manifest.splits[data.eval_split]
        batch = settings.evaluate.batch_views * world
        once = {"steps": None, "epochs": 1.0, "batch_size": batch, "accumulate": 1, "sharding": "ddp", "ema": 0.0}
        settings = with_overrides(settings, data={"repeats": 1}, train=once)
    predicted = make_plan(
        settings,
        samples,
        sum(shard.bytes for shard in manifest.shards if shard.split in splits),
        world=world,
        device=pick_device(device),
        cost=measure_classifier(settings, manifest, settings.train.batch_size // (world * settings.train.accumulate)),
    )
    print_plan(predicted, world)
    return predicted


def measure_classifier(settings: Settings, manifest: Manifest, clips: int) -> Footprint:
    """Cost of a step with `clips` clips: of everything that is trained, or, of a probe, of the head alone."""
    import torch
    import torch.nn.functional as F

    from diffmae_video.evaluation.finetuning import freeze_first
    from diffmae_video.models.classifier import Classifier
    from diffmae_video.models.encoder import Encoder
    from diffmae_video.training.footprint import measure_step, shapes_only

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
