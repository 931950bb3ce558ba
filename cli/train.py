"""Commands around pre-training: pretrain, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffmae_video.cli.options import (
    DataOption,
    Device,
    DeviceOption,
    DryRunOption,
    NprocOption,
    OutOption,
    RecipeOption,
    ResumeOption,
    SeedOption,
    SetOption,
)


def pretrain(
    video: Annotated[bool, typer.Option("--video", envvar="DIFFMAE_VIDEO", help="On clips (the default).")] = False,
    image: Annotated[bool, typer.Option("--image", envvar="DIFFMAE_IMAGE", help="On images.")] = False,
    joint: Annotated[
        bool,
        typer.Option("--joint", envvar="DIFFMAE_JOINT", help="On a mix: --data VIDEOS,IMAGES, or data.sources."),
    ] = False,
    data: DataOption = None,
    recipe: RecipeOption = "auto",
    override: SetOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    device: DeviceOption = Device.auto,
    nproc: NprocOption = 1,
    resume: ResumeOption = "auto",
    dry_run: DryRunOption = False,
    throughput: Annotated[
        float | None,
        typer.Option(
            "--throughput",
            min=0,
            metavar="CLIPS/S",
            envvar="DIFFMAE_THROUGHPUT",
            help="Measured rate, for --dry-run's time.",
        ),
    ] = None,
    profile: Annotated[
        int,
        typer.Option(
            "--profile", min=0, metavar="N", envvar="DIFFMAE_PROFILE", help="Trace N steps with the profiler."
        ),
    ] = 0,
) -> None:
    """Pre-train DiffMAE on shards; an interrupted run is continued.

    Example: diffmae pretrain --video
    """
    from diffmae_video.errors import UsageError
    from diffmae_video.pipelines import console
    from diffmae_video.pipelines.pretrain import pretrain_with_recipe

    kinds = [name for name, chosen in (("video", video), ("image", image), ("joint", joint)) if chosen]
    if len(kinds) > 1:
        raise UsageError(f"--{kinds[0]} and --{kinds[1]} exclude each other: choose one.")
    result = pretrain_with_recipe(
        recipe,
        override or [],
        seed=seed,
        kind=kinds[0] if kinds else "video",
        data=data,
        out=out,
        device=device.value,
        resume=resume,
        dry_run=dry_run,
        nproc=nproc,
        profile=profile,
        throughput=throughput,
    )
    if result.directory is not None:
        loss = result.metrics.get("loss")
        shown = "" if loss is None else f", loss {loss:.4g}"
        console.say(
            f"Done: step {result.step} of {result.total}{shown}; weights and report.html in {result.directory}."
        )


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", envvar="DIFFMAE_REPORT", help="Page to write; report.html here for several runs."
        ),
    ] = None,
) -> None:
    """Write one self-contained page about a run, or about several beside each other.

    Example: diffmae report runs/pretrain-001 runs/pretrain-002
    """
    from diffmae_video.pipelines.run_report import compare_runs

    compare_runs(runs, out)


def register(app: typer.Typer) -> None:
    """Add the commands of this area."""
    app.command("pretrain")(pretrain)
    app.command("report")(report)
