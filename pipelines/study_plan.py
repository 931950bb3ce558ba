"""What a study would cost: `diffmae study run --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffmae_video.config import load_settings, with_overrides
from diffmae_video.config.study import Cell, Grid, Study
from diffmae_video.pipelines import console
from diffmae_video.pipelines.finetune_plan import training_samples
from diffmae_video.pipelines.study import is_done


def print_study_plan(study: Study, grid: Grid, shards: Mapping[str, str], directory: Path, device: str) -> None:
    """Show the runs of a study with FLOPs, memory and predicted hours; evaluations and probes count as passes."""
    from diffmae_video.data.manifest import Manifest

    manifests = {name: Manifest.load(path) for name, path in shards.items()}
    rows: list[list[object]] = []
    hours = 0.0
    for cell in grid.cells.values():
        done = is_done(directory, cell)
        plan = _plan(cell, grid, manifests, device)
        if plan is None:
            rows.append([cell.name, cell.stage, "done" if done else "missing", "-", "-", "-"])
            continue
        flops, memory, needed = plan
        hours += 0.0 if done else needed
        rows.append(
            [
                cell.name,
                cell.stage,
                "done" if done else "missing",
                f"{flops / 1e15:.3g} P",
                f"{memory:.2f} GiB",
                console.format_seconds(needed * 3600),
            ]
        )
    console.table(f"Study {study.name}", ["run", "stage", "state", "FLOPs", "memory", "time"], rows)
    console.say(
        f"{len(study.arms)} arms, {len(study.measures)} measures, {len(grid.cells)} runs; trainings still to do take "
        f"about {console.format_seconds(hours * 3600)} of one device, predicted; evaluations and probes come on top."
    )


def _plan(cell: Cell, grid: Grid, manifests: Mapping, device: str) -> tuple[float, float, float] | None:
    """FLOPs, GiB and hours of a training; None for a pass over features or an evaluation."""
    from diffmae_video.pipelines.finetune_plan import measure_classifier
    from diffmae_video.pipelines.plan import make_plan
    from diffmae_video.training.hardware import pick_device

    if cell.stage not in ("pretrain", "finetune") or (cell.stage == "finetune" and cell.protocol != "finetune"):
        return None
    chosen = [manifests[name] for name in cell.data]
    place = pick_device(device)
    if cell.stage == "pretrain":
        settings = load_settings(cell.recipe, "pretrain", cell.overrides)
        if cell.kind == "image":
            settings = with_overrides(settings, model={"frames": 1})
        samples = sum(manifest.splits.get(settings.data.split, 0) for manifest in chosen)
        plan = make_plan(settings, samples, 0, world=1, device=place)
    else:
        overrides = list(cell.overrides)
        settings = load_settings(cell.recipe, "finetune", overrides)
        if cell.needs is not None:  # the encoder is that of pre-training
            before = grid.cells[cell.needs]
            trained = load_settings(before.recipe, "pretrain", before.overrides)
            settings = with_overrides(settings, model=trained.model.model_dump())
        samples = training_samples(chosen[0], settings.data) if settings.data.split in chosen[0].splits else 0
        plan = make_plan(
            settings,
            samples,
            0,
            world=1,
            device=place,
            measured=lambda changed, clips: measure_classifier(changed, chosen[0], clips),
        )
    assert plan.hours is not None  # the device is here
    flops = plan.cost.train_flops * plan.steps * settings.train.batch_size
    return flops, plan.memory_gib, plan.hours
