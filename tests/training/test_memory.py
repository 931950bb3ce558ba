"""Batches that fit: parts chosen from memory, halved when it runs out, with the same results to rounding."""

from __future__ import annotations

import math
import re

import pytest
import torch

from diffmae_video.config import load_settings, read_settings, with_overrides
from diffmae_video.errors import DiffmaeError, UsageError
from diffmae_video.pipelines import plan as plans
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.plan import fit_batch, make_plan, measure
from diffmae_video.pipelines.pretrain import pretrain
from diffmae_video.training import hardware
from diffmae_video.training.finetuning import FinetuneTask
from diffmae_video.training.pretraining import PretrainTask

SMALL = ["model.frames=4", "model.size=[32, 32]", "model.patch=8", "train.batch_size=16"]


def limited(task: type, most: int, seen: list[int]):
    """The task's loss on a device whose memory ends above `most` clips."""
    plain = task.loss

    def loss(self, model, batch, device):
        clips = len(batch.clips[batch.part])
        seen.append(clips)
        if clips > most:
            torch.rand(())  # whatever was drawn before memory ran out
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, model, batch, device)

    return loss


def values(runs, folder, column: str) -> list[float]:
    found = [line[column] for line in runs.metrics(folder) if column in line]
    assert found
    return found


@pytest.mark.parametrize("most", [2, 1])
def test_a_run_that_is_out_of_memory_goes_on_in_smaller_parts(runs, tmp_path, monkeypatch, most):
    straight = runs.here(tmp_path / "straight")
    seen: list[int] = []
    monkeypatch.setattr(PretrainTask, "loss", limited(PretrainTask, most, seen))
    cut = runs.here(tmp_path / "cut")
    tried = [4, 2, 2] if most == 2 else [4, 2, 1, 1, 1, 1]
    assert seen[: len(tried)] == tried
    assert set(seen[len(tried) :]) == {most}
    for column in ("loss", "grad_norm", "val_loss"):
        one, two = (values(runs, result.directory, column) for result in (straight, cut))
        assert two == pytest.approx(one, rel=1e-3)
    weights = [runs.final(tmp_path / name)["ema.encoder.patch_embed.proj.weight"] for name in ("straight", "cut")]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_mixed_clips_of_fine_tuning_stay_mixed_alike(runs, tmp_path, monkeypatch):
    plain = ("finetune.dropout=0.0", "finetune.drop_path=0.0")
    runs.finetune(tmp_path / "straight", *plain)
    seen: list[int] = []
    monkeypatch.setattr(FinetuneTask, "loss", limited(FinetuneTask, 2, seen))
    runs.finetune(tmp_path / "cut", *plain)
    assert seen[:3] == [4, 2, 2]
    one, two = (values(runs, tmp_path / name, "loss") for name in ("straight", "cut"))
    assert two == pytest.approx(one, rel=1e-3)


def test_a_continued_run_keeps_its_parts(runs, kill_at, tmp_path, monkeypatch):
    monkeypatch.setattr(PretrainTask, "loss", limited(PretrainTask, 2, []))
    runs.here(tmp_path / "straight")
    assert runs.child(tmp_path / "run", before=kill_at(12)) == [-9]
    monkeypatch.undo()
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(tmp_path))
    runs.here(tmp_path / "run")
    runs.assert_same(tmp_path / "straight", tmp_path / "run")


