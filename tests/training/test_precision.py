"""Number types: which one a machine gets, and that a run keeps its own."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from diffmae_video.config import read_settings
from diffmae_video.errors import UsageError
from diffmae_video.pipelines.doctor import examine
from diffmae_video.training import hardware
from diffmae_video.training.pretraining import PretrainTask

X86 = {"architecture": "x86_64", "avx2": True}
AUTO = "train.precision=auto"


@pytest.fixture
def processor(monkeypatch):
    """Pretend to be on a processor with these features and this speed of bf16."""

    def pretend(features, speed=None):
        hardware._choose_on_cpu.cache_clear()
        monkeypatch.setattr(hardware, "_cpu_features", lambda: features)
        monkeypatch.setattr(hardware, "_bf16_speed", lambda: speed)  # None: it must not be asked

    yield pretend
    hardware._choose_on_cpu.cache_clear()


@pytest.mark.parametrize(
    ("features", "speed", "expected", "why"),
    [
        (X86, None, "fp32", "neither AMX nor AVX512-BF16"),
        ({**X86, "avx512_bf16": True}, None, "bf16", "AVX512-BF16"),
        ({**X86, "avx512_bf16": True, "amx_bf16": True}, None, "bf16", "AMX"),
        ({"architecture": "aarch64"}, 3.0, "bf16", "3 times the speed"),
        ({"architecture": "aarch64"}, 0.25, "fp32", "0.25 times the speed"),
        ({}, 1.1, "fp32", "1.1 times"),
    ],
)
def test_processors(processor, features, speed, expected, why):
    processor(features, speed)
    name, reason = hardware.choose_precision(torch.device("cpu"))
    assert name == expected
    assert why in reason


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
def test_gpus(monkeypatch, capability, expected):
    """A T4 (7.5) says that it supports bf16, which it emulates."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    name, reason = hardware.choose_precision(torch.device("cuda", 0))
    assert name == expected
    assert f"{capability[0]}.{capability[1]}" in reason


def test_other_devices():
    assert hardware.choose_precision(torch.device("mps"))[0] == "fp32"


def test_speed_of_bf16_is_measured_in_a_fair_ratio():
    assert 0.001 < hardware._bf16_speed() < 100


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_autocast(precision, dtype):
    x = torch.ones(2, 2)
    with hardware.autocast(torch.device("cpu"), precision):
        assert (x @ x).dtype == dtype


def test_auto_is_resolved_by_the_device(processor):
    processor({**X86, "amx_bf16": True})
    with hardware.autocast(torch.device("cpu"), "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_doctor_says_which_and_why(processor):
    processor({**X86, "avx512_bf16": True})
    found = {finding.what: finding.found for finding in examine()}
    if not torch.cuda.is_available():
        assert "bf16" in found["precision = auto"]
        assert "AVX512-BF16" in found["precision = auto"]


def test_dry_run_says_which_and_why(runs, tmp_path, processor, capsys):
    processor({**X86, "avx512_bf16": True})
    plan = runs.here(tmp_path / "run", AUTO, dry_run=True).plan
    assert plan.precision.startswith("bf16")
    assert "AVX512-BF16" in plan.precision
    assert "bf16 (this processor has AVX512-BF16)" in capsys.readouterr().out


def test_a_run_keeps_its_precision_on_another_machine(runs, kill_at, tmp_path, processor):
    processor({**X86, "avx512_bf16": True})
    runs.here(tmp_path / "straight", AUTO)
    assert runs.child(tmp_path / "run", AUTO, before=kill_at(5, signal.SIGTERM)) == [75]
    processor(X86)
    runs.here(tmp_path / "run", AUTO)
    runs.assert_same(tmp_path / "straight", tmp_path / "run")
    assert read_settings(tmp_path / "run" / "config.toml").train.precision == "bf16"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["settings.train"]["precision"] == "bf16"


def test_another_precision_is_another_run(runs, tmp_path):
    runs.here(tmp_path / "run", "train.precision=bf16", "train.steps=1")
    with pytest.raises(UsageError, match=r"train.precision was bf16, not fp32"):
        runs.here(tmp_path / "run", "train.precision=fp32", "train.steps=1")


def test_fp16_with_loss_scaling_resumes_bit_for_bit(runs, kill_at, tmp_path):
    half = ("train.precision=fp16", "train.log_every=1")
    runs.here(tmp_path / "straight", *half)
    assert runs.child(tmp_path / "run", *half, before=kill_at(6)) == [-signal.SIGKILL]
    runs.here(tmp_path / "run", *half)
    runs.assert_same(tmp_path / "straight", tmp_path / "run")
    lines = [line for line in runs.metrics(tmp_path / "run") if "loss_scale" in line]
    assert len(lines) == 10
    assert lines[-1]["loss_scale"] == 2.0 ** (16 - lines[-1]["overflows"])


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_beyond_fp16_halve_the_scale_and_leave_the_step_out(runs, tmp_path, world):
    """The loss is made so large that the first scales overflow fp16; every process takes the same scale."""

    def before(rank):
        plain = PretrainTask.loss

        def loss(self, *args):
            output = plain(self, *args)
            return output._replace(loss=output.loss * 2**10)

        PretrainTask.loss = loss

    options = ("train.precision=fp16", "train.log_every=1", "train.sharding=fsdp", "train.steps=12")
    assert runs.child(tmp_path / "run", *options, world=world, before=before) == [0] * world
    lines = [line for line in runs.metrics(tmp_path / "run") if "loss_scale" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert 0 < lines[-1]["overflows"] < 12
    assert lines[-1]["loss_scale"] == 2.0 ** (16 - lines[-1]["overflows"])
    assert lines[-1]["skipped"] == 0  # that counts steps lost to losses that are no numbers
    assert lines[-1]["loss"] is not None
