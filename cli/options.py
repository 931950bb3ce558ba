"""Options that several commands share, each with its environment variable."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Device(str, Enum):
    """Where a stage computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


RecipeOption = Annotated[
    str, typer.Option("--recipe", metavar="NAME|PATH|auto", envvar="DIFFMAE_RECIPE", help="Settings to start from.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", envvar="DIFFMAE_SET", help="Override a setting: train.base_lr=3e-4."),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", min=0, envvar="DIFFMAE_SEED", help="Seed of every random draw; the recipe's by default."),
]
DeviceOption = Annotated[Device, typer.Option("--device", envvar="DIFFMAE_DEVICE", help="Where to compute.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", envvar="DIFFMAE_OUT", help="Folder for the results; a new one under runs/ by default."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", envvar="DIFFMAE_DRY_RUN", help="Print the plan and make nothing.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="PATH|URL", envvar="DIFFMAE_DATA", help="Shards; the workspace's newest by default."
    ),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", metavar="PATH", envvar="DIFFMAE_CHECKPOINT", help="Run or weights; the newest by default."
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", envvar="DIFFMAE_OVERWRITE", help="Replace what the output folder holds.")
]
NprocOption = Annotated[
    int, typer.Option("--nproc", min=1, envvar="DIFFMAE_NPROC", help="Processes on this machine, one a GPU.")
]
ResumeOption = Annotated[
    str,
    typer.Option("--resume", metavar="auto|never|PATH", envvar="DIFFMAE_RESUME", help="Continue an interrupted run."),
]
