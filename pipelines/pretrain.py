"""`diffmae pretrain`: DiffMAE on shards of videos, images, or a mix of both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffmae_video.config import Settings, SourceSettings, validate_settings, with_overrides
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.stream import build_stream
from diffmae_video.errors import Stopped, UsageError
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.pipelines import console
from diffmae_video.pipelines.plan import Plan, make_plan, measure, print_plan
from diffmae_video.pipelines.recipes import resolve_settings
from diffmae_video.pipelines.run_report import write_run_report
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training import distributed, run
from diffmae_video.training.hardware import core_count, pick_device
from diffmae_video.training.loop import TrainResult, micro_batch_size, train
from diffmae_video.training.mix import MixedStream
from diffmae_video.training.pretraining import PretrainTask

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


def pretrain(
    settings: Settings,
    kind: Kind = "video",
    data: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    resume: str = "auto",
    dry_run: bool = False,
    nproc: int = 1,
    profile: int = 0,
    throughput: float | None = None,
    recipe: str = "",
) -> PretrainResult:
    """Pre-train a model, continuing an interrupted run of the same settings and data where there is one.

    Args:
        settings: resolved settings of the stage.
        kind: `video`, `image`, or `joint` (sources from `data.sources`, or all that `data` names).
        data: shards; several for `joint`, with commas between them. Without it: `data.path`, then the workspace.
        out: directory of the run; the newest unfinished one of the same settings and data, or a new one, without it.
        device: `auto`, `cpu`, `cuda` or `mps`.
        resume: `auto`, `never`, or the run or checkpoint to start from.
        dry_run: print the plan and make nothing.
        nproc: processes on this machine.
        profile: steps to trace with torch's profiler.
        throughput: clips a second, for the predicted time of a dry run.
        recipe: name, for model.json.

    Raises:
        UsageError, DataError: what cannot be done as asked; Stopped after a signal; DiffmaeError where training fails.
    """
    settings, manifests = find_data(settings, kind, data)
    settings = _fit_to_machine(settings, nproc)
    world = max(nproc, distributed.ranks_from_environment()[1])
    micro_batch_size(settings.train, world)
    place = pick_device(device)
    if dry_run:
        samples = sum(manifest.splits.get(settings.data.split, 0) for manifest in manifests)
        size = sum(shard.bytes for m in manifests for shard in m.shards if shard.split == settings.data.split)
        plan = make_plan(settings, samples, size, world=world, device=place, throughput=throughput)
        print_plan(plan, world)
        return PretrainResult(None, plan=plan)
    data_hash = "+".join(manifest.hash for manifest in manifests)
    directory = _directory(settings, data_hash, out, resume)
    arguments = {
        "tables": settings.model_dump(mode="json"),
        "directory": str(directory),
        "data_hash": data_hash,
        "device": device,
        "resume": resume,
        "profile": profile,
        "describe": {
            "dataset": "+".join(manifest.dataset for manifest in manifests),
            "classes": manifests[0].classes if len(manifests) == 1 else [],
            "recipe": recipe,
            "media": kind,
        },
    }
    facts = {"dataset": arguments["describe"]["dataset"], "media": kind}
    try:
        result = distributed.launch(run_rank, nproc, **arguments) if nproc > 1 else run_rank(**arguments)
    except Stopped:
        _record(directory, facts)
        raise
    _record(directory, facts)
    return PretrainResult(directory, result.step, result.total, result.metrics, result.seconds)


def pretrain_with_recipe(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    seed: int | None = None,
    kind: Kind = "video",
    data: str | None = None,
    device: str = "auto",
    **arguments: Any,
) -> PretrainResult:
    """`pretrain` with a recipe's settings: a name, a path, or `auto`, which chooses by data, device and kind."""
    manifest = None
    if recipe == "auto":
        path = data.split(",")[0] if data else None
        if path is None:
            entry = Workspace.here().latest("shards", media="image" if kind == "image" else "video")
            path = entry.path if entry else None
        manifest = Manifest.load(path) if path else None
    settings, line = resolve_settings(
        recipe, "pretrain", overrides, seed=seed, manifest=manifest, device=device, kind=kind
    )
    console.say(line)
    name = line.removeprefix("Recipe: ").rpartition(" (")[0]  # a path may hold spaces
    return pretrain(settings, kind=kind, data=data, device=device, recipe=name, **arguments)


