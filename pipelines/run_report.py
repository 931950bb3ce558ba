"""The page of a run, and of several runs beside each other: curves, pictures, settings, machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmae_video.config import read_settings, setting_keys
from diffmae_video.errors import UsageError
from diffmae_video.pipelines import console
from diffmae_video.rendering.report import Report
from diffmae_video.training.logging import read_metrics
from diffmae_video.training.run import read_status

_CURVES = (  # title, columns of metrics.jsonl, logarithmic
    ("Loss", ("loss", "val_loss"), True),
    ("Accuracy", ("train_top1", "val_top1", "val_top5"), False),
    ("Learning rate", ("lr",), False),
    ("Gradient norm", ("grad_norm",), True),
    ("Clips a second", ("clips_per_s",), False),
    ("Shares of time", ("data_wait", "overhead", "mfu"), False),
    ("Memory, GiB", ("peak_memory",), False),
)
_FIGURES = {  # column of metrics.jsonl: what it is called, how it is written
    "loss": ("loss", "{:.4g}"),
    "val_loss": ("validation loss", "{:.4g}"),
    "val_top1": ("validation top-1", "{:.1%}"),
    "grad_norm": ("gradient norm", "{:.4g}"),
    "clips_per_s": ("clips a second", "{:.4g}"),
    "data_wait": ("time waiting for data", "{:.1%}"),
    "overhead": ("time outside model and data", "{:.1%}"),
    "mfu": ("share of peak FLOP/s (MFU)", "{:.1%}"),
    "peak_memory": ("memory of the process", "{:.2f} GiB"),
    "bad_samples": ("unreadable samples", "{:.0f}"),
    "skipped": ("steps skipped", "{:.0f}"),
}


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]] | None:
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    return ([step for step, _ in points], [value for _, value in points]) if points else None


def _facts(directory: Path, lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    status = read_status(directory) or {}
    last = {name: value for line in lines for name, value in line.items()}
    rows = [("status", f"{status.get('status', 'unknown')}, step {last.get('step', 0)} of {status.get('total', '?')}")]
    for name, (label, form) in _FIGURES.items():
        if last.get(name) is not None:
            rows.append((label, form.format(last[name])))
    return rows + [(name, str(value)) for name, value in (status.get("machine") or {}).items()]


def write_run_report(directory: Path) -> Path:
    """Write report.html of a run from what its directory holds at this moment; a single file that needs no network."""
    directory = Path(directory)
    lines = read_metrics(directory / "metrics.jsonl")
    report = Report(f"Run {directory.name}")
    report.table("State", ("what", "value"), _facts(directory, lines))
    for title, names, log in _CURVES:
        series = {name: found for name in names if (found := _series(lines, name))}
        if series:
            report.curves(title, series, log_y=log)
    pictures = sorted((directory / "pictures").glob("reconstruction-*.png"))
    for path in pictures[-1:] + pictures[:1] * (len(pictures) > 1):
        step = int(path.stem.rpartition("-")[2])
        note = "Per clip, from top to bottom: input, masked, one step (the MAE picture), full sampling."
        report.image(f"Reconstructions at step {step}", path, note)
    settings = directory / "config.toml"
    if settings.exists():
        report.settings(settings.read_text(encoding="utf-8"))
    return report.write(directory / "report.html")


def compare_runs(runs: Sequence[Path], out: Path | None = None) -> Path:
    """One page about one or several runs; of one alone, it is the run's own report.html.

    Raises:
        UsageError: a folder is no run.
    """
    for run in runs:
        if read_status(run) is None:
            raise UsageError(f"{run} is no run: give folders that `diffmae pretrain` or `finetune` made.")
    if len(runs) == 1 and out is None:
        return write_run_report(runs[0])
    report = Report("Runs: " + ", ".join(run.name for run in runs))
    lines = {run: read_metrics(run / "metrics.jsonl") for run in runs}
    facts = {run: dict(_facts(run, lines[run])) for run in runs}
    names = list(dict.fromkeys(name for run in runs for name in facts[run]))
    labels = _labels(runs)
    rows = [(name, *(facts[run].get(name, "") for run in runs)) for name in names]
    report.table("State", ("what", *labels), rows)
    for title, columns, log in _CURVES:
        series = {
            (f"{label} {name}" if len(columns) > 1 else label): found
            for run, label in zip(runs, labels, strict=True)
            for name in columns
            if (found := _series(lines[run], name))
        }
        if series:
            report.curves(title, series, log_y=log)
    report.table("Settings that differ", ("setting", *labels), _differences(runs))
    for run, label in zip(runs, labels, strict=True):
        for path in sorted((run / "pictures").glob("reconstruction-*.png"))[-1:]:
            report.image(f"Reconstructions of {label}", path)
    path = report.write(out or Path("report.html"))
    console.say(f"Wrote {path}.")
    return path


def _labels(runs: Sequence[Path]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _differences(runs: Sequence[Path]) -> list[tuple[str, ...]]:
    tables = [read_settings(run / "config.toml").model_dump(mode="json") for run in runs]
    rows = []
    for key in setting_keys():
        values = []
        for table in tables:
            value: Any = table
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            values.append(str(value))
        if len(set(values)) > 1:
            rows.append((key, *values))
    return rows
