"""Options that several commands share, each with its environment variable, and the job they make."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from diffmae_video.errors import UsageError
from diffmae_video.pipelines.job import Job

STYLE: dict[str, Any] = {
    "rich_markup_mode": None,  # plain help comes in half the time
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
"""How every command looks and fails."""
COMMAND: ContextVar[str] = ContextVar("command", default="")
"""The command line that is being run."""
Command = TypeVar("Command", bound=Callable[..., Any])


class Device(str, Enum):
    """Where a stage computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Again(str, Enum):
    """What to do with an unfinished run of the same."""

    auto = "auto"
    never = "never"


RecipeOption = Annotated[str, typer.Option("--recipe", metavar="NAME|PATH|auto", help="Settings to start from.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: train.base_lr=3e-4."),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Seed of every random draw; the recipe's by default."),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the results; a new one under runs/ by default."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Folder for the results; by default one under .diffmae/features/, named after what is computed."
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and make nothing.")]
DataOption = Annotated[
    str | None,
    typer.Option("--data", metavar="PATH|URL", help="Shards; the workspace's newest by default."),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="PATH|HUB NAME",
        help="Run or weights, also hf:user/model[@revision] or timm:NAME; the newest by default.",
    ),
]
NprocOption = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine, one a GPU.")]
ResumeOption = Annotated[
    str,
    typer.Option("--resume", metavar="auto|never|PATH", help="Continue an interrupted run."),
]
AgainOption = Annotated[
    Again, typer.Option("--resume", help="Continue an unfinished run of the same (auto), or begin anew (never).")
]
DeviceMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--device-memory",
        metavar="24GiB",
        help="For --dry-run: memory of a device that is not here.",
    ),
]
ProfileOption = Annotated[
    int,
    typer.Option("--profile", min=0, metavar="N", help="Trace N steps with the profiler."),
]
VideoOption = Annotated[bool, typer.Option("--video", help="On clips (the default).")]
ImageOption = Annotated[bool, typer.Option("--image", help="On images.")]
JointOption = Annotated[bool, typer.Option("--joint", help="On a mix: --data VIDEOS,IMAGES, or data.sources.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]

_SHARED: dict[str, tuple[Any, Any]] = {
    "video": (VideoOption, False),
    "image": (ImageOption, False),
    "joint": (JointOption, False),
    "checkpoint": (CheckpointOption, None),
    "data": (DataOption, None),
    "recipe": (RecipeOption, "auto"),
    "overrides": (SetOption, None),
    "out": (OutOption, None),
    "out:cache": (CacheOption, None),
    "seed": (SeedOption, None),
    "device": (DeviceOption, Device.auto),
    "nproc": (NprocOption, 1),
    "resume": (ResumeOption, "auto"),
    "resume:again": (AgainOption, Again.auto),
    "dry_run": (DryRunOption, False),
    "device_memory": (DeviceMemoryOption, None),
    "profile": (ProfileOption, 0),
}
"""Shared options by parameter name (`NAME:KIND` where it has several kinds): how each is written, and its default."""
_SETTINGS = {"profile": "train.profile"}
"""Options that are another way to write `--set KEY=VALUE`."""
_KINDS = ("video", "image", "joint")


def names_of(kind: str) -> list[str]:
    """Names in a registry (`samplers`, `layouts`, ...), known without importing the parts, for metavars and help."""
    from diffmae_video import registry

    return getattr(registry, kind).names()


def shares(*names: str) -> Callable[[Command], Command]:
    """Decorator of a command `f(..., **options)`: it also takes these shared options, for `job_of(options)`."""

    def add(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        shared = [
            inspect.Parameter(
                name.partition(":")[0], inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
            for name, (annotation, default) in _SHARED.items()
            if name in names
        ]
        keywords = [one.replace(kind=one.KEYWORD_ONLY) for one in own]
        command.__signature__ = signature.replace(parameters=[*keywords, *shared])  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in [*keywords, *shared]}
        return command

    return add


def job_of(options: dict[str, Any]) -> Job:
    """The job that shared options make."""
    fields = {name: value for name, value in options.items() if name in Job.__dataclass_fields__}
    settings = [f"{key}={options[name]}" for name, key in _SETTINGS.items() if options.get(name)]
    fields["overrides"] = (*(fields.get("overrides") or ()), *settings)
    fields["command"] = COMMAND.get()
    return Job(**{name: value.value if isinstance(value, Enum) else value for name, value in fields.items()})


def kind_of(options: dict[str, Any]) -> Any:
    """The one of `--video`, `--image` and `--joint` that was given; `video` without one.

    Raises:
        UsageError: several were.
    """
    chosen = [name for name in _KINDS if options.get(name)]
    if len(chosen) > 1:
        raise UsageError(f"--{chosen[0]} and --{chosen[1]} exclude each other: choose one.")
    return chosen[0] if chosen else "video"
