"""`diffmae pretrain` and `diffmae report` through the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffmae_video.cli.app import app
from diffmae_video.data.synthetic import write_demo_data
from diffmae_video.data.transcode import TranscodeOptions
from diffmae_video.errors import UsageError
from diffmae_video.models.weights import load_model
from diffmae_video.pipelines.shard import ShardJob, shard_and_record


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFMAE_WORKSPACE", str(folder))
        write_demo_data(folder / "clips", train=24, val=4, size=32, frames=8, workers=1)
        shard_and_record(ShardJob(folder / "clips", folder / "shards", workers=1))
        frames = folder / "frames" / "train" / "grey"
        frames.mkdir(parents=True)
        for number in range(16):
            Image.new("RGB", (40, 40), (number * 10, 90, 120)).save(frames / f"{number}.jpg")
        shard_and_record(
            ShardJob(folder / "frames", folder / "images", options=TranscodeOptions(kind="image"), workers=1)
        )
    return folder


@pytest.fixture
def run(workspace, monkeypatch):
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(workspace))

    def command(*arguments: str, small: bool = True):
        words = [str(word) for word in arguments]
        if small:
            words += [
                "--recipe",
                "smoke",
                "--set",
                "model.frames=4",
                "--set",
                "model.tubelet=2",
                "--set",
                "train.steps=3",
            ]
        result = CliRunner().invoke(app, words)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return command


def test_pretrain_leaves_a_whole_run(run, workspace, tmp_path):
    output = run("pretrain", "--video", "--out", tmp_path / "run", "--set", "train.picture_every=2")
    assert "Done: step 3 of 3" in output
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = {"step", "epoch", "samples", "loss", "lr", "grad_norm", "clips_per_s", "data_wait", "mfu", "peak_memory"}
    assert wanted <= lines[0].keys()
    assert "val_loss" in lines[-1]
    picture = Image.open(tmp_path / "run" / "pictures" / "reconstruction-00000002.png")
    assert picture.size == (4 * 68, 4 * 4 * 68)  # four frames; four clips of four rows; 34 pixels with frame, doubled
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    model = load_model(tmp_path / "run")
    assert model.info["dataset"] == "demo"
    assert model.info["step"] == 3
    page = (tmp_path / "run" / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_image_and_joint(run, workspace, tmp_path):
    run("pretrain", "--image", "--out", tmp_path / "image")
    assert load_model(tmp_path / "image").settings.frames == 1
    sources = f"{workspace / 'shards'},{workspace / 'images'}"
    run("pretrain", "--joint", "--data", sources, "--out", tmp_path / "joint", "--set", "train.log_every=1")
    lines = [json.loads(line) for line in (tmp_path / "joint" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss_source_1"] > 0 for line in lines if "loss_source_1" in line] == [False, True, False]


def test_dry_run_makes_nothing(run, workspace):
    before = sorted(workspace.rglob("*"))
    output = run("pretrain", "--video", "--dry-run", "--throughput", "100", "--set", "data.workers=500")
    assert "data.workers = 500 in each of 1 process(es) is more than" in output
    assert "parameters" in output
    assert "GiB (tensors, allocator" in output
    assert "100 clips/s as given" in output
    assert sorted(workspace.rglob("*")) == before


def test_profile_prints_the_heaviest_operators(run, tmp_path):
    output = run("pretrain", "--video", "--out", tmp_path / "run", "--profile", "1")
    assert "Self CPU" in output
    assert "Waiting for data took" in output
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])


def test_wrong_kinds(run, workspace, tmp_path):
    with pytest.raises(UsageError, match="use --image"):
        run("pretrain", "--video", "--data", workspace / "images", "--out", tmp_path / "a")
    with pytest.raises(UsageError, match="at least two sources"):
        run("pretrain", "--joint", "--data", workspace / "shards", "--out", tmp_path / "b")
    with pytest.raises(UsageError, match="exclude each other"):
        run("pretrain", "--video", "--image")
    assert list(tmp_path.iterdir()) == []


def test_report_of_several_runs_opens_in_a_browser(run, tmp_path):
    run("pretrain", "--out", tmp_path / "one")
    run("pretrain", "--out", tmp_path / "two", "--seed", "1")
    page = tmp_path / "page.html"
    run("report", tmp_path / "one", tmp_path / "two", "--out", page, small=False)
    text = page.read_text()
    assert "seed" in text
    assert "one loss" in text
    assert "time waiting for data" in text
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium here")
    shot = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}", "--window-size=1000,1600"]
    subprocess.run([chromium, *options, page.as_uri()], check=True, timeout=120, capture_output=True)
    colors = Image.open(shot).convert("RGB").getcolors(1 << 24)
    assert len(colors) > 50  # drawn, not blank


def test_report_needs_a_run(run, tmp_path):
    with pytest.raises(UsageError, match="is no run"):
        run("report", Path(tmp_path), small=False)


@pytest.mark.slow
def test_launcher_asked_twice_to_stop_saves_and_leaves_nobody(workspace, tmp_path):
    """`--nproc 2`, as Slurm or a shell would stop it: SIGTERM, and again while the processes save."""
    words = ["pretrain", "--data", workspace / "shards", "--out", tmp_path / "run", "--recipe", "smoke", "--nproc", "2"]
    words += ["--set", "train.steps=1000000", "--set", "data.workers=1", "--set", "train.checkpoint_every=100000"]
    command = [sys.executable, "-c", "from diffmae_video.cli.app import main; main()", *map(str, words)]
    environment = {**os.environ, "DIFFMAE_WORKSPACE": str(tmp_path)}
    launcher = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = launcher.children(recursive=True)
    assert len(family) >= 4  # two processes, a worker each
    launcher.terminate()
    launcher.terminate()
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 75
    assert said.splitlines()[-1].startswith("diffmae: Stopped by SIGTERM")
    assert "Traceback" not in said
    assert psutil.wait_procs(family, timeout=30)[1] == []
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
