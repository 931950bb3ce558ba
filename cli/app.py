"""The `diffmae` command: parses, calls one stage, prints; no logic."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from diffmae_video._version import __version__
from diffmae_video.errors import DiffmaeError

# Typer carries its own copy of click since 0.26 and used click's before: take the class from where it is
ClickException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_AREAS = ("demo", "shard", "train", "recognition", "render", "weights", "system")

app = typer.Typer(
    name="diffmae",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Diffusion models as masked autoencoders: from raw clips to recognition and inpainted video.",
    epilog="The main job: diffmae shard SRC OUT; diffmae pretrain --video; diffmae finetune --task k400; "
    "diffmae eval --task k400; diffmae render-inpaint CLIP. See it whole in minutes: diffmae demo.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffmae-video {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="DIFFMAE_DEBUG", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Diffusion models as masked autoencoders: from raw clips to recognition and inpainted video."""
    if debug:
        os.environ["DIFFMAE_DEBUG"] = "1"  # worker processes and launched ranks see it too


for _area in _AREAS:
    importlib.import_module(f"diffmae_video.cli.{_area}").register(app)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 1 failed, 2 usage, 3 bad data, 75 stopped by a signal and saved, 130 interrupted.
    Errors a user can act on are one line on stderr; everything else is one line too, unless `--debug`.
    """
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="diffmae", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _fail("Interrupted.", 130)
    except ClickException as error:
        if _debugging():
            raise
        error.show()
        return error.exit_code
    except DiffmaeError as error:
        if _debugging():
            raise
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output left, e.g. `| head`
        sys.stderr.close()
        return 1
    except OSError as error:
        if _debugging():
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; check the path and the free disk space.", 1)
    except Exception as error:
        if _debugging():
            raise
        return _fail(f"Unexpected {type(error).__name__}: {error}; run again with --debug for the traceback.", 1)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())


def _debugging() -> bool:
    return os.environ.get("DIFFMAE_DEBUG", "") not in ("", "0", "false")


def _fail(message: str, code: int) -> int:
    typer.echo(f"diffmae: {message}", err=True)
    return code
