"""A run's directory: who holds it, what it is, and whether it may be continued."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffmae_video.config import Settings, settings_toml
from diffmae_video.errors import UsageError
from diffmae_video.files import write_atomic

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
        "wandb",
    },
}
_SECTIONS = ("seed", "model", "diffusion", "mask", "data", "train", "finetune")


def identity(settings: Settings, kind: str, data: str) -> dict[str, Any]:
    """What makes two runs the same: kind, data (a manifest's hash), and the settings that decide what is computed."""
    tables = settings.model_dump(mode="json", exclude_none=True)
    kept = {"kind": kind, "data": data}
    for section in _SECTIONS:
        if section == "finetune" and kind == "pretrain":
            continue
        table = tables[section]
        if isinstance(table, dict):
            table = {key: value for key, value in table.items() if key not in _FREE.get(section, set())}
        kept[f"settings.{section}"] = table
    return kept


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first thing in which two identities differ, in words; None where they agree."""
    if old.get("kind") != new["kind"]:
        return f"it is a {old.get('kind')} run"
    for section in _SECTIONS:
        before, after = old.get(f"settings.{section}"), new.get(f"settings.{section}")
        if before == after:
            continue
        if not isinstance(before, dict) or not isinstance(after, dict):
            return f"{section} was {before}, not {after}"
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                return f"{section}.{key} was {before.get(key)}, not {after.get(key)}"
    return "its data has changed" if old.get("data") != new["data"] else None


def read_status(directory: Path) -> dict[str, Any] | None:
    """run.json of a directory: identity, status, step, total; None where there is none that can be read."""
    try:
        return dict(json.loads((directory / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def check_directory(directory: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The status of the same run in `directory`, or None where the folder is new.

    Raises:
        UsageError: the folder holds another run, or something else.
    """
    if directory.is_file():
        raise UsageError(f"--out {directory} is a file; name a folder.")
    status = read_status(directory)
    if status is None:
        if directory.is_dir() and any(path.name != "run.lock" for path in directory.iterdir()):
            raise UsageError(f"--out {directory} holds something that is no run; name another folder.")
        return None
    if differs := difference(status.get("identity", {}), wanted):
        raise UsageError(f"--out {directory} holds another run ({differs}); name another folder.")
    return status


def write_status(directory: Path, **fields: Any) -> None:
    """Write run.json whole: what it held, with `fields` replaced."""
    write_atomic(directory / "run.json", json.dumps({**(read_status(directory) or {}), **fields}, indent=1) + "\n")


def write_settings(directory: Path, settings: Settings) -> None:
    """Save the resolved settings as config.toml."""
    write_atomic(directory / "config.toml", settings_toml(settings))


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold a run directory alone; the lock goes with the process, however that ends.

    Raises:
        UsageError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "run.lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UsageError(f"{directory} is in use by {holder}; wait for it, or name another --out.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
