"""A run's directory: who holds it, what it is, and whether it may be continued."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from diffmae_video.errors import Stopped, UsageError
from diffmae_video.files import read_holder, write_atomic, write_holder
from diffmae_video.training.signals import Interruption

if TYPE_CHECKING:
    from diffmae_video.config import Settings
    from diffmae_video.training.distributed import Distributed

# settings that change how a run goes, not what it computes: they may differ when it is continued
_FREE = {
    "data": {"path", "workers", "prefetch", "cache_dir", "cache_gib", "max_bad_fraction"},
    "train": {
        "accumulate",
        "compile",
        "grad_checkpointing",
        "sharding",
        "skip_nonfinite",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "mirror",
        "log_every",
        "picture_every",
        "validate_every",
        "log_to",
        "project",
        "wandb",  # of before 2026-11-26
        "profile",
    },
}
_SECTIONS = ("seed", "model", "diffusion", "mask", "data", "train", "finetune")
_LENGTH = ("epochs", "steps")
_BEFORE_WORK = ("run.json", "run.lock", "run.holder", "config.toml", "metrics.jsonl", "report.html", "identity")


@dataclass(frozen=True)
class Run:
    """A run as its stage holds it: where it lies, what it is, who takes part, and whom it tells."""

    directory: Path
    identity: dict[str, Any]
    earlier: dict[str, Any] = field(default_factory=dict)
    """run.json of an earlier try of the same run; empty where the directory is new."""
    processes: Distributed | None = None
    resume: str = "auto"
    """`auto` goes on from the newest whole checkpoint here, `never` from none, a path from that run or checkpoint."""
    say: Callable[[str], None] = lambda text: None
    """Tells the user one line."""
    progress: Callable[[int, str, str], AbstractContextManager[Any]] | None = None
    """(total, label, unit) -> context manager with `update(count, **figures)`."""
    report: Callable[[Path], None] | None = None
    """Called on rank 0 with the directory whenever there is something new to show."""
    parts: int = 1
    """In how many parts a batch fits into the device's memory, with `train.accumulate = "auto"`."""
    flops_per_clip: float | None = None
    """Forward and backward, for `mfu`."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.processes is None or self.processes.main


def run_identity(settings: Settings, kind: str, data: str) -> dict[str, Any]:
    """What makes two runs the same: kind, data (a manifest's hash), and the settings that decide what is computed."""
    tables = settings.model_dump(mode="json", exclude_none=True)
    kept: dict[str, Any] = {"kind": kind, "data": data}
    for section in _SECTIONS:
        if section == "finetune" and kind == "pretrain":
            continue
        table = tables[section]
        if isinstance(table, dict):
            table = {key: value for key, value in table.items() if key not in _FREE.get(section, set())}
        kept[f"settings.{section}"] = table
    return kept


def identity_difference(old: dict[str, Any], new: dict[str, Any], *, but_length: bool = False) -> str | None:
    """The first thing in which two identities differ, in words; None where they agree.

    `train.precision = "auto"` agrees with whatever the run has settled on.

    Args:
        but_length: `train.epochs` and `train.steps` may differ.
    """
    if old.get("kind") != new["kind"]:
        return f"it is a {old.get('kind')} run"
    for section in _SECTIONS:
        before, after = old.get(f"settings.{section}"), new.get(f"settings.{section}")
        if before == after:
            continue
        if not isinstance(before, dict) or not isinstance(after, dict):
            return f"{section} was {before}, not {after}"
        for key in sorted(before.keys() | after.keys()):
            free = but_length and section == "train" and key in _LENGTH
            free = free or ((section, key) == ("train", "precision") and after.get(key) == "auto")
            if before.get(key) != after.get(key) and not free:
                return f"{section}.{key} was {before.get(key)}, not {after.get(key)}"
    if old.get("data") == new["data"]:
        return None
    return "its data has changed" if "settings.data" in new else "it was made of other input or with other settings"


def read_status(directory: Path) -> dict[str, Any] | None:
    """run.json of a directory: identity, status, step, total; None where there is none that can be read."""
    try:
        return dict(json.loads((directory / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_status(directory: Path, **fields: Any) -> None:
    """Write run.json whole: what it held, with `fields` replaced."""
    write_atomic(directory / "run.json", json.dumps({**(read_status(directory) or {}), **fields}, indent=1) + "\n")


def holds_work(directory: Path) -> bool:
    """Whether a run's directory holds anything that took computing: more than what a run writes before its first save.

    Until then the directory is not taken: another run may have it.
    """
    for path in directory.rglob("*"):
        name = path.name
        before = name in _BEFORE_WORK or name.startswith(("events.out.", "nonfinite-", "."))
        if path.is_file() and not before:
            return True
    return False


def may_continue(status: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Why the run of a run.json cannot go on as the run of identity `wanted`; None where it can.

    It must be the same, or finished and of another length: a longer one goes on from its last step.
    """
    old = status.get("identity", {})
    return identity_difference(old, wanted, but_length=status.get("status") == "finished")


def check_directory(directory: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The status of the same run in `directory`, or None where the directory is free.

    Raises:
        UsageError: the directory holds another run, or something else.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"--out {directory} is a file; name a folder.")
    status = read_status(directory)
    if status is None:
        if directory.is_dir() and any(path.name not in ("run.lock", "run.holder") for path in directory.iterdir()):
            raise UsageError(f"--out {directory} holds something that is no run; name another folder.")
        return None
    differs = may_continue(status, wanted)
    if differs and holds_work(directory):
        raise UsageError(f"--out {directory} holds another run ({differs}); name another folder.")
    return None if differs else status


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold a run directory alone; the lock goes with the process, however that ends.

    Raises:
        UsageError: another process holds it, or it cannot be written.
    """
    holder = directory / "run.holder"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = FileLock(directory / "run.lock")
        held.acquire(timeout=0)
    except Timeout:
        held_by = read_holder(holder)
        raise UsageError(f"{directory} is in use by {held_by}; wait for it, or name another --out.") from None
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be written ({error.strerror or error}); name another folder with --out."
        ) from None
    try:
        write_holder(holder)
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


@contextlib.contextmanager
def claim(directory: Path, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Hold a run's directory while the block runs; it is given back where the block fails before anything is saved.

    Yields:
        run.json of an earlier try of the same run; empty where there was none.

    Raises:
        UsageError: the directory holds another run or something else, is in use, or cannot be written.
    """
    check_directory(directory, identity)
    new, given_back = not directory.exists(), False
    try:
        with lock(directory):
            status = check_directory(directory, identity)
            for path in directory.glob(".*.tmp"):  # what a killed process was writing; nobody else writes here now
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if status is None:
                clear(directory)
            done = (
                status is not None
                and status.get("status") == "finished"
                and not identity_difference(status.get("identity", {}), identity)
            )
            if not done:
                write_status(directory, identity=identity, status="running", step=(status or {}).get("step", 0))
            try:
                yield status or {}
            except BaseException as error:
                if not holds_work(directory) and not any(directory.glob("nonfinite-*")):
                    clear(directory)
                    given_back = True
                elif not done:
                    stopped = isinstance(error, Stopped | KeyboardInterrupt)
                    with contextlib.suppress(OSError):
                        write_status(directory, status="stopped" if stopped else "failed")
                    if isinstance(error, Interruption):  # what an earlier part has saved is there
                        raise Stopped(
                            f"Stopped by {error.name}; run the same command again to continue {directory}."
                        ) from None
                raise
    finally:
        if new and given_back:
            shutil.rmtree(directory, ignore_errors=True)


def clear(directory: Path) -> None:
    """Remove everything but the lock."""
    for path in directory.iterdir():
        if path.name not in ("run.lock", "run.holder"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
