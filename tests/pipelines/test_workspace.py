"""The record that lets one stage find what another made."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffmae_video.errors import UsageError
from diffmae_video.pipelines.workspace import Workspace


def test_the_newest_existing_match_is_found(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        workspace.record("finetune", tmp_path / name, task="demo" if name != "b" else "k400")
    (tmp_path / "c").rmdir()
    assert workspace.latest("finetune").path == str(tmp_path / "b")
    assert workspace.latest("finetune", task="demo").path == str(tmp_path / "a")
    assert workspace.latest("finetune", task=None).path == str(tmp_path / "b")
    assert workspace.latest("shards") is None


def test_recording_the_same_path_again_moves_it_to_the_end(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        workspace.record("shards", tmp_path / name, clips=len(workspace.entries()))
    assert [Path(entry.path).name for entry in workspace.entries()] == ["b", "a"]


def test_what_is_missing_is_one_sentence_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run `diffmae shard SRC OUT` first or give --data"):
        Workspace(tmp_path).require("shards", "--data")


def test_a_damaged_record_counts_as_empty(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.record("shards", tmp_path)
    workspace.file.write_text(json.dumps({"entries": [{"kind": 1}]}))
    assert workspace.entries() == []
    workspace.record("shards", tmp_path)
    assert len(workspace.entries()) == 1


def test_parallel_writers_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: Workspace(tmp_path).record("eval", f"s3://bucket/{number}"), range(24)))
    assert len(Workspace(tmp_path).entries()) == 24


def test_run_directories_are_numbered_and_never_reused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.new_run_directory("pretrain").name == "pretrain-001"
    (tmp_path / "runs" / "pretrain-009").mkdir(parents=True)
    assert workspace.new_run_directory("pretrain").name == "pretrain-010"
    full = tmp_path / "full"
    full.mkdir()
    (full / "weights.safetensors").touch()
    with pytest.raises(UsageError, match="already holds something"):
        workspace.new_run_directory("pretrain", full)
