"""`diffmae study run`: every missing run of a study, one after another or several at once.

Each cell of the study (config.study) is one `diffmae` command in a process of its own, whose folder tells whether it is
done. So a killed study goes on where it was: finished cells are skipped, interrupted ones resume by themselves.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from diffmae_video.config.study import Cell, Grid, Study, expand, read_study
from diffmae_video.errors import DiffmaeError, Stopped, UsageError
from diffmae_video.files import write_atomic
from diffmae_video.pipelines import console
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training.run import read_status
from diffmae_video.training.signals import stop_on_signal

STUDY_FILE = "study.json"
"""What a study's folder holds beside `cells/`: the study itself, so that `study table` needs nothing else."""
_POLL_SECONDS = 0.2
_COMMAND = "import sys; from diffmae_video.cli.app import main; main()"


@dataclass(frozen=True)
class StudyRun:
    """What `run_study` came to."""

    directory: Path
    cells: int
    ran: int
    """Cells that were run now; the others were done."""


def run_study(
    name_or_path: str,
    data: Mapping[str, str],
    out: Path | None = None,
    jobs: int = 1,
    device: str = "auto",
    dry_run: bool = False,
) -> StudyRun | None:
    """Run what is missing of a study.

    Args:
        name_or_path: a built-in study or a TOML file.
        data: shards by name of the data set; the workspace's newest of that name without it.
        out: folder of the study; `runs/study-NAME` without it. A folder that holds this study is continued.
        jobs: commands that run at once.
        device: of every stage.
        dry_run: print arms, cost and what is missing, and make nothing; returns None.

    Raises:
        UsageError: an unknown study, recipe, key or data set; a folder that holds another study.
        DiffmaeError: a cell failed; the others were run all the same.
        Stopped: a signal came; every running cell was asked to save.
    """
    study = read_study(name_or_path)
    grid = expand(study)
    shards = find_shards(grid, data)
    directory = (out or Workspace.here().folder / "runs" / f"study-{study.name}").resolve()
    if dry_run:
        from diffmae_video.pipelines.study_plan import print_study_plan

        print_study_plan(study, grid, shards, directory, device)
        return None
    with _claimed(directory, study):
        missing = [cell for cell in grid.cells.values() if not is_done(directory, cell)]
        console.say(
            f"Study {study.name}: {len(grid.cells)} runs, {len(missing)} of them missing, "
            f"{jobs} at a time, in {directory}."
        )
        failed = _run_all(missing, directory, shards, jobs, device)
    if failed:
        raise DiffmaeError(
            f"{len(failed)} of {len(grid.cells)} runs of study {study.name} failed or lack the run before them, the "
            f"first is {failed[0]}: read {directory / 'cells' / failed[0]}.log, then run the same command again."
        )
    return StudyRun(directory, len(grid.cells), len(missing))


def study_command(
    name_or_path: str, data: Sequence[str], out: Path | None, jobs: str, device: str, dry_run: bool
) -> StudyRun | None:
    """`run_study` and `write_slurm` with texts as the command line gives them.

    Raises:
        UsageError: `data` is not NAME=PATH, or `jobs` neither a number from 1 on nor `slurm`.
    """
    shards: dict[str, str] = {}
    for text in data:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"--data {text}: write it as NAME=PATH, for example cifar10=shards/cifar10.")
        shards[name] = path
    if jobs == "slurm" and not dry_run:
        write_slurm(name_or_path, shards, out, device)
        return None
    if jobs != "slurm" and (not jobs.isdecimal() or int(jobs) < 1):
        raise UsageError(f"--jobs {jobs}: give a number from 1 on, or slurm.")
    count = 1 if jobs == "slurm" else int(jobs)
    result = run_study(name_or_path, shards, out, count, device, dry_run)
    if result is not None:
        console.say(f"Done: {result.ran} runs now. Read it with `diffmae study table {result.directory}`.")
    return result


