"""Sums between two lines of metrics.jsonl, and where the time of a step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmae_video.training.distributed import Distributed


class Meter:
    """Means of metrics and shares of time since the last line.

    Sums stay on the device: reading them would make the CPU wait at every step.
    """

    def __init__(self, device: torch.device) -> None:
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self.steps = 0
        self._shown = 0  # steps of the window that were timed here, not carried over from a checkpoint
        self._spent = {"wait": 0.0, "compute": 0.0, "other": 0.0}
        self._since = time.perf_counter()
        self.total_wait = self.total_time = 0.0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one step's values."""
        for name, value in values.items():
            value = value.detach().to(self._dtype)
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.clone()

    @contextlib.contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[kind] += time.perf_counter() - start

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Time spent waiting for data."""
        return self._timed("wait")

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Time spent in forward, backward and optimizer."""
        return self._timed("compute")

    def other(self) -> contextlib.AbstractContextManager[None]:
        """Time that does not count as training: validation, pictures, checkpoints."""
        return self._timed("other")

    def line(self, distributed: Distributed, batch_size: int) -> dict[str, Any]:
        """Means over the window and over ranks, rates, and a fresh window. A collective."""
        sums = self._reduced(distributed)
        now = time.perf_counter()
        seconds = max(1e-9, now - self._since - self._spent["other"])
        wait, compute = self._spent["wait"], self._spent["compute"]
        self.total_wait += wait
        self.total_time += seconds
        steps = self.steps - self._shown
        line = {
            **{name: value / max(1, self.steps) / distributed.world for name, value in sums.items()},
            "clips_per_s": round(steps * batch_size / seconds, 3),
            "data_wait": round(wait / seconds, 4),
            "overhead": round(max(0.0, 1 - (wait + compute) / seconds), 4),
            "other_s": round(self._spent["other"], 3),
        }
        self._sums, self.steps, self._shown = {}, 0, 0
        self._spent = dict.fromkeys(self._spent, 0.0)
        self._since = now
        return line

    def state(self, distributed: Distributed) -> dict[str, Any]:
        """The open window, summed over ranks, for a checkpoint. A collective."""
        return {"steps": self.steps, "sums": self._reduced(distributed), "world": distributed.world}

    def load(self, window: dict[str, Any], world: int) -> None:
        """Continue a window: on rank 0 alone, the sums are those of all ranks."""
        self.steps = self._shown = window["steps"]
        scale = world / window["world"]
        self._sums = {
            name: torch.tensor(value * scale, dtype=self._dtype, device=self.device)
            for name, value in window["sums"].items()
        }

    def _reduced(self, distributed: Distributed) -> dict[str, float]:
        names = sorted(set().union(*distributed.gather(sorted(self._sums))))
        zero = torch.zeros((), dtype=self._dtype, device=self.device)
        values = [self._sums.get(name, zero) for name in names]
        if not values:
            return {}
        return dict(zip(names, distributed.sum(torch.stack(values)).tolist(), strict=True))


@contextlib.contextmanager
def profile_steps(
    count: int, directory: Path, device: torch.device, say: Callable[[str], None], meter: Meter
) -> Iterator[Callable[[], None]]:
    """Trace `count` steps after two of warm-up: profile/trace.json, the ten heaviest operators, the share of data.

    Yields:
        What to call after each step.
    """
    if count <= 0:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    def done(profiler: Any) -> None:
        path = directory / "profile" / "trace.json"
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        say(profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=48))
        spent = meter._spent
        share = spent["wait"] / max(1e-9, spent["wait"] + spent["compute"])
        say(f"Waiting for data took {100 * share:.1f}% of the steps; the trace is {path} (chrome://tracing, Perfetto).")

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    steps = schedule(wait=1, warmup=1, active=count, repeat=1)
    with profile(activities=kinds, schedule=steps, on_trace_ready=done) as profiler:
        yield profiler.step
