"""`diffmae study run` as a user starts it, killed and started again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffmae_video.data.synthetic import write_demo_data
from diffmae_video.pipelines.shard import ShardJob, shard
from diffmae_video.pipelines.study_table import study_table

STUDY = """
name = "two-arms"
summary = "For a test."
recipe = "smoke"
data = ["demo"]
baseline = "scratch"
seeds = [0]
set = ["train.steps=6", "train.batch_size=4", "train.checkpoint_every=2"]

[[arms]]
name = "diffmae"

[[arms]]
name = "scratch"
pretrain = false

[[measures]]
name = "fine-tuned"
kind = "finetune"
task = "demo"
set = ["train.steps=6", "train.batch_size=4", "train.checkpoint_every=2"]
"""


@pytest.mark.slow  # each start of a stage imports PyTorch
def test_a_study_killed_ten_times_ends_with_the_same_table(tmp_path: Path) -> None:
    write_demo_data(tmp_path / "clips", train=16, val=16, size=32, frames=16, workers=1)
    shard(ShardJob(tmp_path / "clips", tmp_path / "shards", workers=1))
    (tmp_path / "two-arms.toml").write_text(STUDY)

    def start(out: str) -> subprocess.Popen[str]:
        command = ["study", "run", "two-arms.toml", "--data", "demo=shards", "--out", out, "--device", "cpu"]
        return subprocess.Popen(
            [sys.executable, "-P", "-c", "from diffmae_video.cli.app import main; main()", *command],
            cwd=tmp_path,
            env={**os.environ, "DIFFMAE_WORKSPACE": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole = start("whole")
    assert whole.wait() == 0, whole.communicate()[0]
    draw = random.Random(0)
    for number in range(10):
        process = start("killed")
        try:
            process.wait(timeout=draw.uniform(1, 9))  # from before the first stage to the last ones
        except subprocess.TimeoutExpired:
            process.send_signal((signal.SIGKILL, signal.SIGTERM)[number % 2])
        process.communicate()
    last = start("killed")
    assert last.wait() == 0, last.communicate()[0]
    for name in ("whole", "killed"):
        assert study_table(tmp_path / name).missing == 0
    table = (tmp_path / "whole" / "table.csv").read_bytes()
    assert table.count(b"\n") == 3  # a header, two arms
    assert (tmp_path / "killed" / "table.csv").read_bytes() == table
