"""Processes that read files of strangers: one clip at a time, bounded in time and memory; a dead one costs one clip."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from dataclasses import dataclass, field
from typing import Any

from diffmae_video.data.transcode import TranscodeOptions, options_to_json
from diffmae_video.data.worker_process import MEMORY, command, receive, send

COMMAND = command()
"""What a worker runs."""


@dataclass(frozen=True)
class Outcome:
    """What became of one input: `data` and `meta`, or a `kind` of failure with its `error`."""

    data: bytes = b""
    suffix: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    error: str = ""


class Worker:
    """A child process that transcodes; started on first use and again after it died.

    Args:
        seconds: wall-clock limit of one input.
        memory: limit on the address space of the child, bytes.
    """

    def __init__(self, seconds: float = 300.0, memory: int = 6 << 30):
        self.seconds, self.memory = seconds, memory
        self.process: subprocess.Popen[bytes] | None = None

    def run(
        self, path: str, options: TranscodeOptions, span: tuple[float, float] | None = None, data: bytes = b""
    ) -> Outcome:
        """Transcode one file, or `data` under the name `path`; every failure is an Outcome, never an exception."""
        if self.process is None:
            self.process = self._start()
        process, late = self.process, threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(self.seconds, stop)  # a killed child closes its pipes, which ends the wait below
        clock.daemon = True
        clock.start()
        assert process.stdin
        assert process.stdout
        try:
            send(process.stdin, {"path": path, "options": options_to_json(options), "span": span}, data)
            body, data = receive(process.stdout)
        except (EOFError, OSError):
            self.close(kill=True)
            return self._failure(process.returncode, late.is_set())
        finally:
            clock.cancel()
        if "error" in body:
            return Outcome(kind=body["kind"], error=body["error"])
        return Outcome(data=data, suffix=body["suffix"], meta=body["meta"])

    def _failure(self, code: int, late: bool) -> Outcome:
        if late:
            return Outcome(kind="timeout", error=f"The worker was stopped after {self.seconds:.0f} s.")
        if code < 0:
            with contextlib.suppress(ValueError):
                return Outcome(kind="crash", error=f"The worker died of {signal.Signals(-code).name}.")
        return Outcome(kind="crash", error=f"The worker left with code {code}.")

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {MEMORY: str(self.memory), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        return subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )

    def close(self, kill: bool = False) -> None:
        """End the child."""
        process, self.process = self.process, None
        if process is None:
            return
        if kill:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class WorkerPool:
    """Idle workers, shared by the threads of one process."""

    def __init__(self) -> None:
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._lock = threading.Lock()

    def take(self, seconds: float, memory: int) -> Worker:
        """An idle worker with these limits, or a new one."""
        with self._lock:
            for place, worker in enumerate(self._idle):
                if (worker.seconds, worker.memory) == (seconds, memory):
                    return self._idle.pop(place)
            worker = Worker(seconds, memory)
            self._all.add(worker)
            return worker

    def give(self, worker: Worker) -> None:
        """Hand a worker back."""
        with self._lock:
            self._idle.append(worker)

    def kill(self) -> None:
        """Kill all children; whoever waits for one sees it end (closing its pipes here would leave him waiting)."""
        with self._lock:
            for worker in self._all:
                if worker.process is not None:
                    worker.process.kill()

    def close(self) -> None:
        """End all workers; none may be in use."""
        with self._lock:
            workers, self._idle, self._all = self._all, [], set()
        for worker in workers:
            worker.close()


POOL = WorkerPool()
"""The workers of this process."""
