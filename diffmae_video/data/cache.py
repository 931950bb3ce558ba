"""Whole remote shards in a bounded local folder, shared by all processes of a machine and safe against crashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
from pathlib import Path

from filelock import FileLock

from diffmae_video.data.manifest import Manifest, ShardInfo
from diffmae_video.data.remote import filesystem, join, retry
from diffmae_video.errors import DataError
from diffmae_video.files import cache_folder, sha256_of


class ShardCache:
    """Local copies of the shards of one remote manifest.

    A shard is downloaded once per machine (a lock file per shard), checked against the size and sha256 of the manifest,
    and renamed into place; the oldest ones go when the bound is reached. Files that are open elsewhere stay readable.

    Args:
        manifest: what to fetch.
        folder: the cache; `~/.cache/diffmae` (or XDG_CACHE_HOME) by default.
        gib: bound on all files of the folder, GiB; the shard in use is always kept.
    """

    def __init__(self, manifest: Manifest, folder: str | None = None, gib: float = 50.0):
        self.manifest, self.bound = manifest, int(gib * 2**30)
        self.base = Path(folder) if folder else cache_folder()
        self.folder = self.base / hashlib.sha256(manifest.hash.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ahead: threading.Thread | None = None
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._asked: set[int] = set()

    def fetch(self, shard: int) -> str:
        """Path of the local copy of a shard, downloaded if it is not there.

        Raises:
            DataError: it cannot be downloaded, or what came does not match the manifest.
        """
        info = self.manifest.shards[shard]
        path = self.folder / info.name.replace("/", "_")
        with FileLock(path.with_suffix(".lock")):
            if not _is_whole(path, info):
                self._make_room(info.bytes, keep=path)
                self._download(join(self.manifest.root, info.name), path, info.bytes, info.sha256)
                _is_whole(path, info)
        with contextlib.suppress(OSError):
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # recently used, not changed
        return str(path)

    def prefetch(self, shards: list[int]) -> None:
        """Download shards in the background, in order; one that fails is left for the reader, who will say so."""
        for shard in shards:
            if shard not in self._asked:
                self._asked.add(shard)
                self._queue.put(shard)
        if self._ahead is None:
            self._ahead = threading.Thread(target=self._fetch_all, daemon=True)
            self._ahead.start()

    def _fetch_all(self) -> None:
        while True:
            shard = self._queue.get()
            with contextlib.suppress(DataError, OSError):
                self.fetch(shard)
            self._asked.discard(shard)

    def _download(self, url: str, path: Path, size: int, sha256: str) -> None:
        files, inner = filesystem(url)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")

        def once() -> None:
            files.get_file(inner, str(temporary))
            came = temporary.stat().st_size
            if came != size:
                raise OSError(f"{came} of {size} bytes came")
            if sha256_of(temporary) != sha256:
                raise OSError("the checksum does not match")

        try:
            retry(once, f"Downloading {url}")
            os.replace(temporary, path)
        except FileNotFoundError as error:
            raise DataError(f"{url} is missing; run `diffmae verify` on the shards.") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int, keep: Path) -> None:
        with FileLock(self.base / "evict.lock"):
            found = []
            for path in self.base.glob("*/*.tar*"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if path.suffix == ".tmp" and time.time() - status.st_mtime > 3600:  # left by a crash
                        path.unlink(missing_ok=True)
                    elif path.suffix == ".tar" and path != keep:
                        found.append((status.st_atime, status.st_size, path))
            total = sum(one[1] for one in found)
            for _, taken, path in sorted(found):
                if total + size <= self.bound:
                    return
                path.unlink(missing_ok=True)
                path.with_suffix(".ok").unlink(missing_ok=True)
                total -= taken


def _is_whole(path: Path, info: ShardInfo) -> bool:
    """Whether a file is the shard; a note beside it saves reading it again as long as nothing touched it."""
    note = path.with_suffix(".ok")
    try:
        status = path.stat()
        state = f"{info.sha256} {status.st_size} {status.st_mtime_ns}"
        if status.st_size != info.bytes:
            return False
        if note.exists() and note.read_text(encoding="ascii", errors="replace") == state:
            return True
        if sha256_of(path) != info.sha256:
            return False
        note.write_text(state, encoding="ascii")
    except FileNotFoundError:
        return False
    return True
