"""Shards with the splits train and test alone: all stages test on `test`, without a word from the user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffmae_video.cli.app import run
from diffmae_video.data.synthetic import encode_mp4, motion_clip


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        folder = tmp_path / "mine" / ("train" if number < 8 else "test") / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        clip = motion_clip(number % 2, seed=1, index=number, frames=16)
        (folder / f"clip{number:03d}.mp4").write_bytes(encode_mp4(clip, 10))
    assert run(["shard", "mine", "shards", "--dataset", "mine"]) == 0
    return tmp_path


def test_every_stage_finds_the_test_split(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--recipe", "smoke", "--device", "cpu", "--set", "train.steps=2", "--set", "train.batch_size=4"]
    small += ["--set", "data.label_fraction=1.0"]
    assert run(["pretrain", *small]) == 0
    assert "validation loss is of training clips" not in capsys.readouterr().out
    assert run(["finetune", "--task", "mine", *small]) == 0
    assert run(["eval", "--task", "mine", "--device", "cpu"]) == 0
    report = json.loads((workspace / "runs" / "eval-001" / "eval.json").read_text())
    assert (report["split"], report["videos"]["used"]) == ("test", 4)
    assert (
        run(["finetune", "--task", "mine", "--protocol", "linear", "--device", "cpu", "--init", "runs/pretrain-001"])
        == 0
    )
    inpaint = ["--set", "evaluate.clips=2", "--set", "evaluate.samples=1", "--set", "render.steps=2"]
    assert run(["eval", "--task", "inpaint", "--device", "cpu", *inpaint]) == 0
    assert "2 of 4 clips of test" in capsys.readouterr().out
    assert run(["loss-sweep", "--device", "cpu", "--clips", "2", "--steps", "2"]) == 0
    assert "clips of test" in capsys.readouterr().out


def test_a_named_split_is_taken_at_its_word(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["finetune", "--task", "mine", "--init", "scratch", "--recipe", "smoke", "--set", "data.eval_split=dev"])
        == 3
    )
    assert "no split dev (it has train, test)" in capsys.readouterr().err
