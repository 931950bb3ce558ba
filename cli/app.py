"""The `diffmae` command: parses, calls one stage, prints; no logic."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffmae_video._version import __version__
from diffmae_video.cli import demo, recognition, render, shard, studio, study, system, train, weights
from diffmae_video.cli.options import COMMAND, STYLE
from diffmae_video.errors import DiffmaeError
from diffmae_video.files import printable
from diffmae_video.threads import share_cores
from diffmae_video.training.signals import Interruption, interruptible

# Typer carries its own copy of click since 0.26 and used click's before: take the class from where it is
ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_COMMANDS: dict[str, Callable[..., Any] | typer.Typer] = {
    **demo.COMMANDS,
    **shard.COMMANDS,
    **train.COMMANDS,
    **recognition.COMMANDS,
    **render.COMMANDS,
    **studio.COMMANDS,
    **weights.COMMANDS,
    **study.COMMANDS,
    **system.COMMANDS,
}


def _set_debug(wanted: bool) -> None:
    if wanted:
        os.environ["DIFFMAE_DEBUG"] = "1"  # worker processes and launched ranks see it too


def _debug_option() -> Any:
    """The option `--debug` of a command: the same as before the command."""

    def holder(
        debug: Annotated[
            bool,
            typer.Option(
                "--debug", expose_value=False, callback=_set_debug, envvar="DIFFMAE_DEBUG", help="Show tracebacks."
            ),
        ] = False,
    ) -> None: ...

    alone = typer.Typer(add_completion=False)
    alone.command()(holder)
    return typer.main.get_command(alone).params[0]


def variable_of(command: str, option: str) -> str:
    """The environment variable that sets an option of a command, e.g. `--batch-size` of `fit`: DIFFMAE_FIT_BATCH_SIZE.

    It holds one command only: `--out` of one stage must not become that of the next.
    """
    return f"DIFFMAE_{command}_{option.lstrip('-')}".upper().replace("-", "_").replace(" ", "_")


class _LazyCommands(Mapping[str, Any]):
    """Commands by name; the options of a command are made when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        part = _COMMANDS[name]
        if not isinstance(part, typer.Typer):
            alone = typer.Typer(add_completion=False, **STYLE)
            alone.command(name)(part)
            part = alone
        command = typer.main.get_command(part)
        command.name = name
        below = getattr(command, "commands", {})
        for path, one in ((name, command), *((f"{name}_{inner}", child) for inner, child in below.items())):
            options: list[Any] = [given for given in one.params if given.param_type_name == "option"]
            for option in options:
                option.envvar, option.show_envvar = variable_of(path, option.opts[0]), False
            one.params.append(_debug_option())
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


class _Commands(TyperGroup):
    """All commands, in the order of the work."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _LazyCommands()  # type: ignore[assignment]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """A line for each command, without making its options."""
        lines = []
        for name, part in _COMMANDS.items():
            text = (part.info.help if isinstance(part, typer.Typer) else part.__doc__) or ""
            lines.append((name, " ".join(text.split("\n\n")[0].split())))
        with formatter.section("Commands"):
            formatter.write_dl(lines)


app = typer.Typer(
    name="diffmae",
    cls=_Commands,
    no_args_is_help=True,
    help="Diffusion models as masked autoencoders: from raw clips to recognition and inpainted video.",
    epilog="The main job: diffmae shard SRC OUT; diffmae pretrain --video; diffmae finetune --task k400; "
    "diffmae eval --task k400; diffmae render-inpaint CLIP. See it whole in minutes: diffmae demo. "
    "An option can also be given as a variable DIFFMAE_COMMAND_OPTION, e.g. DIFFMAE_PRETRAIN_DEVICE=cpu.",
    **STYLE,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffmae-video {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", callback=_set_debug, envvar="DIFFMAE_DEBUG", help="Show tracebacks.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Diffusion models as masked autoencoders: from raw clips to recognition and inpainted video."""


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 1 failed, 2 usage, 3 bad data, 75 stopped by a signal and saved, 130 interrupted.
    Errors a user can act on are one line on stderr; everything else is one line too, unless `--debug`.
    """
    command = typer.main.get_command(app)
    COMMAND.set(shlex.join(["diffmae", *(sys.argv[1:] if arguments is None else arguments)]))
    try:
        with interruptible():
            code = command.main(arguments, prog_name="diffmae", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (typer.Abort, KeyboardInterrupt) as error:
        for cause in (error, error.__cause__, error.__context__):
            if isinstance(cause, Interruption):
                return _fail(str(cause), 1)
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
    os.environ.setdefault(
        "PYTHONSAFEPATH", "1"
    )  # processes that it starts import nothing from the folder one stands in
    share_cores(os.environ)
    try:
        code = run()
    except KeyboardInterrupt:  # one more while the first was being told
        code = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a late Ctrl-C has nothing left to interrupt
    sys.exit(code)


def _debugging() -> bool:
    return os.environ.get("DIFFMAE_DEBUG", "") not in ("", "0", "false")


def _fail(message: str, code: int) -> int:
    typer.echo(f"diffmae: {printable(message, keep=chr(10))}", err=True)
    return code
