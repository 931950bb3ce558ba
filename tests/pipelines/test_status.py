"""`diffmae status`: runs while they go, after a kill, and when they are done."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffmae_video.cli.app import run
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.run import open_run
from diffmae_video.pipelines.status import list_runs, run_status


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def training(folder: Path, status: str, holder: str | None = None, **fields: Any) -> Path:
    """The folder of a training as it lies there at some moment: 30 of 100 steps of 8 clips, 4 clips a second."""
    (folder / "pictures").mkdir(parents=True)
    identity = {"kind": "pretrain", "data": "x", "settings.train": {"batch_size": 8}}
    body = {"identity": identity, "status": status, "step": 20, "total": 100, **fields}
    (folder / "run.json").write_text(json.dumps(body))
    lines = [{"step": 20, "loss": 0.5, "clips_per_s": 9.0}, {"step": 20, "val_loss": 0.7}]
    lines.append({"step": 30, "loss": 0.25, "clips_per_s": 4.0})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 31, "lo')
    for step in (10, 20):
        (folder / "pictures" / f"clips-{step:08d}.png").write_bytes(b"")
    if holder:
        (folder / "run.holder").write_text(holder)
    return folder


def test_a_run_that_is_going_tells_step_time_left_and_picture(tmp_path: Path) -> None:
    found = run_status(training(tmp_path / "a", "running", f"process {os.getpid()} on {socket.gethostname()}"))
    assert found is not None
    assert (found.kind, found.state, found.step, found.total) == ("pretrain", "running", 30, 100)
    assert found.seconds_left == pytest.approx(70 * 8 / 4)
    assert found.figures == {"loss": 0.25, "val_loss": 0.7}
    assert found.picture == tmp_path / "a" / "pictures" / "clips-00000020.png"


def test_a_killed_run_is_told_from_one_that_goes_on_elsewhere(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    killed = run_status(training(tmp_path / "a", "running", f"process {gone.stdout.strip()} on {socket.gethostname()}"))
    assert killed is not None
    assert (killed.state, killed.seconds_left) == ("killed", None)
    elsewhere = run_status(training(tmp_path / "b", "running", "process 1 on some-other-node"))
    assert elsewhere is not None
    assert elsewhere.state == "running on some-other-node"
    younger = training(tmp_path / "c", "running", f"process {os.getpid()} on {socket.gethostname()}")
    os.utime(younger / "run.holder", (1, 1))  # written long before this process began: its number was given again
    assert run_status(younger).state == "killed"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "holder", [b"\xff\xfe", b"", b"process on", b"process " + b"9" * 5000 + b" on here", b"process -1 on here"]
)
def test_a_run_whose_holder_says_nothing_usable_counts_as_killed(tmp_path: Path, holder: bytes) -> None:
    folder = training(tmp_path / "a", "running")
    (folder / "run.holder").write_bytes(holder)
    assert run_status(folder).state == "killed"  # type: ignore[union-attr]


def test_the_name_of_a_foreign_machine_reaches_no_terminal_as_it_is(tmp_path: Path) -> None:
    found = run_status(training(tmp_path / "a", "running", "process 1 on \x1b[2Jnode"))
    assert found is not None
    assert found.state.startswith("running on ")
    assert "\x1b" not in found.state


def test_all_runs_of_a_folder_are_listed_with_those_on_record_elsewhere(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["status"]) == 0
    assert "No run is known" in capsys.readouterr().out
    training(tmp_path / "runs" / "pretrain-001", "stopped")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "tests"
    with open_run(Job(out=elsewhere), {"kind": "eval", "data": "d"}) as held:
        (elsewhere / "eval.json").write_text(json.dumps({"top1": 0.5}))
        assert run_status(elsewhere).state == "running"  # type: ignore[union-attr]
        held.finish(task="demo")
    os.utime(tmp_path / "runs" / "pretrain-001" / "run.json", (1, 1))
    assert [one.directory.name for one in list_runs()] == ["pretrain-001", "tests"]
    assert run(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for part in ("stopped", "30 of 100", "loss 0.25, val loss 0.7", "clips-00000020.png", "finished", "top-1 50.0%"):
        assert part in shown
    assert "1 did not end" in shown


@pytest.mark.parametrize("text", ["", "[]", "{", '{"status": 3}'])
def test_damaged_files_do_not_stop_the_list(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "runs" / "pretrain-001"
    folder.mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl", "eval.json"):
        (folder / name).write_text(text)
    assert len(list_runs()) <= 1


def test_what_did_not_end_is_told_with_its_command_and_what_it_began_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = training(tmp_path / "runs" / "finetune-001", "stopped", command="diffmae finetune --task 'my set'")
    (begun / "model.json").write_text(json.dumps({"info": {"init": "/elsewhere/runs/pretrain-007"}}))
    probe = training(tmp_path / "runs" / "finetune-002", "finished")
    identity = {"kind": "finetune", "data": "x", "settings.train": {}, "settings.finetune": {"protocol": "linear"}}
    (probe / "run.json").write_text(json.dumps({"identity": identity, "status": "finished"}))
    (probe / "probe.json").write_text(json.dumps({"top1": 0.475}))
    (probe / "model.json").write_text(json.dumps({"info": {"init": "scratch"}}))
    assert run(["status"]) == 0
    shown = capsys.readouterr().out
    assert "runs/finetune-001: diffmae finetune --task 'my set'" in shown
    assert shown.count("pretrain-007") == 1
    row = next(line for line in shown.splitlines() if "finetune-002" in line)
    for word in ("linear probe", "scratch", "top-1 47.5%"):
        assert word in row
    assert " of " not in row


def test_a_run_notes_the_command_line_that_asked(tmp_path: Path) -> None:
    with open_run(Job(command="diffmae eval --task x"), {"kind": "eval", "data": "d"}) as held:
        held.finish(task="x")
    found = run_status(held.directory)
    assert found is not None
    assert found.command == "diffmae eval --task x"
