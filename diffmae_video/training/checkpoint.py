"""Checkpoints: written by torch.distributed.checkpoint as safetensors, whole or not there, resharded on load.

A checkpoint is a directory `step-00001000` of safetensors files, one a rank (nothing in it is ever unpickled), and a
`state.json` with the numbers of the run and the size and SHA-256 of each file. It is written under another name and
renamed once everything is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from diffmae_video.data.remote import retry
from diffmae_video.errors import DataError, DiffmaeError, StorageError
from diffmae_video.files import sha256_of, sync_path, write_atomic
from diffmae_video.training.distributed import Distributed

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # several lines a tensor otherwise
# our runs of one process need no process group
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
_NAME = re.compile(r"step-(\d{8,})")
FORMAT = 1
_FAILURES = (Exception, dcp.CheckpointException)  # the latter is no Exception
Then = Callable[[], None]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: where it is and the numbers saved with it."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def step_name(step: int) -> str:
    """Directory name of a checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, newest step first (by number, never by time or name)."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def read_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint's files against their sizes and SHA-256.

    Raises:
        DataError: something is missing or differs, or its step is no number of steps.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = state["files"]
        if state["format"] != FORMAT or not files:
            raise DataError(
                f"Checkpoint {path} is of another format ({state['format']}); use the release that wrote it."
            )
        step, named = state["step"], _NAME.fullmatch(path.name)
        if type(step) is not int or not 0 <= step < 10**12 or (named and int(named[1]) != step):
            raise DataError(f"Checkpoint {path} says that it is of step {step!r}; delete it to use the one before it.")
        for name, (size, digest) in files.items():
            file = path / name
            if (
                Path(name).name != name
                or not file.is_file()
                or file.stat().st_size != size
                or sha256_of(file) != digest
            ):
                raise DataError(f"Checkpoint {path} is damaged in {name}; delete it to use the one before it.")
    except (AttributeError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"Checkpoint {path} has no readable state.json ({error}); delete it.") from error
    return Checkpoint(path, state)


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are skipped, each with a warning."""
    for path in list_checkpoints(folder):
        try:
            return read_checkpoint(path)
        except DataError as error:
            warn(f"Skipping {path.name}: {error}")
    return None


def load_tensors(found: Checkpoint, tensors: dict[str, Tensor], world: int) -> None:
    """Fill `tensors` in place from a checkpoint, whatever the number of processes that wrote it.

    Raises:
        DiffmaeError: a tensor is missing or has another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(found.path))
    saved: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    for name, tensor in tensors.items():
        if name not in saved or tuple(saved[name].size) != tuple(tensor.shape):
            what = (
                "is missing" if name not in saved else f"has shape {tuple(saved[name].size)}, not {tuple(tensor.shape)}"
            )
            raise DiffmaeError(f"Checkpoint {found.path}: {name} {what}; it belongs to a run with other settings.")
    unknown = [name for name in saved if name not in tensors and not name.startswith("rng.")]
    if unknown:
        raise DiffmaeError(f"Checkpoint {found.path} holds {unknown[0]}, which this run has no place for.")
    try:
        dcp.load(dict(tensors), storage_reader=reader, no_dist=world == 1)
    except dcp.CheckpointException as error:
        raise DiffmaeError(f"Checkpoint {found.path} cannot be read ({_full_text(error).splitlines()[0]}).") from error