def find_shards(grid: Grid, data: Mapping[str, str]) -> dict[str, str]:
    """Shards of every data set that a study names.

    Raises:
        UsageError: one is not given and not known here, or one is given that the study does not use.
    """
    names = {name for cell in grid.cells.values() for name in cell.data}
    if unused := sorted(set(data) - names):
        raise UsageError(f"--data {unused[0]}=...: the study does not use it; it uses {', '.join(sorted(names))}.")
    found = {}
    for name in sorted(names):
        entry = None if name in data else Workspace.here().latest("shards", dataset=name)
        if name not in data and entry is None:
            raise UsageError(
                f"No shards of {name} are known here: make them with `diffmae shard SRC OUT --dataset {name}`, or give "
                f"--data {name}=PATH."
            )
        path = data[name] if entry is None else entry.path
        found[name] = path if "://" in path else str(Path(path).resolve())
    return found


def arguments_of(cell: Cell, directory: Path, shards: Mapping[str, str], device: str) -> list[str]:
    """The `diffmae` command of a cell, without `diffmae` itself."""
    cells = directory / "cells"
    start = "scratch" if cell.needs is None else str(cells / cell.needs)
    data = ["--data", ",".join(shards[name] for name in cell.data)]
    common = [f"--set={text}" for text in cell.overrides]
    common += [*data, "--out", str(cells / cell.name), "--seed", str(cell.seed), "--device", device]
    if cell.stage == "pretrain":
        return ["pretrain", f"--{cell.kind}", "--recipe", cell.recipe, *common]
    if cell.stage == "finetune":
        protocol = ["--protocol", cell.protocol or "finetune"]
        return ["finetune", "--task", cell.data[0], "--init", start, *protocol, "--recipe", cell.recipe, *common]
    if cell.stage == "eval":
        return ["eval", "--task", cell.data[0], "--checkpoint", start, *common]
    return ["eval", "--task", "inpaint", "--checkpoint", start, "--masks", ",".join(cell.masks), *common]


def is_done(directory: Path, cell: Cell) -> bool:
    """Whether a cell's folder holds its result."""
    status = read_status(directory / "cells" / cell.name)
    return status is not None and status.get("status") == "finished"


def _is_held(directory: Path, cell: Cell) -> bool:
    """Whether a process works in a cell's folder: one that an earlier `study run` started and did not outlive."""
    file = directory / "cells" / cell.name / "run.lock"
    if not file.is_file():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True


