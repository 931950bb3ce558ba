"""A run that was interrupted ends bit for bit like one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch

from diffmae_video.errors import UsageError
from tests.training.forking import forked


@pytest.mark.parametrize(
    ("overrides", "call"),
    [
        pytest.param((), 4, id="mid-epoch"),
        pytest.param((), 6, id="epoch-end"),  # 22 clips, batches of 4: the sixth crosses into the second epoch
        pytest.param(("train.accumulate=2",), 10, id="inside-accumulation"),
        pytest.param(("data.workers=2",), 5, id="two-workers"),
        pytest.param(("data.repeats=2", "model.drop_path=0.5", "data.crop=random_resized"), 7, id="repeats"),
        pytest.param(("model.space=pca:16", "diffusion.draw=angle"), 5, id="components"),
    ],
)
def test_kill_and_resume_equals_uninterrupted(runs, kill_at, tmp_path, overrides, call):
    runs.here(tmp_path / "straight", *overrides)
    assert runs.child(tmp_path / "killed", *overrides, before=kill_at(call)) == [-signal.SIGKILL]
    result = runs.here(tmp_path / "killed", *overrides)
    assert result.step == 10
    runs.assert_same(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize(
    ("overrides", "call", "number"),
    [
        pytest.param((), 5, signal.SIGTERM, id="asked"),
        pytest.param(
            ("data.workers=2", "train.accumulate=2", "data.repeats=2", "model.drop_path=0.5"),
            10,
            signal.SIGKILL,
            id="killed-with-workers-repeats-accumulation",
        ),
    ],
)
def test_two_processes_resume_bit_for_bit(runs, kill_at, tmp_path, overrides, call, number):
    overrides = ("train.batch_size=8", *overrides)
    code = 75 if number == signal.SIGTERM else -number
    assert runs.child(tmp_path / "straight", *overrides, world=2) == [0, 0]
    assert runs.child(tmp_path / "killed", *overrides, world=2, before=kill_at(call, number)) == [code, code]
    assert runs.child(tmp_path / "killed", *overrides, world=2) == [0, 0]
    runs.assert_same(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize(
    ("overrides", "call"),
    [
        pytest.param(("data.repeats=2", "data.workers=2"), 5, id="repeats-two-workers"),
        pytest.param(("train.accumulate=2", "data.crop=random_resized"), 11, id="inside-accumulation"),
    ],
)
def test_finetuning_with_mixup_resumes_bit_for_bit(runs, kill_at, tmp_path, overrides, call):
    runs.finetune(tmp_path / "straight", *overrides)
    codes = runs.child(tmp_path / "killed", *overrides, before=kill_at(call), start=runs.finetune)
    assert codes == [-signal.SIGKILL]
    assert not list((tmp_path / "killed" / "checkpoints").glob("step-*10"))
    runs.finetune(tmp_path / "killed", *overrides)
    runs.assert_same(tmp_path / "straight", tmp_path / "killed")


def test_sharded_run_continues_in_one_process(runs, kill_at, tmp_path):
    """FSDP2 x 2, stopped, then one process: shards of weights, optimizer and average come together again."""
    sharded = ("train.sharding=fsdp", "train.precision=fp32")
    assert runs.child(tmp_path / "run", *sharded, world=2, before=kill_at(6, signal.SIGTERM)) == [75, 75]
    files = list((tmp_path / "run" / "checkpoints" / "step-00000006").glob("*.safetensors"))
    assert len(files) == 2
    runs.here(tmp_path / "run", "train.precision=fp32")
    runs.here(tmp_path / "straight", "train.precision=fp32")
    one, two = runs.metrics(tmp_path / "run"), runs.metrics(tmp_path / "straight")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for left, right in zip(one, two, strict=True):
        for name in left.keys() & {"loss", "val_loss", "grad_norm"}:
            assert left[name] == pytest.approx(right[name], rel=1e-3), name
    names = runs.final(tmp_path / "straight").keys()
    assert {name for name in runs.final(tmp_path / "run") if not name.startswith("rng.")} <= names
    average = [runs.final(tmp_path / run)["ema.encoder.patch_embed.proj.weight"] for run in ("run", "straight")]
    torch.testing.assert_close(*average, rtol=1e-3, atol=1e-5)


def test_world_two_one_two_sees_each_sample_once(runs, kill_at, tmp_path):
    import json

    keys = tmp_path / "keys"
    keys.mkdir()

    def record(stop: int | None):
        def before(rank):
            if stop:
                kill_at(stop, signal.SIGTERM)(rank)
            from diffmae_video.training import pretraining

            plain = pretraining.PretrainTask.loss

            def loss(self, model, batch, device):
                with open(keys / f"{rank}.jsonl", "a") as file:
                    file.write(json.dumps([batch.epoch, batch.samples.tolist()]) + "\n")
                return plain(self, model, batch, device)

            pretraining.PretrainTask.loss = loss

        return before

    steps = "train.steps=11"  # 44 clips: two epochs of 22
    assert runs.child(tmp_path / "run", steps, world=2, before=record(3)) == [75, 75]
    assert runs.child(tmp_path / "run", steps, before=record(2)) == [75]
    assert runs.child(tmp_path / "run", steps, world=2, before=record(None)) == [0, 0]
    seen = [
        sample for file in keys.iterdir() for line in file.read_text().splitlines() for sample in json.loads(line)[1]
    ]
    assert sorted(seen) == sorted([*range(22), *range(22)])
    assert runs.child(tmp_path / "straight", steps, world=2) == [0, 0]
    lines = (runs.metrics(tmp_path / name) for name in ("run", "straight"))
    resumed, straight = ([line["loss"] for line in part if "loss" in line][-1] for part in lines)
    assert resumed == pytest.approx(straight, rel=0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_saves_and_leaves_with_75(runs, kill_at, tmp_path, number):
    assert runs.child(tmp_path / "run", before=kill_at(3, number)) == [75]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").exists()
    assert (tmp_path / "run" / "weights.safetensors").exists()


def test_signal_to_the_whole_group_still_saves(runs, kill_at, tmp_path):
    """timeout(1), Slurm and torchrun signal every process of the group, data workers too."""

    def before(rank):
        os.setpgid(0, 0)
        os.kill = lambda pid, number: os.killpg(os.getpgrp(), number)
        kill_at(3, signal.SIGTERM)(rank)

    assert runs.child(tmp_path / "run", "data.workers=2", before=before) == [75]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_do_not_outlive_the_run(runs, kill_at, tmp_path, number):
    def before(rank):
        kill_at(4, number)(rank)
        from diffmae_video.training import pretraining

        plain = pretraining.PretrainTask.loss

        def loss(self, *args):
            (tmp_path / "workers").write_text(" ".join(str(child.pid) for child in psutil.Process().children()))
            return plain(self, *args)

        pretraining.PretrainTask.loss = loss

    assert runs.child(tmp_path / "run", "data.workers=2", before=before) == [75 if number == signal.SIGTERM else -9]
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert len(workers) == 2
    alive = [psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)]
    assert psutil.wait_procs(alive, timeout=30)[1] == []  # after SIGKILL they notice by themselves


def test_stopped_in_the_last_step(runs, kill_at, tmp_path):
    """The validation at the end comes with the next start."""
    runs.here(tmp_path / "straight", "train.picture_every=100")
    before = kill_at(10, signal.SIGTERM)
    assert runs.child(tmp_path / "run", "train.picture_every=100", before=before) == [75]
    assert "val_loss" not in runs.metrics(tmp_path / "run")[-1]
    runs.here(tmp_path / "run", "train.picture_every=100")
    runs.assert_same(tmp_path / "straight", tmp_path / "run")
    pictures = [sorted(path.name for path in (tmp_path / run / "pictures").iterdir()) for run in ("run", "straight")]
    assert pictures[0] == pictures[1] == ["reconstruction-00000010.png"]


def test_finished_run_is_left_alone(runs, tmp_path):
    runs.here(tmp_path / "run", "train.steps=2")
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert runs.here(tmp_path / "run", "train.steps=2").step == 2
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="holds this run already"):
        runs.here(tmp_path / "run", "train.steps=2", resume="never")


def test_a_finished_run_goes_on_to_a_later_last_step(runs, tmp_path, capfd):
    runs.here(tmp_path / "run", "train.steps=4")
    result = runs.here(tmp_path / "run", "train.steps=10")
    assert result.step == 10
    assert "from step 4 of 10" in capfd.readouterr().out
    assert [line["step"] for line in runs.metrics(tmp_path / "run") if "loss" in line][-1] == 10
    assert runs.here(tmp_path / "run", "train.steps=10").step == 10
    assert "nothing to do" in capfd.readouterr().out


def test_other_settings_or_data_are_refused(runs, tmp_path):
    runs.here(tmp_path / "run", "train.steps=1")
    with pytest.raises(UsageError, match=r"train\.base_lr was"):
        runs.here(tmp_path / "run", "train.steps=1", "train.base_lr=1e-5")
    status = tmp_path / "run" / "run.json"
    text = status.read_text().replace('"data": "', '"data": "other')
    status.write_text(text)
    with pytest.raises(UsageError, match="data has changed"):
        runs.here(tmp_path / "run", "train.steps=1")


def test_unfinished_run_of_the_workspace_is_found(runs, kill_at, tmp_path, capfd):
    assert runs.child(None, before=kill_at(3, signal.SIGTERM)) == [75]
    result = runs.here(None)
    assert result.directory == tmp_path / "runs" / "pretrain-001"
    assert "Found an unfinished run" in capfd.readouterr().out
    assert runs.here(None).directory.name == "pretrain-002"


def test_damaged_newest_checkpoint_is_skipped(runs, kill_at, tmp_path, capfd):
    runs.here(tmp_path / "straight")
    runs.child(tmp_path / "run", before=kill_at(6, signal.SIGTERM))
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    file = next(newest.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    runs.here(tmp_path / "run")
    assert "Skipping step-00000006" in capfd.readouterr().out
    runs.assert_same(tmp_path / "straight", tmp_path / "run")


def test_newest_is_told_by_step_not_by_the_clock(runs, kill_at, tmp_path, capfd):
    runs.here(tmp_path / "straight")
    runs.child(tmp_path / "run", before=kill_at(5, signal.SIGTERM))
    capfd.readouterr()
    for name, time in (("step-00000004", 4e9), ("step-00000005", 1e8)):  # the clock went back between the two
        folder = tmp_path / "run" / "checkpoints" / name
        for path in (folder, *folder.iterdir()):
            os.utime(path, (time, time))
    runs.here(tmp_path / "run")
    assert "from step 5 of 10" in capfd.readouterr().out
    runs.assert_same(tmp_path / "straight", tmp_path / "run")


def test_start_from_another_run(runs, kill_at, tmp_path):
    runs.here(tmp_path / "straight")
    runs.child(tmp_path / "first", before=kill_at(4, signal.SIGTERM))
    result = runs.here(tmp_path / "second", resume=str(tmp_path / "first"))
    assert result.step == 10
    one, two = runs.final(tmp_path / "straight"), runs.final(tmp_path / "second")
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("file", ["weights.safetensors", "model.json"])
@pytest.mark.parametrize("world", [1, 2])
def test_killed_between_the_last_checkpoint_and_its_weights(runs, tmp_path, file, world):
    """The checkpoint of the last step is whole, the weights beside it are older: the next call brings them forward."""

    def before(rank: int) -> None:
        from diffmae_video.models import weights

        plain = weights.write_atomic

        def write(path: Path, content: str | bytes) -> None:
            if path.name == file and list((path.parent / "checkpoints").glob("step-00000010")):
                os.kill(os.getpid(), signal.SIGKILL)
            plain(path, content)

        weights.write_atomic = write

    runs.child(tmp_path / "straight", world=world)
    if world == 1:
        assert runs.child(tmp_path / "killed", before=before) == [-signal.SIGKILL]
    else:
        assert runs.child(tmp_path / "killed", world=world, before=before)[0] == -signal.SIGKILL
    assert runs.child(tmp_path / "killed", world=world) == [0] * world
    runs.assert_same(tmp_path / "straight", tmp_path / "killed")
    one, two = (json.loads((tmp_path / name / "model.json").read_text()) for name in ("straight", "killed"))
    for told in (one, two):  # clips a second and the like
        told["info"]["metrics"] = {name: told["info"]["metrics"][name] for name in ("step", "loss", "val_loss")}
    assert one == two


@pytest.mark.slow
def test_thirty_random_kill_points(runs, tmp_path):
    """SIGKILL after a random time, also during a save: the run always continues, and ends like the straight one."""
    import time

    dense = ("train.checkpoint_every=1", "train.steps=40")
    runs.here(tmp_path / "straight", *dense)
    draw = random.Random(0)
    kills = 0
    for trial in range(10):
        out = tmp_path / f"run-{trial}"
        for _ in range(6):
            process = forked(runs.in_child, {}, 0, out, dense, None, {})
            time.sleep(draw.uniform(0.2, 1.5))  # the moment of the kill, not a wait for something
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join()
        runs.here(out, *dense)
        runs.assert_same(tmp_path / "straight", out, step=40)
        shutil.rmtree(out)
    assert kills >= 30
