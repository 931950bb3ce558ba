"""The folder of a run: found or made, held alone, told when it is done; and a stage in several processes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffmae_video.errors import UsageError
from diffmae_video.pipelines.console import progress, say
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training.run import Run, check_directory, claim, identity_difference, read_status, write_status

if TYPE_CHECKING:
    from diffmae_video.training.distributed import Distributed


@dataclass(frozen=True)
class RunFolder(Run):
    """The folder of a run, held by this process (or, on other ranks, by rank 0 of the same run)."""

    def record(self, kind: str | None = None, **facts: Any) -> None:
        """Put the run on record in the workspace.

        Args:
            kind: of the record; without it that of the identity.
            facts: by which later stages choose it, e.g. `task="k400"`.
        """
        if self.main:
            Workspace.here().record(kind or self.identity["kind"], self.directory, **facts)

    def finish(self, **facts: Any) -> None:
        """The run is done: mark it, and put it on record."""
        self.mark_finished()
        self.record(**facts)

    def mark_finished(self) -> None:
        """The run is done, with nothing that a later stage would take."""
        if self.main:
            write_status(self.directory, status="finished")


@contextlib.contextmanager
def open_run(
    job: Job,
    identity: dict[str, Any],
    processes: Distributed | None = None,
    *,
    finished: Literal["refuse", "yield"] = "refuse",
) -> Iterator[RunFolder]:
    """Find or make the folder of a run and hold it while the block runs. A collective.

    The folder is `job.out`, else the newest unfinished one of the same identity under `runs/`, else the next free
    `runs/KIND-001`. It is taken only once something is saved in it: where the block fails before that, what it wrote is
    removed, so that the same folder serves the next try, also with other settings. `finish` in the block marks it done;
    otherwise run.json says `stopped` or `failed`.

    Args:
        identity: what makes two runs the same: at least `kind` (`pretrain`, `eval`, `render`, ...) and `data`, a digest
            of everything that decides the result (`training.run.run_identity` for trainings).
        processes: all that take part; rank 0 holds the folder.
        finished: what becomes of a folder that holds the same run, finished.

    Raises:
        UsageError: the folder holds another run or something else, is in use, or cannot be written.
    """
    main = processes is None or processes.main
    with contextlib.ExitStack() as stack:
        told = None
        if main:
            Workspace.here().check_writable()
            directory = find_run_folder(job, identity)
            if finished == "refuse" and (read_status(directory) or {}).get("status") == "finished":
                raise UsageError(f"--out {directory} already holds this run, finished; name another folder.")
            told = [str(directory), stack.enter_context(claim(directory, identity))]
            if job.command:
                write_status(directory, command=job.command)
        if processes is not None:
            told = processes.broadcast(told)
        assert told is not None
        yield RunFolder(
            Path(told[0]),
            identity,
            earlier=told[1],
            processes=processes,
            resume=job.resume,
            say=say,
            progress=progress,
        )


def find_run_folder(job: Job, identity: dict[str, Any]) -> Path:
    """The folder that `open_run` takes; nothing is made here.

    Raises:
        UsageError: `job.out` holds another run or something else.
    """
    kind, workspace = identity["kind"], Workspace.here()
    if job.out is not None:
        check_directory(job.out, identity)
        return job.out
    if job.resume == "auto":
        for directory in reversed(run_folders(workspace.folder, kind)):
            status = read_status(directory)
            if status is None or status.get("status") == "finished":
                continue
            if not identity_difference(status.get("identity", {}), identity):
                say(f"Found an unfinished run of the same settings and data: {directory}.")
                return directory
    return workspace.new_run_directory(kind)


def run_folders(folder: Path, kind: str) -> list[Path]:
    """Numbered run folders of a kind in a workspace's folder, the oldest first."""
    numbered = [
        (int(match[1]), path)
        for path in (folder / "runs").glob(f"{kind}-*")
        if (match := re.fullmatch(rf"{re.escape(kind)}-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered)]


def launches(job: Job) -> bool:
    """Whether a stage of this job is to run in several processes that do not run yet."""
    return job.nproc > 1 and not job.dry_run


def launch(stage: Callable[..., Any], job: Job, *arguments: Any, **options: Any) -> Any:
    """Run a stage in `job.nproc` processes; returns what it returns on rank 0.

    A stage says so in its first lines::

        if launches(job):
            return launch(pretrain, job, kind)

    Each process calls the same function with `nproc = 1` and finds the others through `training.distributed.start`.

    Raises:
        DiffmaeError: of the kind the failed rank raised. Stopped after SIGTERM, SIGUSR1 or Ctrl-C.
    """
    from diffmae_video.training import distributed

    return distributed.launch(stage, job.nproc, job.with_(nproc=1), *arguments, **options)