def load_study(directory: Path) -> tuple[Study, Grid]:
    """The study that a folder holds.

    Raises:
        UsageError: it holds none.
    """
    try:
        text = (directory / STUDY_FILE).read_text(encoding="utf-8")
        study = Study.model_validate_json(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{directory} holds no study; give the folder of `diffmae study run`.") from error
    return study, expand(study)


@contextlib.contextmanager
def _claimed(directory: Path, study: Study) -> Iterator[None]:
    """Hold the study's folder alone, with the study written in it."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / "study.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"{directory} is in use by another `diffmae study run`; wait for it.") from None
    try:
        file = directory / STUDY_FILE
        if file.is_file():
            held, _ = load_study(directory)
            if held.name != study.name:
                raise UsageError(f"--out {directory} holds the study {held.name}; name another folder.")
        (directory / "cells").mkdir(exist_ok=True)
        write_atomic(file, study.model_dump_json(indent=1) + "\n")
        yield
    finally:
        lock.release()


def _run_all(missing: list[Cell], directory: Path, shards: Mapping[str, str], jobs: int, device: str) -> list[str]:
    """Run cells as soon as what they need is there; returns the names of those that failed or could not start."""
    waiting, failed = list(missing), []
    open_cells = {cell.name for cell in missing}  # neither done nor failed
    running: dict[str, subprocess.Popen[bytes]] = {}
    with stop_on_signal() as stop, console.progress(len(missing), "study", "runs") as bar:
        try:
            while waiting or running:
                if stop:
                    raise Stopped(
                        f"Stopped by {stop.name}; run the same command again to continue the study in {directory}."
                    )
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        open_cells.discard(name)
                        cell = next(cell for cell in missing if cell.name == name)
                        if not is_done(directory, cell):
                            if _is_held(directory, cell):  # the process of an earlier try was there first
                                waiting.append(cell)
                                open_cells.add(name)
                                continue
                            failed.append(name)
                            console.say(f"Failed: {name} (exit code {process.returncode}).")
                        bar.update(1, last=name)
                lost = [cell for cell in waiting if cell.needs in failed]
                failed += [cell.name for cell in lost]
                open_cells -= {cell.name for cell in lost}
                waiting = [cell for cell in waiting if cell not in lost]
                ready = [cell for cell in waiting if cell.needs not in open_cells]
                for cell in ready[: jobs - len(running)]:
                    if _is_held(directory, cell):
                        continue
                    waiting.remove(cell)
                    if is_done(directory, cell):  # by a process of an earlier try
                        open_cells.discard(cell.name)
                        bar.update(1, last=cell.name)
                        continue
                    running[cell.name] = _start(cell, directory, shards, jobs, device)
                time.sleep(_POLL_SECONDS)
        finally:
            for process in running.values():
                with contextlib.suppress(OSError):
                    process.terminate()  # a stage saves and leaves
            for process in running.values():
                process.wait()
    return failed


def _start(cell: Cell, directory: Path, shards: Mapping[str, str], jobs: int, device: str) -> subprocess.Popen[bytes]:
    folder = directory / "cells" / cell.name
    arguments = arguments_of(cell, directory, shards, device)
    environment = {**os.environ, "DIFFMAE_WORKSPACE": str(directory)}
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with open(folder.with_name(f"{cell.name}.log"), "ab") as log:
        log.write(f"$ diffmae {shlex.join(arguments)}\n".encode())
        log.flush()
        # -P: a folder that holds a file named like a module must not run it
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # a Ctrl-C reaches this process alone, which then asks the stages to save
        )


def write_slurm(name_or_path: str, data: Mapping[str, str], out: Path | None, device: str = "auto") -> Path:
    """Write `study.sbatch`: an array for pre-training, then one for what needs it, each after the one before.

    Returns:
        The script, to be run with `bash` on a login node; it submits the arrays.
    """
    study = read_study(name_or_path)
    grid = expand(study)
    shards = find_shards(grid, data)
    directory = (out or Workspace.here().folder / "runs" / f"study-{study.name}").resolve()
    with _claimed(directory, study):
        levels: list[list[str]] = []
        depth: dict[str, int] = {}
        for cell in grid.cells.values():
            depth[cell.name] = 0 if cell.needs is None else depth[cell.needs] + 1
            if is_done(directory, cell):
                continue
            while len(levels) <= depth[cell.name]:
                levels.append([])
            levels[depth[cell.name]].append(shlex.join(["diffmae", *arguments_of(cell, directory, shards, device)]))
        lines = [
            "#!/usr/bin/env bash",
            f"# Study {study.name}: run on a login node, `bash study.sbatch [options of sbatch, e.g. --gres=gpu:1]`.",
            "set -euo pipefail",
            f"export DIFFMAE_WORKSPACE={shlex.quote(str(directory))}",
            'after=""',
        ]
        for number, commands in enumerate(levels):
            if not commands:
                continue
            file = directory / f"level-{number}.txt"
            write_atomic(file, "\n".join(commands) + "\n")
            run = f'eval "$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(file))})"'
            lines.append(
                f"after=$(sbatch --parsable $after --job-name={shlex.quote(study.name)}-{number} "
                f'--array=1-{len(commands)} --signal=B:USR1@120 "$@" --wrap={shlex.quote(run)})'
            )
            lines.append('after="--dependency=afterany:$after"')
        script = directory / "study.sbatch"
        write_atomic(script, "\n".join(lines) + "\n")
    console.say(
        f"Wrote {script}: run it with `bash` on a login node; `diffmae study table {directory}` reads the results."
    )
    return script
