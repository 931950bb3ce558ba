"""Labels from the command line: pre-training told of them, evaluation by denoising, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffmae_video.errors import DataError, UsageError
from diffmae_video.models.weights import load_model
from diffmae_video.pipelines.evaluate import evaluate, evaluate_task
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.pretrain import pretrain

SMALL = (
    *("model.width=32", "model.depth=1", "model.heads=2", "model.frames=4", "model.size=[32,32]", "model.patch=8"),
    *("model.decoder_width=32", "model.decoder_heads=2", "model.decoder_depth=1", "model.preset=nano"),
    *("train.batch_size=4", "train.steps=4", "train.warmup_epochs=0", "train.ema=0", "train.picture_every=0"),
    *("data.workers=0", "data.stride=2", "train.precision=fp32", "train.log_to=[]", "mask.ratio=0.75"),
)


def job(tmp_path: Path, *overrides: str, **options) -> Job:
    return Job(
        recipe="video-tiny", overrides=(*SMALL, *overrides), data=tmp_path / "shards", device="cpu", **options
    )  # fmt: skip


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch, make_shards):
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(tmp_path / "workspace"))
    return make_shards(tmp_path / "shards", {"train": 12, "val": 9}, broken=("val0004",))


def test_a_pretraining_with_labels_classifies_by_denoising(tmp_path: Path, workspace) -> None:
    run = pretrain(job(tmp_path, "model.labels=data", out=tmp_path / "run"))
    model = load_model(run.directory)
    assert model.settings.labels == 3
    assert model.decoder.label_embed.weight.shape == (4, 32)
    asked = Job(
        checkpoint=str(run.directory), data=tmp_path / "shards", device="cpu", out=tmp_path / "eval",
        overrides=("evaluate.draws=2", "data.workers=0", "data.max_bad_fraction=0.5"),
    )  # fmt: skip
    result = evaluate(asked, "squares", views="1x1", protocol="denoise")
    assert (result.found, result.used, len(result.failed)) == (9, 8, 1)
    report = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert report["classified_by"] == "denoising"
    assert report["videos"]["used"] == 8
    evaluate(asked.with_(out=tmp_path / "again"), "squares", views="1x1", protocol="denoise")
    found, again = ((tmp_path / name / "predictions.parquet").read_bytes() for name in ("eval", "again"))
    assert found == again  # every draw is seeded


def test_labels_that_do_not_fit_are_refused_before_training(tmp_path: Path, workspace, make_shards) -> None:
    with pytest.raises(UsageError, match="has 3 classes"):
        pretrain(job(tmp_path, "model.labels=2"))
    make_shards(tmp_path / "other")
    both = f"{tmp_path / 'shards'},{tmp_path / 'other'}"
    with pytest.raises(UsageError, match="leave it out for a mix"):
        pretrain(job(tmp_path, "model.labels=data").with_(data=both), kind="joint")
    assert not (tmp_path / "runs").exists()


def test_a_model_without_labels_cannot_classify_by_denoising(tmp_path: Path, workspace) -> None:
    run = pretrain(job(tmp_path, out=tmp_path / "run"))
    asked = Job(checkpoint=str(run.directory), data=tmp_path / "shards", device="cpu", out=tmp_path / "eval")
    with pytest.raises(UsageError, match="trained without labels"):
        evaluate(asked, "squares", protocol="denoise")
    with pytest.raises(DataError, match="no classifier"):
        evaluate(asked, "squares", protocol="head")
    with pytest.raises(UsageError, match="leave it out for --task inpaint"):
        evaluate_task(asked, "inpaint", protocol="denoise")
    assert not (tmp_path / "eval").exists()
