"""Signals that ask a run to save and leave."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from diffmae_video.errors import Stopped

# Slurm's time limit and preemption, a user's Ctrl-C; Windows has no SIGUSR1
ASKING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Interruption(KeyboardInterrupt):
    """A signal came where nothing waits for one: while a stage starts, or in work that is not kept step by step.

    Like Ctrl-C it passes everything that handles errors; `name` is the signal's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"Stopped by {name} before it could save; run the same command again.")
        self.name = name


class StopRequest:
    """Set by the first asking signal; later ones change nothing, save a second Ctrl-C, which interrupts at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def check(self, then: str) -> None:
        """Leave if a signal has asked for it; `then` says what follows from that.

        Raises:
            Stopped: a signal has come.
        """
        if self:
            raise Stopped(f"Stopped by {self.name}; {then}.")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into a StopRequest while the block runs; the old handlers return after it.

    Child processes that inherit the handlers ignore these signals: a launcher signals the whole group, and data
    workers must live until the step in progress has ended.
    """
    request = StopRequest()
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.name = request.name or signal.Signals(number).name

    with _handled(handle, ASKING):
        yield request


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the signals that would end this process without a word into an `Interruption` while the block runs.

    Child processes that inherit the handler end as they would without it.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise Interruption(signal.Signals(number).name)

    with _handled(handle, [number for number in ASKING if number != signal.SIGINT]):
        yield


@contextlib.contextmanager
def _handled(handle: Callable[[int, FrameType | None], Any], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Handle signals while the block runs; a thread other than the main one never gets any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
