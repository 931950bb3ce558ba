"""Run folders: found, held, given back; and what a job takes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from diffmae_video.errors import Stopped, UsageError
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.run import open_run
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training.run import read_status

A = {"kind": "render", "data": "a"}
B = {"kind": "render", "data": "b"}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(tmp_path))
    return tmp_path


def stop(job: Job, identity: dict[str, str], file: str | None = "work.bin") -> Path:
    """A run that saves a file and is stopped."""

    with contextlib.suppress(Stopped), open_run(job, identity) as run:
        if file is not None:
            (run.directory / file).write_text("x")
        raise Stopped("Stopped.")
    return run.directory


def test_the_newest_unfinished_run_of_the_same_is_continued(tmp_path: Path) -> None:
    first = stop(Job(), A)
    other = stop(Job(), B)
    assert [first.name, other.name] == ["render-001", "render-002"]
    assert read_status(first)["status"] == "stopped"
    with open_run(Job(), A) as run:
        assert run.directory == first
        assert run.earlier["status"] == "stopped"
        run.finish(clip="a.mp4")
    assert read_status(first)["status"] == "finished"
    assert Workspace.here().latest("render", clip="a.mp4").path == str(first)
    with open_run(Job(), A) as run:
        assert run.directory.name == "render-003"
        assert run.earlier == {}
        run.finish()
    with open_run(Job(resume="never"), B) as run:
        assert run.directory.name == "render-004"


def test_a_start_that_fails_gives_the_folder_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop(Job(out=out), A, file=None)
    assert not out.exists()
    out.mkdir()
    stop(Job(out=out), A, file=None)
    stop(Job(out=out), B, file="metrics.jsonl")  # nothing of it is saved yet
    with open_run(Job(out=out), A) as run:
        assert run.earlier == {}
        (out / "work.bin").write_text("x")
    with pytest.raises(UsageError, match=r"out holds another run .*name another folder"), open_run(Job(out=out), B):
        pass


def test_what_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something that is no run"), open_run(Job(out=tmp_path / "notes"), A):
        pass
    with (
        pytest.raises(UsageError, match=r"text\.txt is a file"),
        open_run(Job(out=tmp_path / "notes" / "text.txt"), A),
    ):
        pass
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["text.txt"]


def test_a_run_in_use_is_refused_and_its_holder_named(tmp_path: Path) -> None:
    with open_run(Job(out=tmp_path / "out"), A) as run:
        (run.directory / "work.bin").write_text("x")
        with pytest.raises(UsageError, match=r"in use by process \d+ on "), open_run(Job(out=run.directory), A):
            pass


def test_half_written_files_of_a_killed_process_go(tmp_path: Path) -> None:
    directory = stop(Job(), A)
    (directory / ".run.json.123.tmp").write_text("{")
    with open_run(Job(), A) as run:
        assert run.directory == directory
        assert not list(directory.glob(".*.tmp"))


def test_a_workspace_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"\.diffmae cannot be written"), open_run(Job(out=tmp_path / "out"), A):
        pytest.fail("the work began")


@pytest.mark.parametrize(("options", "name"), [({"device": "tpu"}, "--device tpu"), ({"nproc": 0}, "--nproc 0")])
def test_a_job_refuses_what_no_stage_takes(options: dict, name: str) -> None:
    with pytest.raises(UsageError, match=name):
        Job(**options)


def test_a_job_takes_paths_and_lists() -> None:
    job = Job(overrides=["data.path='a b'", "train.steps=2"], data=Path("x"), out="y")
    assert (job.overrides[1], job.data, job.out) == ("train.steps=2", "x", Path("y"))
    assert job.override("data.path") == "a b"
    assert job.override("data.split") is None