def test_a_number_is_not_changed(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(PretrainTask, "loss", limited(PretrainTask, 1, []))
    with pytest.raises(DiffmaeError, match=r"Out of memory with 2 clips .*train\.accumulate=4"):
        runs.here(tmp_path / "run", "train.accumulate=2")


def test_several_processes_say_what_to_set(runs, tmp_path, capfd):
    def before(rank):
        PretrainTask.loss = limited(PretrainTask, 2, [])

    assert runs.child(tmp_path / "run", "train.batch_size=8", world=2, before=before) == [1, 1]
    assert "train.accumulate=2" in capfd.readouterr().out
    assert runs.child(tmp_path / "run", "train.batch_size=8", "train.accumulate=2", world=2, before=before) == [0, 0]


def test_parts_are_chosen_from_the_memory_that_is_there():
    settings = load_settings("video-tiny", "pretrain", [*SMALL, "train.batch_size=64"])
    whole = measure(settings, 64).memory()
    assert fit_batch(settings, 1, 2 * whole)[0] == 1
    assert fit_batch(settings, 2, 2 * whole)[0] == 1
    half, cost = fit_batch(settings, 1, whole / 0.9 - 1)
    assert half == 2
    assert cost.memory() < whole
    assert fit_batch(settings, 1, 1.0)[0] == 64  # nothing fits: one clip at a time


def test_a_number_of_micro_batches_is_kept_whatever_the_memory():
    settings = load_settings("video-tiny", "pretrain", [*SMALL, "train.accumulate=4"])
    parts, cost = fit_batch(settings, 1, 1.0)
    assert parts == 1
    assert cost == measure(settings, 4)


def test_the_run_takes_what_the_estimate_says(runs, tmp_path, monkeypatch, capsys):
    seen: list[int] = []
    monkeypatch.setattr(PretrainTask, "loss", limited(PretrainTask, 4, seen))
    needed = measure(with_overrides(runs.settings(), train={"accumulate": 4}), 1).memory()
    monkeypatch.setattr(plans, "free_memory", lambda *_: needed + 1)
    runs.here(tmp_path / "run", "train.steps=1")
    assert seen == [1, 1, 1, 1]
    assert "Micro-batches: 4 of 1 clips" in capsys.readouterr().out
    assert read_settings(tmp_path / "run" / "config.toml").train.accumulate == "auto"


@pytest.mark.parametrize("stage", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_a_clip_that_does_not_fit_is_refused_with_settings_that_fit(stage, runs, tmp_path, monkeypatch):
    larger = ("model.size=[128, 128]", "train.steps=1")
    start = runs.here if stage == "pretrain" else runs.finetune
    monkeypatch.setattr(plans, "free_memory", lambda *_: 55 * 2**20)
    with pytest.raises(UsageError, match=r"A step with a single clip at once takes .* set ") as refused:
        start(tmp_path / "run", *larger)
    remedy = [text.rstrip(",") for text in re.findall(r"\w+\.\w+=(?:\[.*?\]|\S+)", str(refused.value))]
    assert remedy
    assert start(tmp_path / "run", *larger, *remedy).step == 1
    monkeypatch.setattr(plans, "free_memory", lambda *_: 1.0)
    with pytest.raises(UsageError, match="take a device with more memory"):
        start(tmp_path / "other", *larger)


def test_plan_of_a_clip_that_does_not_fit_ends_with_settings_that_fit(runs, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"takes 0\.06 GiB of memory, 0\.05 are free; set train\.grad_checkpointing"):
        runs.here(tmp_path / "run", "model.size=[128, 128]", dry_run=True, device_memory="55MiB")
    assert "memory a process" in capsys.readouterr().out


def test_a_number_of_micro_batches_that_does_not_fit_is_told_and_tried(runs, tmp_path, monkeypatch, capsys):
    settings = with_overrides(runs.settings(), train={"accumulate": 1})
    monkeypatch.setattr(plans, "free_memory", lambda *_: measure(settings, 4).memory() - 1)
    assert runs.here(tmp_path / "run", "train.accumulate=1", "train.steps=1").step == 1
    assert "Note: A step with train.accumulate=1 takes" in capsys.readouterr().out


def test_plan_for_a_device_that_is_not_here(small_shards, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(tmp_path))
    job = Job(data=str(small_shards), recipe="video-base", device="cuda", dry_run=True, device_memory="4GiB")
    plan = pretrain(job.with_(overrides=("train.batch_size=22",)), throughput=100.0).plan
    assert plan.precision.startswith("bf16")
    assert plan.micro_batch < 22
    assert plan.memory_gib <= 0.9 * 4
    assert plan.micro_batch == math.ceil(22 / plan.parts)
    said = capsys.readouterr().out
    assert "of 4.00 GiB" in said
    assert "cores can run" not in said  # of this machine
    assert pretrain(job.with_(overrides=("train.batch_size=2",))).plan.hours is None


def test_device_memory_is_for_plans_and_a_size():
    with pytest.raises(UsageError, match="--dry-run"):
        Job(device_memory="24GiB")
    assert hardware.parse_memory("24GiB") == 24 * 2**30
    assert hardware.parse_memory("80 GB") == 80e9
    with pytest.raises(UsageError, match="24GiB"):
        hardware.parse_memory("much")


def test_plan_of_a_cpu_says_what_fits(capsys):
    plan = make_plan(load_settings("video-tiny", "pretrain", SMALL), 10, 10, world=1, device=torch.device("cpu"))
    assert plan.parts == 1
    assert plan.micro_batch == 16


@pytest.mark.parametrize(("granted", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_cores_are_those_that_the_control_group_grants(monkeypatch, tmp_path, granted, cores):
    (tmp_path / "cpu.max").write_text(f"{granted}\n")
    monkeypatch.setattr(hardware, "_CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert hardware.core_count() == cores


def test_memory_is_what_the_control_group_leaves(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(hardware, "_CONTROL_GROUP", tmp_path)
    assert hardware.free_memory(torch.device("cpu"), processes=2) == 1_000_000
