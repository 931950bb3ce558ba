"""Processes that read hostile files: one clip at a time, with limits on time and memory; a dead one costs one clip."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from diffmae_video.data.transcode import TranscodeOptions, options_to_json, send

COMMAND = [sys.executable, "-m", "diffmae_video.data.transcode"]
"""What a worker runs."""


@dataclass(frozen=True)
class Outcome:
    """What became of one input: `data` and `meta`, or a `kind` of failure with its `error`."""

    data: bytes = b""
    suffix: str = ""
    meta: dict[str, Any] | None = None
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
            self._start()
        request = {"path": path, "options": options_to_json(options), "span": span}
        try:
            send(self.process.stdin, request, data)
            body, data = self._receive(time.monotonic() + self.seconds)
        except TimeoutError:
            self.close(kill=True)
            return Outcome(kind="timeout", error=f"The worker was stopped after {self.seconds:.0f} s.")
        except (EOFError, OSError):
            code = self.process.wait() if self.process else 0
            self.close(kill=True)
            if code < 0:
                with contextlib.suppress(ValueError):
                    return Outcome(kind="crash", error=f"The worker died of {signal.Signals(-code).name}.")
            return Outcome(kind="crash", error=f"The worker left with code {code}.")
        if "error" in body:
            return Outcome(kind=body["kind"], error=body["error"])
        return Outcome(data=data, suffix=body["suffix"], meta=body["meta"])

    def _start(self) -> None:
        environment = os.environ | {"DIFFMAE_WORKER_MEMORY": str(self.memory), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytes]:
        import json

        size, extra = struct.unpack("<IQ", self._read(12, deadline))
        if size > 1 << 24 or extra > 1 << 34:
            raise EOFError  # not our protocol any more
        return json.loads(self._read(size, deadline)), self._read(extra, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        stream = self.process.stdout
        buffer = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while len(buffer) < size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                part = os.read(stream.fileno(), min(size - len(buffer), 1 << 20))
                if not part:
                    raise EOFError
                buffer += part
        return bytes(buffer)

    def close(self, kill: bool = False) -> None:
        """End the child."""
        process, self.process = self.process, None
        if process is None:
            return
        if kill:
            process.kill()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
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
