"""`diffmae study`: arms of a recipe beside each other, by one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffmae_video.cli.options import STYLE, Device, DeviceOption, DryRunOption, OutOption

study_app = typer.Typer(
    help="Run a study (arms, seeds and stages in one file), or print what it found.", no_args_is_help=True, **STYLE
)

_StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="Built-in study, or a TOML file.")]
_DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME=PATH",
        help="Shards of a data set of the study; may be repeated. The workspace's newest by default.",
    ),
]


@study_app.command("run")
def run(
    study: _StudyArgument,
    data: _DataOption = None,
    out: OutOption = None,
    jobs: Annotated[
        str,
        typer.Option("--jobs", metavar="N|slurm", help="Runs at once; slurm writes a script."),
    ] = "1",
    device: DeviceOption = Device.auto,
    dry_run: DryRunOption = False,
) -> None:
    """Run what is missing of a study; run it again after a stop.

    Example: diffmae study run images-main --data cifar10=shards/cifar10
    """
    from diffmae_video.pipelines.study import study_command

    study_command(study, data or [], out, jobs, device.value, dry_run)


@study_app.command("table")
def table(directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study.")]) -> None:
    """Print and write what a study has found: table.md, table.csv, table.png, report.html.

    Example: diffmae study table runs/study-images-main
    """
    from diffmae_video.pipelines.study_table import study_table

    study_table(directory)


@study_app.command("list")
def list_studies() -> None:
    """List the built-in studies."""
    from diffmae_video.config.study import read_study, study_names
    from diffmae_video.pipelines.console import table

    rows = [(name, read_study(name).summary) for name in study_names()]
    table("Studies", ("name", "asks"), rows)


COMMANDS = {"study": study_app}
