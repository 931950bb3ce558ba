"""`diffmae eval` and `predict` through the pipeline and the command line, with a small untrained classifier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffmae_video.cli.app import app
from diffmae_video.config import ModelSettings, Settings, settings_toml, with_overrides
from diffmae_video.data.shards import ShardReader
from diffmae_video.errors import DataError, Stopped, UsageError
from diffmae_video.evaluation.classify import ViewSettings, decode_views
from diffmae_video.evaluation.predictions import read_predictions
from diffmae_video.evaluation.views import parse_views
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.patches import normalize_pixels
from diffmae_video.models.weights import load_model, save_model
from diffmae_video.pipelines.evaluate import evaluate
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.predict import predict
from diffmae_video.pipelines.workspace import Workspace

CLASSES = ["right", "left", "down"]
TINY = {"preset": "nano", "width": 32, "depth": 2, "heads": 2, "frames": 4, "size": (32, 32), "patch": 16}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fine-tuning run on record in a workspace of its own."""
    monkeypatch.chdir(tmp_path)
    settings = with_overrides(
        Settings(model=ModelSettings(**TINY)),
        data={"stride": 2, "workers": 0, "max_bad_fraction": 0.5},
        train={"precision": "fp32"},
        evaluate={"bootstrap": 100},
    )
    folder = tmp_path / "runs" / "finetune-001"
    classifier = Classifier(Encoder(settings.model, seed=1), 3, head_init=1.0, seed=2)
    save_model(classifier, folder, {"classes": CLASSES, "dataset": "squares"})
    (folder / "config.toml").write_text(settings_toml(settings))
    Workspace.here().record("finetune", folder, task="squares", dataset="squares")
    return folder


def same_numbers(report: dict) -> dict:
    return {name: value for name, value in report.items() if name != "seconds"}


