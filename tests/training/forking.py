"""Forked children of tests: processes with the parent's patches, which end or are ended."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import socket
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forked(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A started child that runs `function(*arguments)`."""
    gc.collect()  # what tests before this one left may wait for threads, which a forked child does not have
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(function, arguments))
    process.start()
    return process


def exit_codes(processes: Sequence[BaseProcess], seconds: float) -> list[int | None]:
    """How children ended; those that have not ended after so many seconds each are killed, and the test fails."""
    for process in processes:
        process.join(seconds)
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, "the child hangs"
    return [process.exitcode for process in processes]


def _in_child(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    gc.freeze()
    faulthandler.dump_traceback_later(110, repeat=True)  # where it hangs is shown before the parent kills it
    function(*arguments)
