"""`diffmae status`: the runs of a workspace, what they are doing or how they ended, read from their folders alone."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from diffmae_video.files import holder_process, read_json
from diffmae_video.pipelines import console
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training.run import read_status

_TAIL = 1 << 16  # bytes at the end of metrics.jsonl that are read: hundreds of lines
_FIGURES = {
    "loss": "loss {:.4g}",
    "val_loss": "val loss {:.4g}",
    "val_top1": "val top-1 {:.1%}",
    "top1": "top-1 {:.1%}",
    "psnr_masked": "PSNR {:.1f} dB",
}
_PICTURES = ("sheet.png", "confusion.png", "loss_sweep.png", "table.png")


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run at this moment."""

    directory: Path
    kind: str
    """`pretrain`, `finetune`, `eval`, `render`, ..."""
    state: str
    """`running`, `running on HOST`, `killed` (its process is gone without a word), `stopped`, `failed`, `finished`."""
    step: int | None
    """Optimizer steps that are logged; None for runs without steps."""
    total: int | None
    seconds_left: float | None
    """Of a run that is going, by the rate of its last line."""
    figures: dict[str, float]
    """The last loss, val_loss, val_top1; of an evaluation top1, of a render psnr_masked."""
    picture: Path | None
    """The newest one."""
    command: str = ""
    """The command line that started it, or continued it last; empty where Python did."""
    weights: str = ""
    """What it began with: `scratch`, or a folder's name; empty where the run does not say."""


def run_status(directory: Path) -> RunStatus | None:
    """The status of the run in a folder; None where there is no run. Nothing is written or locked.

    A run that says it is running is believed where its process is there, or on another host.
    """
    saved = read_status(directory)
    if saved is None:
        return None
    lines = _last_lines(directory / "metrics.jsonl")
    last = {name: value for line in lines for name, value in line.items()}
    identity = saved.get("identity") or {}
    state = _state(directory, str(saved.get("status", "unknown")))
    trains = "settings.train" in identity
    step = max(int(saved.get("step") or 0), int(last.get("step") or 0)) if trains else None
    total = int(saved["total"]) if trains and saved.get("total") else None
    left = None
    if state.startswith("running") and total and step is not None and last.get("clips_per_s"):
        left = (total - step) * identity["settings.train"].get("batch_size", 1) / last["clips_per_s"]
    figures = {name: float(last[name]) for name in _FIGURES if isinstance(last.get(name), (int, float))}
    for name in ("eval.json", "result.json", "probe.json"):
        found = read_json(directory / name)
        figures |= {key: float(found[key]) for key in _FIGURES if isinstance(found.get(key), (int, float))}
    kind = str(identity.get("kind", "run"))
    protocol = (identity.get("settings.finetune") or {}).get("protocol", "finetune")
    if kind == "finetune" and protocol != "finetune":
        kind, step, total = f"{protocol} probe", None, None
    info = read_json(directory / "model.json").get("info") or {}
    made = str(info.get("init") or read_json(directory / "eval.json").get("checkpoint") or "")
    weights = Path(made).name if made else ""
    command = str(saved.get("command") or "")
    return RunStatus(directory, kind, state, step, total, left, figures, _newest_picture(directory), command, weights)


def list_runs(folder: Path | None = None) -> list[RunStatus]:
    """The runs of a workspace, the one that changed last at the end: all below `runs/`, and those on record elsewhere.

    Args:
        folder: of the workspace; the current one without it.
    """
    workspace = Workspace(folder.resolve()) if folder else Workspace.here()
    folders = {path.parent.resolve() for path in (workspace.folder / "runs").glob("**/run.json")}
    folders |= {Path(entry.path).resolve() for entry in workspace.entries() if "://" not in entry.path}
    found = [status for directory in folders if (status := run_status(directory)) is not None]
    return sorted(found, key=lambda one: _changed(one.directory))


def print_status(runs: Sequence[RunStatus], folder: Path | None = None) -> None:
    """Show runs as a table, with what to do about those that did not end."""
    here = folder.resolve() if folder else Workspace.here().folder
    if not runs:
        console.say(f"No run is known in {here}: stages put theirs under runs/ of the folder that they are started in.")
        return
    rows = [
        [
            _relative(one.directory, here),
            one.kind,
            one.weights,
            one.state,
            "" if one.step is None else f"{one.step} of {one.total or '?'}",
            "" if one.seconds_left is None else console.format_seconds(one.seconds_left),
            ", ".join(form.format(one.figures[name]) for name, form in _FIGURES.items() if name in one.figures),
            "" if one.picture is None else str(one.picture.relative_to(one.directory)),
        ]
        for one in runs
    ]
    console.table(f"Runs of {here}", ["run", "stage", "from", "state", "step", "left", "result", "picture"], rows)
    open_ends = [one for one in runs if one.state in ("killed", "stopped", "failed")]
    if open_ends:
        console.say(f"{len(open_ends)} did not end: the command that started a run continues it where it stood.")
    for one in open_ends:
        if one.command:
            console.say(f"{_relative(one.directory, here)}: {one.command}")


def _state(directory: Path, saved: str) -> str:
    if saved != "running":
        return saved
    holder = directory / "run.holder"
    process = holder_process(holder)
    if process is None:
        return "killed"
    number, host = process
    if host != socket.gethostname():
        return f"running on {host}"
    try:
        written = holder.stat().st_mtime
        began = psutil.Process(number).create_time()
    except (OSError, psutil.Error):
        return "killed"
    return "running" if began < written + 1 else "killed"  # the number may have gone to a younger process


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last lines of a file of JSON lines; one that is being written is left out."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            texts = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _newest_picture(directory: Path) -> Path | None:
    pictures = sorted((directory / "pictures").glob("*.png"), key=lambda path: (_changed(path), path.name))
    pictures = pictures or [directory / name for name in _PICTURES if (directory / name).is_file()]
    return pictures[-1] if pictures else None


def _changed(path: Path) -> float:
    """When a file, or anything at the top of a folder, was last written; 0 where it is gone."""
    times = [0.0]
    for one in [path, *(path.glob("*.json*") if path.is_dir() else ())]:
        try:
            times.append(one.stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
