"""The `diffmae` command: parses, calls one stage, prints; no logic."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True)


def main() -> None:
    """Entry point of the console script."""
    app()
