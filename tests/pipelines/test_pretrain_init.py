"""`diffmae pretrain --init`: the run starts from the given weights, and they are part of what makes it the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmae_video import load_model
from diffmae_video.cli.app import run
from diffmae_video.errors import UsageError
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.pretrain import pretrain, print_pretrain
from tests.training.conftest import SMALL


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from diffmae_video.data.synthetic import write_demo_data
    from diffmae_video.pipelines.shard import ShardJob, shard

    monkeypatch.chdir(tmp_path)
    write_demo_data(tmp_path / "clips", train=6, val=2, size=32, frames=8, workers=1)
    shard(ShardJob(tmp_path / "clips", tmp_path / "shards", workers=1))
    return tmp_path / "shards"


def train(shards: Path, out: str, *overrides: str, **options: Any) -> Any:
    job = Job(recipe="smoke", overrides=(*SMALL, *overrides), data=str(shards), out=Path(out), device="cpu")
    return pretrain(job, **options)


def test_a_run_starts_from_the_weights_it_is_given(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(shards, "first", "train.steps=2", "seed=5")
    still = ("train.steps=1", "train.base_lr=1e-12", "train.weight_decay=0.0", "train.ema=0.0")
    train(shards, "second", *still, init="first")
    assert "Weights: " in capsys.readouterr().out
    one, two = (load_model(name).state_dict() for name in ("first", "second"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
    assert json.loads(Path("second/model.json").read_text())["info"]["init"] == "first"
    with pytest.raises(UsageError, match="--out second holds another run"):
        train(shards, "second", *still)


def test_the_last_line_says_what_comes_next(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_pretrain(train(shards, "first", "train.steps=1"))
    assert "then: diffmae finetune --task clips, or diffmae render-inpaint" in capsys.readouterr().out


def test_what_cannot_be_started_from_is_one_sentence(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "--data", str(shards), "--init", "nowhere.pth"]) == 2
    assert "--init nowhere.pth: there is no such file or folder" in capsys.readouterr().err
