"""Commands about runs, the installation and the settings: `status`, `doctor`, `recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from diffmae_video.cli.options import STYLE, SetOption, job_of, shares

recipes_app = typer.Typer(
    help="List the built-in recipes, show one resolved, or find the one that fits.", add_completion=False, **STYLE
)


def doctor() -> None:
    """Print versions, devices, codecs and free disk, and what to do where something is off."""
    from diffmae_video.pipelines.console import say, table
    from diffmae_video.pipelines.doctor import examine

    findings = examine()
    table("diffmae doctor", ("what", "found", "remedy"), [(f.what, f.found, f.remedy or "ok") for f in findings])
    broken = [finding for finding in findings if finding.broken]
    say(f"{len(broken)} of {len(findings)} checks failed." if broken else "Everything needed is here.")
    if broken:
        raise typer.Exit(1)


@recipes_app.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the built-in recipes."""
    if context.invoked_subcommand:
        return
    from diffmae_video.config import read_recipe, recipe_names
    from diffmae_video.pipelines.console import table

    rows = [(recipe.name, recipe.summary) for recipe in map(read_recipe, recipe_names())]
    table("Recipes", ("name", "for"), rows)


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME|PATH", help="Recipe to show.")],
    stage: Annotated[
        str,
        typer.Option("--stage", help="pretrain, finetune, evaluate or render."),
    ] = "pretrain",
    overrides: SetOption = None,
) -> None:
    """Print the settings that a recipe resolves to in one stage, as TOML."""
    from diffmae_video.config import Stage, load_settings, settings_listing
    from diffmae_video.errors import UsageError

    if stage not in Stage.__args__:
        raise UsageError(f"--stage {stage} is not one of {', '.join(Stage.__args__)}; choose one of them.")
    typer.echo(settings_listing(load_settings(name, cast(Stage, stage), tuple(overrides or ()))), nl=False)


@recipes_app.command("fit")
@shares("data", "device", "nproc", "device_memory")
def fit_recipe(
    hours: Annotated[
        float | None,
        typer.Option("--hours", min=0.01, help="Time that pre-training may take; the recipe's by default."),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option("--tflops", min=0.01, help="Peak of a device that is not here, TFLOP/s in bf16 (A100: 312)."),
    ] = None,
    **options: Any,
) -> None:
    """Propose recipe, micro-batch and length of a pre-training, with its predicted cost; nothing is made.

    Example: diffmae recipes fit --data shards/ --device-memory 24GiB --hours 12
    """
    from diffmae_video.pipelines.recipe_fit import fit_and_print

    fit_and_print(job_of({**options, "dry_run": True}), hours, tflops)


def status(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="Workspace; this folder by default.")
    ] = None,
) -> None:
    """List the runs of this folder: stage, state, step, time left, last figures, last picture.

    Example: diffmae status
    """
    from diffmae_video.pipelines.status import list_runs, print_status

    print_status(list_runs(folder), folder)


COMMANDS = {"status": status, "doctor": doctor, "recipes": recipes_app}
