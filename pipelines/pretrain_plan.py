"""What a pre-training will do, decided before the first step: data, recipe, cost."""

from __future__ import annotations

from typing import Any

from diffmae_video.config import Settings, SourceSettings, with_overrides
from diffmae_video.data.manifest import Manifest
from diffmae_video.errors import UsageError
from diffmae_video.pipelines import console
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.plan import Plan, check_plan, make_plan, measure, print_plan
from diffmae_video.pipelines.recipes import planned_device, planned_world, resolve_settings
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training import distributed
from diffmae_video.training.hardware import core_count, parse_memory
from diffmae_video.training.task import micro_batch_size, need_clips


def plan_pretrain(job: Job, kind: str) -> tuple[Settings, str, list[Manifest]]:
    """Decide what a pre-training reads and by which recipe, saying so: settings, recipe's name, manifests."""
    manifest = None
    if job.recipe == "auto":
        path = job.data.split(",")[0] if job.data else job.override("data.path")
        if path is None:
            entry = Workspace.here().latest("shards", media="image" if kind == "image" else "video")
            path = entry.path if entry else None
        manifest = Manifest.load(path) if path else None
    settings, line = resolve_settings(job, "pretrain", manifest=manifest, kind=kind)
    console.say(line)
    settings, manifests = find_data(settings, kind, job.data)
    settings = _settle_labels(settings, manifests)
    recipe = line.removeprefix("Recipe: ").rpartition(" (")[0]  # a path may hold spaces
    if not settings.data.sources:
        samples = manifests[0].splits[settings.data.split]
        need_clips(settings, samples * settings.data.repeats, planned_world(job))
    if job.device_memory is None:  # else the plan is for another machine
        settings = _fit_to_machine(settings, job.nproc)
    return settings, recipe, manifests


def predict_pretrain(settings: Settings, job: Job, manifests: list[Manifest], throughput: float | None = None) -> Plan:
    """FLOPs, memory and hours, shown as a table."""
    world = planned_world(job)
    micro_batch_size(settings.train, world)
    samples = sum(manifest.splits.get(settings.data.split, 0) for manifest in manifests)
    size = sum(shard.bytes for m in manifests for shard in m.shards if shard.split == settings.data.split)
    memory = parse_memory(job.device_memory) if job.device_memory else None
    device = planned_device(job)
    plan = make_plan(settings, samples, size, world=world, device=device, throughput=throughput, memory=memory)
    print_plan(plan, world)
    check_plan(plan, settings, world)
    return plan


def useful_flops(settings: Settings) -> float:
    """FLOPs of a clip for `mfu`: what checkpointing computes a second time is not counted."""
    return measure(with_overrides(settings, train={"grad_checkpointing": False, "precision": "fp32"})).train_flops


def find_data(settings: Settings, kind: str, data: str | None) -> tuple[Settings, list[Manifest]]:
    """Settle which shards are read, say so, and fit the settings to the kind of run.

    Raises:
        UsageError: none are known, or they are of the wrong kind.
        DataError: a folder without a manifest.
    """
    if kind == "joint":
        return _find_sources(settings, data)
    path, why = data or settings.data.path, "--data" if data else "data.path"
    if path is None:
        entry = Workspace.here().require("shards", "--data", media=kind)
        path, why = entry.path, "the newest shards of this workspace"
    manifest = Manifest.load(path)
    if manifest.kind != kind and kind == "video":
        raise UsageError(f"{path} holds images: use --image, or give shards of videos with --data.")
    splits = ", ".join(f"{count} {split}" for split, count in manifest.splits.items())
    console.say(f"Data: {path} ({why}): {manifest.dataset}, {splits}.")
    changes: dict[str, Any] = {"data": {"path": str(path), "sources": ()}}
    if kind == "image":
        changes["model"] = {"frames": 1}
    _need_split(manifest, settings.data.split)
    if not manifest.splits.get(manifest.held_out(settings.data.eval_split)):
        console.say(
            f"Note: there is no split {settings.data.eval_split}, so the validation loss is of training clips; "
            "shard with --val-fraction 0.1, or name another split as data.eval_split."
        )
    return with_overrides(settings, **changes), [manifest]


def _find_sources(settings: Settings, data: str | None) -> tuple[Settings, list[Manifest]]:
    sources = settings.data.sources
    if data:
        sources = tuple(SourceSettings(path=path.strip()) for path in data.split(",") if path.strip())
    elif not sources:
        workspace = Workspace.here()
        found = [workspace.require("shards", "--data VIDEOS,IMAGES", media=media) for media in ("video", "image")]
        sources = tuple(SourceSettings(path=entry.path) for entry in found)
    if len(sources) < 2:
        raise UsageError("--joint mixes at least two sources: give --data VIDEOS,IMAGES or data.sources in the recipe.")
    manifests = [Manifest.load(source.path) for source in sources]
    for source, manifest in zip(sources, manifests, strict=True):
        console.say(f"Source: {source.path} (weight {source.weight:g}): {manifest.dataset}, {manifest.kind}s.")
        _need_split(manifest, settings.data.split)
    tables = tuple(source.model_dump(exclude_none=True) for source in sources)
    return with_overrides(settings, data={"sources": tables, "path": sources[0].path}), manifests


def _settle_labels(settings: Settings, manifests: list[Manifest]) -> Settings:
    """`model.labels = data` becomes the number of classes of the shards; raises UsageError where they do not fit."""
    asked = settings.model.labels
    if not asked:
        return settings
    if len(manifests) > 1:
        raise UsageError("model.labels tells the decoder of the classes of one data set: leave it out for a mix.")
    classes = len(manifests[0].classes)
    if not classes:
        raise UsageError(f"model.labels = {asked}: {manifests[0].root} has no labels; leave it out.")
    if asked == "data":
        return with_overrides(settings, model={"labels": classes})
    if int(asked) < classes:
        raise UsageError(
            f"model.labels = {asked}: {manifests[0].root} has {classes} classes; take model.labels = data."
        )
    return settings


def _need_split(manifest: Manifest, split: str) -> None:
    if not manifest.splits.get(split):
        known = ", ".join(manifest.splits) or "none"
        raise UsageError(f"{manifest.root} has no split {split} (it has {known}); set data.split to one of them.")


def _fit_to_machine(settings: Settings, nproc: int) -> Settings:
    """No more data workers than cores: a surplus only takes turns, and the order of samples does not depend on it."""
    local = max(nproc, distributed.ranks_from_environment()[3])
    share = max(1, core_count() // local)
    if settings.data.workers > share:
        console.say(
            f"data.workers = {settings.data.workers} in each of {local} process(es) is more than "
            f"{core_count()} cores can run: using {share}."
        )
        settings = with_overrides(settings, data={"workers": share})
    return settings