class Checkpointer:
    """Saves checkpoints in a thread while training goes on, and keeps the newest, the best and the chosen ones.

    Args:
        folder: where the `step-...` directories go.
        distributed: the processes; each writes its own shards.
        keep_last: newest checkpoints kept.
        keep_every: multiples of this many steps are kept for good; 0 for none.
        mirror: fsspec URL of a folder that receives a copy of each checkpoint (`s3://...`), or None.
    """

    def __init__(
        self,
        folder: Path,
        distributed: Distributed,
        keep_last: int = 2,
        keep_every: int = 0,
        mirror: str | None = None,
    ) -> None:
        self.folder = folder
        self.distributed = distributed
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.mirror = mirror
        self.best_step: int | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        # collectives of the writing thread must not mix with those of training
        self._group: Any = dist.new_group(backend="gloo") if distributed.world > 1 else None
        if distributed.main:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(".tmp-*"):  # an interrupted save; the lock of the run says nobody writes now
                shutil.rmtree(stale, ignore_errors=True)
        distributed.barrier()

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any], then: Then | None = None) -> None:
        """Copy everything to host memory, then write in the background. Waits for the save before it.

        Args:
            tensors: of this rank; tensors that all ranks hold alike are written once.
            state: numbers of the run, JSON-like; must hold "step".
            then: called on rank 0 in the writing thread once the checkpoint stands.

        Raises:
            DiffmaeError: the save before this one failed.
        """
        self.wait()
        stager = DefaultStager(StagingOptions(False, False, False, False))  # that of torch 2.11 serves once
        copy: Any = stager.stage(tensors)
        stager.close()
        self._pending = self._pool.submit(self._write, copy, dict(state), then)

    def poll(self) -> None:
        """Raise what a finished save raised; return at once where one is under way."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint under way stands."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait and end the writing thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any], then: Then | None) -> None:
        final = self.folder / step_name(state["step"])
        temporary = self.folder / f".tmp-{final.name}"
        error: BaseException | None = None
        try:
            if self.distributed.main:
                temporary.mkdir(parents=True, exist_ok=True)
            self._agree(None)
            writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            if self.distributed.main:
                self._finish(temporary, final, state)
        except _FAILURES as caught:
            error = caught
        try:
            self._agree(error)
        except _FAILURES as failed:
            if self.distributed.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise _save_error(failed, final) from failed
        if self.distributed.main:
            self._prune(state["step"])
            if self.mirror:
                copy_to_mirror(final, self.mirror)
            if then is not None:
                try:
                    then()
                except OSError as caught:
                    raise _save_error(caught, final) from caught

    def _agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any rank brings an error. A collective of the writing threads."""
        if self._group is None:
            if error is not None:
                raise error
            return
        texts: list[Any] = [None] * self.distributed.world
        dist.all_gather_object(texts, None if error is None else _full_text(error), group=self._group)
        if error is not None:
            raise error
        if any(texts):
            raise DiffmaeError(next(text for text in texts if text))

    def _finish(self, temporary: Path, final: Path, state: dict[str, Any]) -> None:
        files = {}
        for file in sorted(temporary.glob("*.safetensors")):
            sync_path(file)
            files[file.name] = [file.stat().st_size, sha256_of(file)]
        write_atomic(temporary / "state.json", json.dumps({"format": FORMAT, **state, "files": files}, indent=1))
        sync_path(temporary)
        if final.exists():  # written before by a run that was resumed from an older one
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_path(self.folder)

    def _prune(self, newest: int) -> None:
        kept = 0
        for path in list_checkpoints(self.folder):
            step = int(path.name[5:])
            if step > newest:  # left by a timeline that was abandoned (--resume PATH to an older step)
                shutil.rmtree(path, ignore_errors=True)
                continue
            kept += 1
            chosen = self.keep_every and step % self.keep_every == 0
            if kept > self.keep_last and step != self.best_step and not chosen:
                doomed = path.with_name(f".tmp-old-{path.name}")  # a half-deleted one must not look like a checkpoint
                with contextlib.suppress(OSError):
                    os.rename(path, doomed)
                    shutil.rmtree(doomed)


def copy_to_mirror(path: Path, mirror: str) -> None:
    """Copy a checkpoint to an fsspec folder; state.json goes last, so that a copy without it is no checkpoint."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(f"{mirror.rstrip('/')}/{path.name}")
    filesystem.makedirs(root, exist_ok=True)
    names = sorted((file.name for file in path.iterdir()), key=lambda name: name == "state.json")
    for name in names:
        retry(
            partial(filesystem.put_file, str(path / name), f"{root}/{name}"), f"Uploading {mirror}/{path.name}/{name}"
        )


def fetch_from_mirror(mirror: str, folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Bring the newest whole checkpoint of a mirror into `folder`; None where there is none.

    Raises:
        StorageError: the store does not answer: that says nothing of the checkpoints, so no older one is taken.
    """
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(mirror.rstrip("/"))
    if not retry(lambda: filesystem.exists(root), f"Looking at {mirror}"):
        return None
    entries = retry(lambda: filesystem.ls(root, detail=False), f"Listing {mirror}")
    names = [entry.rstrip("/").rpartition("/")[2] for entry in entries]
    for name in sorted((name for name in names if _NAME.fullmatch(name)), key=lambda name: int(name[5:]), reverse=True):
        temporary = folder / f".tmp-{name}"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            for entry in retry(partial(filesystem.ls, f"{root}/{name}", detail=False), f"Listing {mirror}/{name}"):
                file = entry.rpartition("/")[2]
                retry(partial(filesystem.get_file, entry, str(temporary / file)), f"Downloading {mirror}/{name}/{file}")
            read_checkpoint(temporary)
            os.rename(temporary, folder / name)
            return read_checkpoint(folder / name)
        except StorageError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except (DataError, OSError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            warn(f"Skipping {mirror}/{name}: {error}")
    return None


def _full_text(error: BaseException) -> str:
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        parts.append(str(seen))
        failures = getattr(seen, "failures", None)  # CheckpointException: rank -> (exception, traceback)
        parts += [str(failure[0]) for failure in failures.values()] if failures else []
        seen = seen.__cause__ or seen.__context__
    return " | ".join(parts)


def _save_error(error: BaseException, final: Path) -> DiffmaeError:
    text = _full_text(error)
    folder = final.parent
    whole = [path.name for path in list_checkpoints(folder)]
    left = f"the last whole one is {whole[0]}" if whole else "none stands yet"
    if os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text:
        return DiffmaeError(
            f"No space left in {folder} for checkpoint {final.name} ({left}); free some space or lower "
            "train.keep_last, then run the same command again."
        )
    first = text.split(" | ")[0].strip().splitlines()
    return DiffmaeError(
        f"Checkpoint {final.name} could not be written to {folder} ({first[0] if first else error}); {left}."
    )
