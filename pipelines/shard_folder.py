"""The destination of a `shard` run: what it holds, whether that is ours, and what may be removed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffmae_video.data.manifest import MANIFEST, TABLE
from diffmae_video.data.remote import is_remote, join, list_files, read_file, remove
from diffmae_video.errors import UsageError
from diffmae_video.files import read_holder, write_holder
from diffmae_video.pipelines.shard_job import PARTS, is_there, parts_of

REJECTED = "rejected.jsonl"


@contextlib.contextmanager
def hold(out: str) -> Iterator[None]:
    """Hold a local destination alone while the block runs; stores have no locks.

    Raises:
        UsageError: another process writes there, or it cannot be written.
    """
    if is_remote(out):
        yield
        return
    if os.path.isfile(out):
        raise UsageError(f"{out} is a file; name a folder for the shards.")
    folder = Path(parts_of(out))
    lock, holder = FileLock(folder / "lock"), folder / "holder"
    try:
        while not lock.is_locked:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            if not Path(lock.lock_file).exists():  # the run that held it has just ended and removed it
                lock.release()
        write_holder(holder)
    except Timeout:
        raise UsageError(f"{out} is in use by {read_holder(holder)}; wait for it, or name another folder.") from None
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); name another folder.") from error
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        if {path.name for path in folder.glob("*")} == {"lock"}:  # nothing is left to go on with
            forget(out)
        lock.release()


def forget(out: str) -> None:
    """Remove what only an unfinished run needs."""
    if is_remote(out):
        remove(parts_of(out), recursive=True)
    else:
        shutil.rmtree(parts_of(out), ignore_errors=True)


def compare(out: str, record: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Look at what `out` holds: None to go on, the manifest's body when everything is done already."""
    if is_remote(out):
        names = {path.rpartition("/")[2] for path in list_files(out)}
    else:
        names = set(os.listdir(out)) if os.path.isdir(out) else set()
    before, body = None, None
    if MANIFEST in names:
        try:
            body = json.loads(read_file(join(out, MANIFEST)))
            before = body.get("facts", {})
        except (ValueError, AttributeError):
            body, before = None, {}
    else:
        with contextlib.suppress(FileNotFoundError, ValueError):
            before = json.loads(read_file(join(parts_of(out), "run.json")))
    if before is None and any(name.endswith(".tar") for name in names) and not overwrite:
        raise UsageError(f"{out} holds tars that this command did not make; name another folder or give --overwrite.")
    if before is not None and before.get("jobs") != record["jobs"]:
        if not overwrite:
            changed = _changes(before, record)
            raise UsageError(f"{out} holds other shards: {changed}; name another folder or give --overwrite.")
        body = None
        _clear(out)
    elif before is None and overwrite:
        _clear(out)
    if body is not None and all(is_there(out, info) for info in body["shards"]):
        return body
    if not is_remote(out):
        for leftover in Path(parts_of(out)).glob("*.tmp"):
            leftover.unlink(missing_ok=True)
    return None


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    if "jobs" not in before:
        return "this command did not write their manifest"
    told = []
    if before.get("encoding") != now["encoding"]:
        told.append(f"version {before.get('version')} made them in another way")
    if before.get("source") != now["source"]:
        told.append(f"the source was {before.get('source')}")
    if before.get("digest") != now["digest"]:
        then, present = (f"{one.get('inputs')} files of {one.get('input_bytes')} bytes" for one in (before, now))
        told.append(f"the input changed ({then} then, {present} now)")
    old = before.get("options") or {}
    told += [
        f"{name} was {old.get(name)}, is {value}" for name, value in now["options"].items() if old.get(name) != value
    ]
    return ", ".join(told) or "the number of samples per shard changed"


def _is_ours(name: str) -> bool:
    return name in (MANIFEST, REJECTED, TABLE) or re.fullmatch(r"[a-z0-9_-]+-\d{6}\.tar", name) is not None


def _clear(out: str) -> None:
    """Remove what a former run left, and nothing else."""
    if is_remote(out):
        for path in list_files(out):
            if _is_ours(path.rpartition("/")[2]) or f"/{PARTS}/" in path:
                remove(path)
        return
    for path in Path(out).iterdir():
        if _is_ours(path.name):
            path.unlink()
    for path in Path(parts_of(out)).glob("*.json"):
        path.unlink()
