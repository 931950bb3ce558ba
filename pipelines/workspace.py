"""What stages made in this folder, so that the next stage finds it: `.diffmae/workspace.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from diffmae_video.errors import UsageError
from diffmae_video.files import write_atomic

_MADE_BY = {
    "shards": "diffmae shard SRC OUT",
    "pretrain": "diffmae pretrain --video",
    "finetune": "diffmae finetune --task NAME",
    "eval": "diffmae eval --task NAME",
    "render": "diffmae render-inpaint CLIP",
}


@dataclass(frozen=True)
class Entry:
    """One result of a stage: what kind, where it lies, when it was made, and facts about it (task, dataset, ...)."""

    kind: str
    path: str
    made: str
    facts: dict[str, Any] = field(default_factory=dict)

    def exists(self) -> bool:
        """Whether it is still there; URLs are taken on trust."""
        return "://" in self.path or Path(self.path).exists()


class Workspace:
    """The record of one folder.

    Several processes may write to it; each write locks, re-reads, and replaces the file whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / ".diffmae" / "workspace.json"

    @classmethod
    def here(cls) -> Workspace:
        """The workspace of the current folder, or of the one that DIFFMAE_WORKSPACE names."""
        return cls(Path(os.environ.get("DIFFMAE_WORKSPACE", ".")).resolve())

    def entries(self) -> list[Entry]:
        """All results on record, oldest first; a damaged record counts as empty."""
        try:
            rows = json.loads(self.file.read_text(encoding="utf-8"))["entries"]
            return [Entry(row["kind"], row["path"], row["made"], dict(row["facts"])) for row in rows]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def record(self, kind: str, path: str | Path, **facts: Any) -> None:
        """Put a result on record; an older entry of the same kind and path is replaced.

        Args:
            kind: `shards`, `pretrain`, `finetune`, `eval` or `render`.
            path: folder or URL; local paths are stored absolute.
            facts: plain values to choose by later, e.g. `task="k400"`.
        """
        text = str(path)
        if "://" not in text:
            text = str(Path(text).resolve())
        entry = Entry(kind, text, datetime.now(UTC).isoformat(timespec="seconds"), facts)
        with self._lock():
            kept = [old for old in self.entries() if (old.kind, old.path) != (kind, text)]
            rows = [asdict(one) for one in [*kept, entry]]
            write_atomic(self.file, json.dumps({"format": 1, "entries": rows}, indent=1) + "\n")

    def latest(self, kind: str, **facts: Any) -> Entry | None:
        """The newest result of a kind that still exists and whose facts equal those given (None: any value)."""
        wanted = {name: value for name, value in facts.items() if value is not None}
        for entry in reversed(self.entries()):
            matches = all(entry.facts.get(name) == value for name, value in wanted.items())
            if entry.kind == kind and matches and entry.exists():
                return entry
        return None

    def require(self, kind: str, option: str, **facts: Any) -> Entry:
        """Like `latest`, but its absence is an error that names the command to run or the option to give.

        Raises:
            UsageError: nothing of that kind is on record.
        """
        entry = self.latest(kind, **facts)
        if entry is None:
            wanted = " ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
            what = f"{kind} result{f' for {wanted}' if wanted else ''}"
            raise UsageError(f"No {what} is known in {self.folder}: run `{_MADE_BY[kind]}` first or give {option}.")
        return entry

    def new_run_directory(self, kind: str, out: Path | None = None) -> Path:
        """Where a new run goes: `out`, or the next free `runs/KIND-001`. The folder is not made here.

        Raises:
            UsageError: `out` is a file, or holds something already.
        """
        if out is not None:
            if out.is_file():
                raise UsageError(f"--out {out} is a file; name a new folder.")
            if out.is_dir() and any(out.iterdir()):
                raise UsageError(f"--out {out} already holds something; name another folder or remove it.")
            return out
        runs = self.folder / "runs"
        taken = [path.name.removeprefix(f"{kind}-") for path in runs.glob(f"{kind}-*")]
        number = max((int(text) for text in taken if text.isdigit()), default=0) + 1
        return runs / f"{kind}-{number:03d}"

    def check_writable(self) -> None:
        """Refuse a folder in which nothing can be put on record, before the work rather than after it.

        Raises:
            UsageError: it cannot be written.
        """
        with self._lock():
            pass

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the record alone."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            held = FileLock(self.file.with_suffix(".lock"))
            held.acquire()
        except OSError as error:
            raise UsageError(
                f"{self.file.parent} cannot be written ({error.strerror or error}); run in a writable folder, or name "
                "one with DIFFMAE_WORKSPACE."
            ) from error
        try:
            yield
        finally:
            held.release()
