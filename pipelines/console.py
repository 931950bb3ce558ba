"""What a stage says while it runs: rich bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from diffmae_video.files import printable

PLAIN_LINE_SECONDS = 10.0
PLAIN_LINE_SHARE = 0.02
"""Off a terminal, lines come further apart the longer the work takes: in two days some hundred, not ten thousand."""
_listener: ContextVar[Callable[[Step], None] | None] = ContextVar("listener", default=None)


@dataclass(frozen=True)
class Step:
    """How far a piece of work is."""

    label: str
    """What is being done, e.g. `render-inpaint`."""
    done: int
    total: int | None
    """Units of work, or None where it is not known."""
    unit: str
    seconds_left: float | None
    """At the rate so far; None at the beginning."""


@contextmanager
def listen(callback: Callable[[Step], None]) -> Iterator[None]:
    """Call back at every step of progress in this thread while the block runs; what it raises ends the work."""
    token = _listener.set(callback)
    try:
        yield
    finally:
        _listener.reset(token)


def console() -> Console:
    """The console of this moment's stdout (tests and notebooks replace stdout); off a terminal, lines do not wrap.

    A notebook is no terminal, though its kernel sets FORCE_COLOR: it gets lines of text, no block of HTML for each.
    """
    terminal = None if getattr(sys.stdout, "isatty", bool)() else False
    made = Console(highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=terminal)
    if not made.is_terminal:
        width = int(os.environ.get("COLUMNS", "160"))
        made = Console(highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=False, width=width)
    return made


def is_main_process() -> bool:
    """Whether this process speaks: one of several started by torchrun stays silent."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def say(text: str) -> None:
    """Print one line of plain text (no markup, no control characters), from the first process only."""
    if is_main_process():
        console().print(printable(text, keep="\n\t"), markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers stand right, everything is printed as it is (no markup)."""
    if not is_main_process():
        return
    made = Table(title=escape(printable(title)), title_justify="left", title_style="bold", header_style="bold")
    for position, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[position], (int, float)) for row in rows)
        made.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(f"{cell:.4g}" if isinstance(cell, float) else printable(str(cell))) for cell in row))
    console().print(made)


class ProgressLine:
    """Counts units of work and shows them with named figures; made by `progress`."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        self.total, self.label, self.unit, self.done = total, label, unit, 0
        self._start = time.monotonic()
        self._next = self._start + PLAIN_LINE_SECONDS
        self._bar: Progress | None = None
        output = console()
        self._silent = not is_main_process()
        if output.is_terminal and not self._silent:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=output,
            )
            self._task = self._bar.add_task(escape(label), total=total, figures="")

    def update(self, count: int = 1, **figures: object) -> None:
        """Count `count` more units; `figures` are shown beside the bar, e.g. `loss=0.12`."""
        self.done += count
        self.tell()
        shown = "  ".join(f"{name} {value}" for name, value in figures.items())
        if self._bar is not None:
            fields: dict[str, Any] = {"figures": escape(shown)} if figures else {}
            self._bar.update(self._task, completed=self.done, **fields)
        elif not self._silent and time.monotonic() >= self._next:
            now = time.monotonic()
            self._next = now + max(PLAIN_LINE_SECONDS, PLAIN_LINE_SHARE * (now - self._start))
            say(self._line(shown))

    def tell(self) -> None:
        """Tell who listens."""
        callback = _listener.get()
        if callback is not None:
            rate = self.done / max(time.monotonic() - self._start, 1e-9)
            left = (self.total - self.done) / rate if self.total and self.done else None
            callback(Step(self.label, self.done, self.total, self.unit, left))

    def _line(self, figures: str) -> str:
        seconds = time.monotonic() - self._start
        rate = self.done / max(seconds, 1e-9)
        text = f"{self.label}: {self.done}"
        if self.total:
            text += f"/{self.total}"
        text += f" {self.unit}, {rate:.3g}/s"
        if self.total and self.done:
            text += f", {format_seconds((self.total - self.done) / rate)} left"
        return text + (f"  {figures}" if figures else "")


@contextmanager
def progress(total: int | None, label: str, unit: str = "items") -> Iterator[ProgressLine]:
    """Show progress while the block runs: a bar on a terminal, a line every ten seconds or more elsewhere.

    Args:
        total: units of work, or None where it is not known.
        label: what is being done, e.g. `pretrain`.
        unit: what is counted, in the plural.
    """
    line = ProgressLine(total, label, unit)
    line.tell()
    if line._bar is None:
        yield line
    else:
        with line._bar:
            yield line


def format_seconds(seconds: float) -> str:
    """`75` -> `1m15s`; hours and days where they fit."""
    whole = max(round(seconds), 0)
    for size, name, rest, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // rest:02d}{small}"
    return f"{whole}s"