def test_files_and_numbers(run: Path, tmp_path: Path, make_shards: Callable) -> None:
    make_shards(tmp_path / "shards", {"val": 9}, broken=("val0004",))
    job = Job(data=tmp_path / "shards", device="cpu", overrides=("evaluate.precision=fp32",))
    result = evaluate(job, "squares", views="1x1,3x3")
    report = json.loads((result.directory / "eval.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    assert report["videos"] == {"found": 9, "unlabelled": 0, "used": 8, "failed": 1}
    assert "Not a video" in report["failed"]["val0004"]
    assert list(report["views"]) == ["1x1", "3x3"]
    assert report["top1"] == report["views"]["3x3"]["top1"]
    assert report["views"]["3x3"]["top1_interval"][0] <= report["top1"] <= report["views"]["3x3"]["top1_interval"][1]
    names = {path.name for path in result.directory.iterdir()}
    assert {"eval.json", "predictions.parquet", "classes.csv", "confusion.png", "report.html", "config.toml"} <= names
    assert not any(name.startswith("partial") for name in names)
    assert Workspace.here().latest("eval", task="squares").facts["top1"] == report["top1"]

    # the numbers against a plain loop over the videos: softmax of each view, mean, argmax
    manifest = make_shards(tmp_path / "again", {"val": 9})
    model, predictions, hits = load_model(run).eval(), read_predictions(result.directory), []
    spec = ViewSettings(parse_views("3x3"), 4, 2, (32, 32))
    for row, key in enumerate(predictions.keys):
        video = decode_views(ShardReader(manifest).read("val", int(key[3:])).data, spec)
        with torch.no_grad():
            views = [model(normalize_pixels(video.view(i)[None], "symmetric")).softmax(-1)[0] for i in range(9)]
        mean = torch.stack(views).mean(0)
        assert torch.allclose(predictions.probabilities["3x3"][row], mean, atol=1e-5)
        hits.append(int(mean.argmax()) == int(key[3:]) % 3)
    assert report["top1"] == pytest.approx(sum(hits) / 8)


@pytest.mark.slow  # three processes start; the split of the work itself is tested in test_classify.py
def test_two_processes_give_the_same_numbers(run: Path, tmp_path: Path, make_shards: Callable) -> None:
    make_shards(tmp_path / "shards", {"val": 5}, broken=("val0001",))
    one = evaluate(Job(data=tmp_path / "shards", device="cpu", out=tmp_path / "one"), "squares", views="2x1")
    two = evaluate(Job(data=tmp_path / "shards", device="cpu", out=tmp_path / "two", nproc=2), "squares", views="2x1")
    assert same_numbers(one.report) == same_numbers(two.report)
    alone, together = read_predictions(tmp_path / "one"), read_predictions(tmp_path / "two")
    assert alone.keys == together.keys
    assert torch.equal(alone.probabilities["2x1"], together.probabilities["2x1"])


def test_kill_and_resume_give_the_same_file(run: Path, tmp_path: Path, make_shards: Callable) -> None:
    make_shards(tmp_path / "shards", {"val": 6})
    whole = evaluate(Job(data="shards", device="cpu", out=tmp_path / "whole"), "squares", views="1x1")
    script = """
import os, signal, sys
from diffmae_video.evaluation import records
from diffmae_video.pipelines import evaluate as stage
from diffmae_video.evaluation import classify
records.FLUSH_SAMPLES = 1
seen = []
add = records.PassStore.add
def killed(self, *arguments):
    add(self, *arguments)
    seen.append(1)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
records.PassStore.add = killed
from diffmae_video.pipelines.job import Job
stage.evaluate(Job(data="shards", device="cpu", overrides=["evaluate.batch_views=1"]), "squares", views="1x1")
"""
    child = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == -9, child.stderr
    partial = next((tmp_path / "runs").glob("eval-*/partial-*"))
    assert len(list(partial.glob("*.safetensors"))) == 3
    resumed = evaluate(Job(data="shards", device="cpu", overrides=["evaluate.batch_views=1"]), "squares", views="1x1")
    assert resumed.directory == partial.parent
    reference = evaluate(
        Job(data="shards", device="cpu", overrides=["evaluate.batch_views=1"], out=tmp_path / "reference"),
        "squares",
        views="1x1",
    )
    assert same_numbers(resumed.report) == same_numbers(reference.report)
    assert (resumed.directory / "predictions.parquet").read_bytes() == (
        tmp_path / "reference" / "predictions.parquet"
    ).read_bytes()
    assert resumed.top1 == whole.top1


def test_sigterm_saves_and_leaves(
    run: Path, tmp_path: Path, make_shards: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from diffmae_video.evaluation.records import PassStore

    make_shards(tmp_path / "shards", {"val": 4})
    add = PassStore.add

    def signalled(self, *arguments) -> None:
        add(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PassStore, "add", signalled)
    arguments = {"data": "shards", "device": "cpu", "overrides": ["evaluate.batch_views=2"]}
    with pytest.raises(Stopped, match="SIGTERM"):
        evaluate(Job(**arguments), "squares", views="1x1")
    monkeypatch.setattr(PassStore, "add", add)
    assert evaluate(Job(**arguments), "squares", views="1x1").used == 4
    assert len(list((tmp_path / "runs").glob("eval-*"))) == 1


@pytest.mark.parametrize(("frames", "size"), [(2, 32), (8, 48)])
def test_other_clip_lengths_and_sizes(run: Path, tmp_path: Path, make_shards: Callable, frames: int, size: int) -> None:
    make_shards(tmp_path / "shards", {"val": 2})
    overrides = [f"model.frames={frames}", f"model.size=[{size}, {size}]"]
    result = evaluate(Job(data="shards", device="cpu", overrides=overrides), "squares", views="1x1")
    assert (result.report["frames"], result.report["size"]) == (frames, [size, size])


def test_what_does_not_fit_is_named(run: Path, tmp_path: Path, make_shards: Callable) -> None:
    make_shards(tmp_path / "shards", {"val": 3}, classes=("right", "left", "up"))
    with pytest.raises(DataError, match=r"class 2 is 'down' in the checkpoint .* and 'up' in the data"):
        evaluate(Job(data="shards", device="cpu"), "squares")
    make_shards(tmp_path / "fewer", {"val": 3}, classes=("right", "left"))
    with pytest.raises(DataError, match="class 2 is 'down'"):
        evaluate(Job(data="fewer", device="cpu"), "squares")
    with pytest.raises(UsageError, match="holds the data set squares"):
        evaluate(Job(data="shards", checkpoint=run, device="cpu"), "k400")
    Workspace.here().record("shards", tmp_path / "shards", dataset="squares")
    with pytest.raises(UsageError, match="did you mean squares"):
        evaluate(Job(checkpoint=run, device="cpu"), "sqares")
    with pytest.raises(UsageError, match="no shards of it are known"):
        evaluate(Job(checkpoint=run, device="cpu"), "ucf101")
    with pytest.raises(UsageError, match="have 16"):
        evaluate(Job(data="shards", device="cpu", overrides=["model.patch=8"]), "squares")
    with pytest.raises(UsageError, match="finetune --task NAME"):
        evaluate(Job(data="shards", device="cpu"), "other")


def test_too_many_unreadable_videos(run: Path, tmp_path: Path, make_shards: Callable) -> None:
    make_shards(tmp_path / "shards", {"val": 3}, broken=("val0000", "val0001"))
    with pytest.raises(DataError, match=r"2 of 3 videos cannot be read.*val0000"):
        evaluate(Job(data="shards", device="cpu", out=tmp_path / "out"), "squares", views="1x1")
    assert not (tmp_path / "out" / "eval.json").exists()
    loose = ["data.max_bad_fraction=1.0"]
    result = evaluate(Job(data="shards", device="cpu", out=tmp_path / "out", overrides=loose), "squares", views="1x1")
    assert (result.used, len(result.failed)) == (1, 2)


def command(arguments: list[str]) -> tuple[int, str]:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_commands(run: Path, tmp_path: Path, make_shards: Callable) -> None:
    manifest = make_shards(tmp_path / "shards", {"val": 4})
    Workspace.here().record("shards", tmp_path / "shards", dataset="squares")
    code, output = command(["eval", "--task", "squares", "--views", "1x1", "--device", "cpu", "--dry-run"])
    assert code == 0
    assert "4 videos" in output
    assert not list((tmp_path / "runs").glob("eval-*"))
    code, output = command(["eval", "--task", "squares", "--views", "1x1", "--device", "cpu"])
    assert code == 0
    assert "top-1" in output
    code, output = command(["eval", "--task", "squares", "--views", "2x1", "--device", "cpu"])
    code, output = command(["compare", "runs/eval-001", "runs/eval-002", "--out", "compared"])
    assert code == 0
    assert "McNemar" in output
    assert (tmp_path / "compared" / "report.html").is_file()

    clip = tmp_path / "-odd name.mp4"
    clip.write_bytes(ShardReader(manifest).read("val", 0).data)
    text = tmp_path / "text.mp4"
    text.write_text("#EXTM3U")
    code, output = command(["predict", "--json", "--device", "cpu", "--top", "2", "--", str(clip), str(text)])
    assert code == 3
    first, second = (json.loads(line) for line in output.strip().splitlines())
    assert len(first["classes"]) == 2
    assert first["classes"][0][1] >= first["classes"][1][1]
    assert "error" in second


def test_predict_equals_eval(run: Path, tmp_path: Path, make_shards: Callable) -> None:
    manifest = make_shards(tmp_path / "shards", {"val": 2})
    result = evaluate(Job(data="shards", device="cpu"), "squares", views="1x1")
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(ShardReader(manifest).read("val", 1).data)
    found = predict(Job(device="cpu"), [clip], top=3, quiet=True)[0]
    expected = read_predictions(result.directory).probabilities["1x1"][1]
    for name, probability in found.classes:
        assert probability == pytest.approx(expected[CLASSES.index(name)].item(), abs=1e-5)


def test_pretraining_is_no_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffmae_video.models.diffmae import DiffMAE

    monkeypatch.chdir(tmp_path)
    save_model(DiffMAE(ModelSettings(**TINY, decoder_width=32, decoder_heads=2, decoder_depth=1)), tmp_path / "run")
    with pytest.raises(DataError, match="is no classifier"):
        predict(Job(checkpoint=tmp_path / "run", device="cpu"), [tmp_path / "x.mp4"])
