"""One shard as a job: plain values in, a file and a report out; runs in a thread here or on another machine."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import threading
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass
from typing import Any

from diffmae_video.data.manifest import ShardInfo
from diffmae_video.data.remote import filesystem, is_remote, join, read_file, retry, write_file
from diffmae_video.data.shards import TarShard
from diffmae_video.data.transcode import options_from_json
from diffmae_video.data.workers import POOL
from diffmae_video.errors import StorageError
from diffmae_video.files import printable, sync_path

STOP = threading.Event()
"""Set when the run is interrupted: jobs leave after their present clip."""


ENCODING = 2
"""Counts changes in what is made of the same input with the same options: 2 keeps colours, times and geometry."""
PARTS = ".parts"
"""Folder of what an unfinished run knows, below its destination."""


def parts_of(out: str) -> str:
    """Path or URL of that folder."""
    return join(out, PARTS)


@dataclass(frozen=True)
class TarJob:
    """One shard to make; plain values, so that it travels to other machines."""

    name: str
    split: str
    source: str
    out: str
    items: tuple[tuple[str, str, int, str | None, float | None, float | None, int], ...]
    """path, key, label, class, start, end, bytes of each input."""
    options: dict[str, Any]
    seconds: float
    memory: int

    @property
    def digest(self) -> str:
        """What the shard's bytes depend on."""
        text = json.dumps([ENCODING, self.split, self.items, self.options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def run_job(job: TarJob) -> dict[str, Any]:
    """Make one shard, or find it made. Returns {info, rows, rejected, skipped}; runs on any machine."""
    part = join(parts_of(job.out), f"{job.name}.json")
    with contextlib.suppress(FileNotFoundError, ValueError):
        report = json.loads(read_file(part))
        if report["digest"] == job.digest and is_there(job.out, report["info"]):
            return report | {"skipped": True}
    options = options_from_json(job.options)
    worker = POOL.take(job.seconds, job.memory)
    rejected: list[dict[str, str]] = []
    interlaced = 0
    folder = None if is_remote(job.out) else parts_of(job.out)
    temporary, sink = "", HashingFile(None)
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f"{job.name}.", suffix=".tmp", dir=folder)
        with os.fdopen(descriptor, "wb") as file:
            sink.file = file
            tar = TarShard(sink)
            for path, key, label, class_name, start, end, _ in job.items:
                if STOP.is_set():
                    raise CancelledError("interrupted")
                span = (start, end) if start is not None and end is not None else None
                outcome = worker.run(join(job.source, path), options, span)
                if STOP.is_set():  # the worker was killed; its clip is not to blame
                    raise CancelledError("interrupted")
                if outcome.kind == "storage":
                    raise StorageError(outcome.error)
                if outcome.kind:
                    rejected.append({"path": printable(path), "reason": outcome.kind, "detail": outcome.error})
                    continue
                interlaced += bool(outcome.meta.get("interlaced"))
                meta = outcome.meta | {"label": label, "class": class_name, "source": printable(path)}
                if span:
                    meta["span"] = [start, end]
                tar.add(key, outcome.suffix, outcome.data, meta)
                tar.rows[-1]["media"] = hashlib.sha1(outcome.data).hexdigest()  # to find clips that are there twice
            tar.close()
            file.flush()
            os.fsync(file.fileno())
        info = None
        if tar.rows:
            info = asdict(ShardInfo(job.name, job.split, sink.size, sink.digest.hexdigest(), len(tar.rows)))
            publish(temporary, job.out, job.name)
        report = {"digest": job.digest, "info": info, "rows": tar.rows, "rejected": rejected, "interlaced": interlaced}
        write_file(part, json.dumps(report).encode())
        return report | {"skipped": False}
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk of {job.out} is full; free space and run again, finished shards stay."
            ) from error
        raise StorageError(f"{job.out} cannot be written ({error.strerror or error}); run again later.") from error
    finally:
        sink.abandoned = True
        POOL.give(worker)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


class HashingFile:
    """A file that knows the checksum and size of what went through it."""

    def __init__(self, file: Any):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.abandoned = False

    def write(self, data: bytes) -> int:
        """Pass on and take into account."""
        if self.abandoned:  # tarfile writes its end even when it is dropped half-way
            return len(data)
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)


def publish(temporary: str, out: str, name: str) -> None:
    """Give a finished file its name below `out`."""
    if is_remote(out):
        files, inner = filesystem(join(out, name))
        retry(lambda: files.put_file(temporary, inner), f"Uploading {name}")
        return
    os.chmod(temporary, 0o644)
    os.replace(temporary, join(out, name))
    sync_path(out)


def is_there(out: str, info: dict[str, Any] | None) -> bool:
    """Whether a shard of this name and size is in place (True for a job that had nothing to write)."""
    if info is None:
        return True
    path = join(out, info["name"])
    if is_remote(path):
        files, inner = filesystem(path)
        with contextlib.suppress(FileNotFoundError):
            return retry(lambda: files.size(inner), f"Looking at {path}") == info["bytes"]
        return False
    return os.path.exists(path) and os.path.getsize(path) == info["bytes"]
