"""Small real runs: shards of the embedded data set, a model of a few thousand weights, and child processes to kill."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from diffmae_video.config import Settings, load_settings
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.synthetic import write_demo_data
from diffmae_video.errors import DiffmaeError
from diffmae_video.pipelines.finetune import finetune
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.pretrain import pretrain
from diffmae_video.pipelines.shard import ShardJob, shard
from tests.training.forking import exit_codes, forked, free_port

SMALL = (
    "model.frames=4",
    "model.size=[16, 16]",
    "model.tubelet=2",
    "model.patch=8",
    "train.batch_size=4",
    "train.steps=10",
    "train.checkpoint_every=2",
    "train.log_every=3",
    "train.ema=0.9",
    "train.clip_grad=1.0",
    "data.workers=0",
)


class Runs:
    """Starts small pre-trainings in this process or in children."""

    def __init__(self, shards: Path) -> None:
        self.shards = shards

    def settings(self, *overrides: str) -> Settings:
        return load_settings("smoke", "pretrain", [*SMALL, *overrides])

    def here(self, out: Path, *overrides: str, **options: Any) -> Any:
        chosen = (*SMALL, *overrides)
        return pretrain(Job(recipe="smoke", overrides=chosen, data=str(self.shards), out=out, device="cpu", **options))

    def finetune(self, out: Path, *overrides: str) -> Any:
        """A fine-tuning from scratch, with everything that draws numbers: Mixup, CutMix, dropout, stochastic depth."""
        mixing = ("finetune.mixup=0.8", "finetune.cutmix=1.0", "finetune.dropout=0.2", "finetune.drop_path=0.3")
        chosen = [*SMALL, *mixing, *overrides]
        task, data = Manifest.load(self.shards).dataset, self.shards
        job = Job(recipe="smoke", overrides=tuple(chosen), data=str(data), out=out, device="cpu")
        return finetune(job, task, init="scratch")

    def child(
        self,
        out: Path,
        *overrides: str,
        world: int = 1,
        before: Callable[[int], None] | None = None,
        start: Callable[..., Any] | None = None,
        **options: Any,
    ) -> list[int]:
        """Exit codes of a run (`here`, or `start`) in forked processes; `before(rank)` runs first in each."""
        port = free_port()
        processes = []
        for rank in range(world):
            environment = {}
            if world > 1:
                environment = {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            processes.append(forked(self.in_child, environment, rank, out, overrides, before, options, start))
        return exit_codes(processes, 300)

    def in_child(self, environment, rank, out, overrides, before, options, start=None) -> None:
        """What a child of `child` does; it ends the process."""
        os.environ.update(environment)
        code = 0
        try:
            if before is not None:
                before(rank)
            (start or self.here)(out, *overrides, **options)
        except DiffmaeError as error:
            code = error.exit_code
            print(f"{type(error).__name__}: {error}", flush=True)
        except BaseException:
            traceback.print_exc()
            code = 99
        os._exit(code)

    @staticmethod
    def final(out: Path, step: int = 10) -> dict[str, torch.Tensor]:
        """Every tensor of the last checkpoint: weights, optimizer, average, generators."""
        tensors: dict[str, torch.Tensor] = {}
        for file in (out / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
            tensors |= safetensors.torch.load_file(file)
        return tensors

    @staticmethod
    def metrics(out: Path) -> list[dict[str, Any]]:
        """metrics.jsonl without the columns that depend on the clock."""
        timed = {"clips_per_s", "data_wait", "overhead", "other_s", "mfu", "peak_memory"}
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in timed} for line in lines]

    def assert_same(self, left: Path, right: Path, step: int = 10) -> None:
        """Two runs ended bit for bit alike."""
        one, two = self.final(left, step), self.final(right, step)
        assert one.keys() == two.keys()
        assert any(name.startswith("optimizer.") for name in one)
        assert any(name.startswith("ema.") for name in one)
        assert any(name.startswith("rng.") for name in one)
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
        assert self.metrics(left) == self.metrics(right)
        weights = (safetensors.torch.load_file(out / "weights.safetensors") for out in (left, right))
        first, second = weights
        assert all(torch.equal(first[name], second[name]) for name in first)


def kill_at(call: int, number: int = signal.SIGKILL) -> Callable[[int], None]:
    """A `before` that signals the process when its `call`-th micro-batch has gone forward."""

    def before(rank: int) -> None:
        from diffmae_video.training.finetuning import FinetuneTask
        from diffmae_video.training.pretraining import PretrainTask

        count = [0]

        def counted(plain):
            def loss(self, *args):
                output = plain(self, *args)
                count[0] += 1
                if count[0] == call:
                    os.kill(os.getpid(), number)
                return output

            return loss

        for task in (FinetuneTask, PretrainTask):
            task.loss = counted(task.loss)

    return before


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_demo_data(folder / "clips", train=22, val=4, size=32, frames=8, workers=1)
    shard(ShardJob(folder / "clips", folder / "shards", workers=1))
    return folder / "shards"


@pytest.fixture
def runs(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(tmp_path))
    return Runs(small_shards)


@pytest.fixture(name="kill_at")
def kill_at_fixture() -> Callable[..., Callable[[int], None]]:
    return kill_at
