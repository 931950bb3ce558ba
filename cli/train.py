"""Commands around pre-training: pretrain, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffmae_video.cli.options import job_of, kind_of, shares


@shares(
    *("video", "image", "joint", "data", "recipe", "overrides", "out"),
    *("seed", "device", "nproc", "resume", "dry_run", "device_memory", "profile"),
)
def pretrain(
    throughput: Annotated[
        float | None,
        typer.Option(
            "--throughput",
            min=0,
            metavar="CLIPS/S",
            help="Measured rate, for --dry-run's time.",
        ),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            "--init",
            metavar="scratch|PATH|HUB NAME",
            help="Weights to start from: a run, another project's file, hf:user/model[@revision] or timm:NAME.",
        ),
    ] = "scratch",
    **options: Any,
) -> None:
    """Pre-train DiffMAE on shards; an interrupted run is continued.

    Example: diffmae pretrain --video
    """
    from diffmae_video.pipelines import pretrain as stage

    stage.print_pretrain(stage.pretrain(job_of(options), kind_of(options), throughput, init))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Page to write; report.html here for several runs."),
    ] = None,
) -> None:
    """Write one self-contained page about a run, or about several beside each other.

    Example: diffmae report runs/pretrain-001 runs/pretrain-002
    """
    from diffmae_video.pipelines.run_report import compare_runs

    compare_runs(runs, out)


COMMANDS = {"pretrain": pretrain, "report": report}
