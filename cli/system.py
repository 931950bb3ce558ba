"""Commands about the installation and the settings: `doctor`, `recipes`."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from diffmae_video.cli.options import STYLE, SetOption

recipes_app = typer.Typer(help="List the built-in recipes, or show one resolved.", add_completion=False, **STYLE)


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
        typer.Option("--stage", envvar="DIFFMAE_STAGE", help="pretrain, finetune, evaluate or render."),
    ] = "pretrain",
    overrides: SetOption = None,
) -> None:
    """Print the settings that a recipe resolves to in one stage, as TOML."""
    from diffmae_video.config import Stage, load_settings, settings_toml
    from diffmae_video.errors import UsageError

    if stage not in Stage.__args__:
        raise UsageError(f"--stage {stage} is not one of {', '.join(Stage.__args__)}; choose one of them.")
    typer.echo(settings_toml(load_settings(name, cast(Stage, stage), tuple(overrides or ()))), nl=False)


COMMANDS = {"doctor": doctor, "recipes": recipes_app}
