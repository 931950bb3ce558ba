"""Processes: who this one is, how several start, agree and end; torch.distributed with gloo on CPU, nccl on GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from diffmae_video import errors
from diffmae_video.errors import DiffmaeError, Stopped, UsageError
from diffmae_video.processes import safe_path
from diffmae_video.training.hardware import core_count, pick_device
from diffmae_video.training.signals import Interruption, interruptible

INTERRUPTED = 130  # exit code of a process that Ctrl-C ended
SHUTDOWN_SECONDS = 20  # how long the ranks of a stopped run may take to save and leave
_STOPPED, _FAILED = "stopped", "failed"  # files in which launched processes say how they ended


@dataclass(frozen=True)
class Distributed:
    """This process among the processes of a run. The defaults describe a run of a single process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank. A collective; runs over gloo, so it never waits for the GPU."""
        if self.world == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks, on the CPU in float64. A collective."""
        values = values.detach().to("cpu", torch.float64)
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank (JSON-like). A collective."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """`value` of rank 0 (JSON-like), on every rank. A collective."""
        return self.gather(value if self.main else None)[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.any(False)


def ranks_from_environment(environ: MutableMapping[str, str] | None = None) -> tuple[int, int, int, int]:
    """(rank, world, local rank, local world) from torchrun's variables, else Slurm's (inside srun), else one process.

    Under Slurm MASTER_ADDR and MASTER_PORT are set where they are missing: the first host of the job, and a port made
    from the job's number.
    """
    environ = environ if environ is not None else os.environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        world = int(environ["WORLD_SIZE"])
        local = int(environ.get("LOCAL_RANK", "0"))
        return int(environ["RANK"]), world, local, int(environ.get("LOCAL_WORLD_SIZE", str(world)))
    world = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))  # set by srun alone: a batch script's own shell is no task
    if world > 1:
        environ.setdefault("MASTER_ADDR", _first_slurm_host(environ))
        environ.setdefault("MASTER_PORT", str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000))
        nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
        return int(environ["SLURM_PROCID"]), world, int(environ.get("SLURM_LOCALID", "0")), max(1, world // nodes)
    return 0, 1, 0, 1


def _first_slurm_host(environ: MutableMapping[str, str]) -> str:
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
    if "[" not in hosts:
        return hosts.split(",")[0]
    try:
        listing = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        return listing.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        head, _, rest = hosts.partition("[")  # node[003-007,9] -> node003
        return head + rest.split("-")[0].split(",")[0].rstrip("]")


@contextlib.contextmanager
def start(device: str = "auto", timeout_s: float = 1800) -> Iterator[Distributed]:
    """Join the processes of this run (as the environment tells) and leave them at the end.

    Sets the number of compute threads to this process's share of the cores unless OMP_NUM_THREADS says otherwise.
    """
    rank, world, local_rank, local_world = ranks_from_environment()
    place = pick_device(device, local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, core_count() // local_world))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    joined = False
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout_s), init_method="env://"
        )
        joined = True
    together = True  # all ranks come to the end here: done, or stopped by agreement
    try:
        yield Distributed(rank, world, local_rank, local_world, place)
    except Stopped:
        raise
    except BaseException:
        # Closing the connections would make the other ranks fail with errors of their own, before this one's is on
        # record. They end with the process.
        together = False
        raise
    finally:
        if together and joined and dist.is_initialized():
            dist.destroy_process_group()


def launch(function: Callable[..., Any], nproc: int, *arguments: Any, **options: Any) -> Any:
    """Run `function(*arguments, **options)` in `nproc` processes of this machine, by torchrun's elastic launcher.

    Args:
        function: a module-level function; arguments and return value must be picklable.
        nproc: processes; the first failing one ends all (they miss it at once; the launcher kills after 30 seconds
            what is left), and its error alone is raised here.

    Returns:
        What rank 0 returned.

    Raises:
        DiffmaeError: of the kind the failed rank raised. Stopped after SIGTERM, SIGUSR1 or Ctrl-C.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise UsageError(f"--nproc {nproc}: this already runs under torchrun; leave --nproc out.")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the error is shown once, by us
    wishes: dict[str, Any] = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": nproc,
        "max_restarts": 0,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "run_id": f"diffmae-{os.getpid()}",
        "shutdown_timeout": SHUTDOWN_SECONDS,
        "signals_to_handle": "SIGTERM,SIGINT,SIGUSR1",
    }
    known = {item.name for item in dataclasses.fields(LaunchConfig)}  # the last two are younger than torch 2.10
    config = LaunchConfig(**{name: value for name, value in wishes.items() if name in known})
    with tempfile.TemporaryDirectory() as folder:

        def stopped(name: str) -> DiffmaeError:
            with contextlib.suppress(OSError), open(os.path.join(folder, _STOPPED), encoding="utf-8") as file:
                return Stopped(file.read())
            return DiffmaeError(str(Interruption(name)))

        try:
            with safe_path():
                results = elastic_launch(config, _child)(function, arguments, options, folder)
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
            if codes == {Stopped.exit_code} or os.path.exists(os.path.join(folder, _STOPPED)):
                raise stopped("a signal") from None
            raise _first_error(error, folder) from None
        except SignalException as error:
            raise stopped(error.sigval.name) from None
    return results[0]


def _child(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], folder: str) -> Any:
    """A launched process: the stage, and how it ends."""
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    rank = ranks_from_environment()[0]
    try:
        with interruptible():
            return function(*arguments, **options)
    except Stopped as stop:  # all ranks stop together
        if rank == 0:
            _tell(folder, _STOPPED, str(stop))
        # not by returning: a process that returned waits until the launcher has read its value, and one that was
        # signalled itself reads no more
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except DiffmaeError as error:
        # The launcher reports one failed process alone, and that may be one which has just lost this one.
        _tell(folder, f"{_FAILED}-{rank}", f"{type(error).__name__}: {error}")
        raise


def _tell(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)


def _end_with_launcher() -> None:
    """Save and leave when the launcher is gone: nobody would tell this process that another one has failed."""
    launcher = multiprocessing.parent_process()
    if launcher is None:
        return
    launcher.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SHUTDOWN_SECONDS)  # in a call that waits for other processes no handler runs
    os._exit(DiffmaeError.exit_code)


def _first_error(error: Any, folder: str) -> DiffmaeError:
    """The error of a rank that knows what happened; else what the launcher saw."""
    for name in sorted(name for name in os.listdir(folder) if name.startswith(_FAILED)):
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            kind, _, message = file.read().partition(": ")
        return getattr(errors, kind, DiffmaeError)(message)
    rank, failure = error.get_first_failure()
    text = str(failure.message)
    with contextlib.suppress(TypeError, ValueError, KeyError, OSError), open(failure.error_file, "rb") as file:
        text = str(json.load(file)["message"]["message"])
    if failure.exitcode < 0:
        text = f"it was ended by {failure.signal_name()}"
        if failure.signal_name() == "SIGKILL":
            text += ", which often means that memory ran out"
    return DiffmaeError(f"Process {rank} failed ({text.strip()}); run again with --debug for the full account.")