def run_rank(
    tables: dict[str, Any],
    directory: str,
    data_hash: str,
    device: str,
    resume: str,
    profile: int,
    describe: dict[str, Any],
) -> TrainResult:
    """One process of a pre-training; settings come as plain tables so that a launcher can pass them on."""
    settings = validate_settings(tables, "settings")
    with distributed.start(device) as processes:
        task = PretrainTask(
            DiffMAE(settings.model, settings.diffusion, seed=settings.seed),
            settings,
            _validation(settings, processes),
            processes,
            describe,
        )
        return train(
            task,
            settings,
            functools.partial(open_stream, settings),
            Path(directory),
            kind="pretrain",
            data_hash=data_hash,
            resume=resume,
            distributed=processes,
            progress=console.progress,
            report=write_run_report,
            say=console.say if processes.main else lambda text: None,
            flops_per_clip=_useful_flops(settings) if processes.main else None,
            profile=profile,
        )


def _useful_flops(settings: Settings) -> float:
    """FLOPs of a clip for `mfu`: what checkpointing computes a second time is not counted."""
    return measure(with_overrides(settings, train={"grad_checkpointing": False, "precision": "fp32"})).train_flops


def open_stream(settings: Settings, rank: int, world: int) -> Any:
    """The training stream of one rank: of one folder of shards, or a mix of several."""
    shared = {"split": settings.data.split, "training": True, "rank": rank, "world": world}
    sources = settings.data.sources
    if not sources:
        return build_stream(settings, batch_size=micro_batch_size(settings.train, world), **shared)
    streams = [
        build_stream(
            settings,
            batch_size=micro_batch_size(settings.train, world, source.batch_size),
            source=source,
            number=number,
            **shared,
        )
        for number, source in enumerate(sources)
    ]
    return MixedStream(streams, [source.weight for source in sources], settings.train.accumulate)


def find_data(settings: Settings, kind: Kind, data: str | None) -> tuple[Settings, list[Manifest]]:
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


def _directory(settings: Settings, data_hash: str, out: Path | None, resume: str) -> Path:
    """`out`, else the newest unfinished run of the same settings and data, else a new one."""
    workspace = Workspace.here()
    wanted = run.run_identity(settings, "pretrain", data_hash)
    if out is not None:
        run.check_directory(out, wanted)
        return out
    if resume == "auto":
        for directory in sorted((workspace.folder / "runs").glob("pretrain-*"), reverse=True):
            status = run.read_status(directory)
            if (
                status
                and status.get("status") != "finished"
                and not run.identity_difference(status["identity"], wanted)
            ):
                console.say(f"Found an unfinished run of the same settings and data: {directory}.")
                return directory
    return workspace.new_run_directory("pretrain")


def _validation(settings: Settings, processes: distributed.Distributed) -> Callable[[int, bool], Any]:
    """Opens one pass over the validation split (the training split where there is none) for all ranks or for one."""
    manifest = Manifest.load(settings.data.path)
    split = settings.data.eval_split if manifest.splits.get(settings.data.eval_split) else settings.data.split
    source = settings.data.sources[0] if settings.data.sources else None

    def open_validation(batch_size: int, alone: bool) -> Any:
        rank, world = (0, 1) if alone else (processes.rank, processes.world)
        plain = with_overrides(settings, data={"workers": 0}) if alone else settings
        return build_stream(
            plain, split=split, batch_size=batch_size, training=False, rank=rank, world=world, source=source
        )

    return open_validation


def _record(directory: Path, facts: dict[str, Any]) -> None:
    if (directory / "weights.safetensors").exists() and distributed.ranks_from_environment()[0] == 0:
        Workspace.here().record("pretrain", directory, **facts)
