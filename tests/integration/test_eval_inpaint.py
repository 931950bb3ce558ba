"""`diffmae eval --task inpaint` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmae_video.cli.app import run
from diffmae_video.config import DiffusionSettings, ModelSettings
from diffmae_video.evaluation.inpainting import BASELINES
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.weights import save_model
from diffmae_video.pipelines.evaluate_inpainting import evaluate_inpainting
from diffmae_video.pipelines.job import Job


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards of four demo clips and an untrained model."""
    monkeypatch.chdir(tmp_path)
    assert run(["demo-data", "src", "--train", "8", "--val", "4", "--size", "32", "--workers", "1"]) == 0
    assert run(["shard", "src", "shards"]) == 0
    settings = ModelSettings(
        preset="nano", width=32, depth=1, heads=2, frames=8, size=(32, 32), tubelet=2, patch=8,
        decoder_depth=1, decoder_width=32, decoder_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(DiffMAE(settings, DiffusionSettings()), tmp_path / "model", {"kind": "diffmae"})
    return tmp_path


def evaluate(*arguments: str) -> int:
    common = ["--checkpoint", "model", "--set", "render.steps=2", "--set", "evaluate.clips=2", "--set", "data.stride=2"]
    return run(["eval", "--task", "inpaint", *common, "--set", "evaluate.samples=2", *arguments])


def test_every_mask_of_the_evaluation_hides_what_it_says(workspace: Path) -> None:
    hidden = {"random:0.75": 0.75, "tube:0.9": 0.875, "block": 0.75, "center": 0.25, "frames": 0.5, "future:0.25": 0.25}
    overrides = ("render.steps=1", "evaluate.clips=1", "evaluate.samples=1")
    job = Job(checkpoint="model", overrides=overrides, out=Path("out"))
    result = evaluate_inpainting(job, masks=list(hidden), deep=False)
    assert evaluate_inpainting(job, masks=list(hidden), deep=False) == result  # done before, read from its folder
    assert list(result.scores) == list(hidden)
    for text, share in hidden.items():
        methods = result.scores[text]
        assert set(methods) == {"DiffMAE, one sample", "MAE's one step", *BASELINES}
        assert all(figures["psnr_masked"] > 0 for figures in methods.values()), text
        if text in ("random:0.75", "tube:0.9", "block", "center"):  # the same share in every frame, or nearly
            for figures in methods.values():  # full = hidden + 10 log10(1 / share), but for the mean over frames
                gap = figures["psnr_full"] - figures["psnr_masked"]
                assert gap == pytest.approx(-10 * np.log10(share), abs=1.5), text
        assert Image.open(Path("out") / f"{text.replace(':', '-')}.png").size[0] > 100


@pytest.mark.slow
def test_a_table_for_each_mask(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--masks", "center,frames", "--out", "out") == 0
    output = capsys.readouterr().out
    assert "hidden region pooled" in output
    result = json.loads(Path("out/inpaint.json").read_text())
    assert result["clips"] == 2
    assert list(result["scores"]) == ["center", "frames"]
    for methods in result["scores"].values():
        assert len(methods) == 7
        assert all(np.isfinite([v for v in figures.values() if v is not None]).all() for figures in methods.values())
        best, one = methods["DiffMAE, best of samples"], methods["DiffMAE, one sample"]
        assert best["psnr_masked"] >= one["psnr_masked"]
    assert Image.open("out/center.png").size[0] > 100
    assert "data:image/png" in Path("out/report.html").read_text()


def test_what_cannot_be_done_is_one_sentence(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--masks", "stripes") == 2
    assert "--masks stripes" in capsys.readouterr().err
    assert evaluate("--masks", "center", "--set", "render.steps=1001") == 2
    assert "1000 timesteps" in capsys.readouterr().err
    assert evaluate("--masks", "center", "--dry-run") == 0
    assert not Path("runs").exists()
