"""What a user asked a stage for: the options that all stages share, once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffmae_video.errors import UsageError

DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Job:
    """What a user asked for. Every stage takes one first: `pretrain(Job(data="shards/"))`.

    The command line makes it from its shared options. Paths may be given as text or as `Path`.

    Raises:
        UsageError: an option with a value that no stage takes.
    """

    recipe: str = "auto"
    """Settings to start from: name, path, or `auto`, where the stage chooses."""
    overrides: tuple[str, ...] = ()
    """`section.field=value` texts, applied on top of the recipe."""
    data: str | None = None
    """Shards (several for a mix, with commas between them); without it the recipe's, then the workspace's newest."""
    checkpoint: str | None = None
    """Run or weights to use; without it the workspace's newest of the kind that the stage needs."""
    out: Path | None = None
    """Folder for the results; without it the newest unfinished run of the same, or a new one under `runs/`."""
    seed: int | None = None
    """Seed of every random draw; without it the recipe's."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `mps`."""
    nproc: int = 1
    """Processes on this machine."""
    resume: str = "auto"
    """`auto` continues an interrupted run, `never` does not, a path names the run or checkpoint to start from."""
    dry_run: bool = False
    """Print the plan and make nothing."""
    device_memory: str | None = None
    """Memory of each device, e.g. `24GiB`, for the plan of a dry run on another machine; without it, of this one."""

    command: str = ""
    """The command line that asked, as `diffmae status` repeats it; empty where Python did."""

    def __post_init__(self) -> None:
        text = (self.overrides,) if isinstance(self.overrides, str) else tuple(self.overrides)
        values = {
            "overrides": text,
            "data": None if self.data is None else str(self.data),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "out": None if self.out is None else Path(self.out),
            "resume": str(self.resume),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.device not in DEVICES:
            raise UsageError(f"--device {self.device} is not one of {', '.join(DEVICES)}; choose one of them.")
        if self.nproc < 1:
            raise UsageError(f"--nproc {self.nproc}: give 1 or more processes.")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"--seed {self.seed}: give 0 or more.")

        if self.device_memory is not None and not self.dry_run:
            raise UsageError("--device-memory is for plans: add --dry-run; a training looks at the device itself.")

    def with_(self, **changes: Any) -> Job:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def override(self, key: str) -> str | None:
        """The text that `overrides` give a setting, e.g. `data.path`; the last one counts."""
        values = [
            text.partition("=")[2].strip().strip("\"'")
            for text in self.overrides
            if text.partition("=")[0].strip() == key
        ]
        return values[-1] if values else None

    def resume_auto_or_never(self) -> None:
        """For stages that cannot start from another run's checkpoint.

        Raises:
            UsageError: `resume` is a path.
        """
        if self.resume not in ("auto", "never"):
            raise UsageError(
                f"--resume {self.resume}: this stage knows auto and never; name the folder to continue with --out."
            )
