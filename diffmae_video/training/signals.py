"""Signals that ask a run to save and leave."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # Slurm's time limit and preemption, a user's Ctrl-C


class StopRequest:
    """Set by the first asking signal; later ones change nothing, save a second Ctrl-C, which interrupts at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into a StopRequest while the block runs; the old handlers return after it.

    Child processes that inherit the handlers ignore these signals: a launcher signals the whole group, and data
    workers must live until the step in progress has ended.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals to the main thread alone
        return
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.name = request.name or signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in ASKING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
