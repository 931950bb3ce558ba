"""What is imported when: libraries that take seconds come with the work that needs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = {"timm", "torchvision", "torch._dynamo", "torch._inductor", "sympy", "transformers", "matplotlib", "tensorboard"}
WORDS = {
    "--help": 0,
    "pretrain --help": 0,
    "pretrain --nonsense": 2,
    "pretrain --video": 2,
    "finetune --task k400 --init missing/run": 2,
    "eval --task k400 --checkpoint missing/run": 2,
}


def _run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_model_needs_torch_and_nothing_else_that_is_slow(tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import diffmae_video
diffmae_video.DiffMAE, diffmae_video.Classifier, diffmae_video.load_pretrained, diffmae_video.save_model
print(*set(sys.modules) - before)"""
    assert not SLOW & set(_run(code, tmp_path).split())


def test_help_and_early_usage_errors_come_before_torch(tmp_path: Path) -> None:
    code = f"""
import contextlib, sys
from diffmae_video.cli.app import run
for words, code in {WORDS!r}.items():
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        assert run(words.split()) == code, words
    assert "torch" not in sys.modules, words
print()"""
    _run(code, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' PyTorch has another OpenMP")
@pytest.mark.parametrize(
    ("given", "turns"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "70"}, "70"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
        ({"OMP_WAIT_POLICY": "active"}, "30000000000"),
    ],
)
def test_threads_of_the_command_line_wait_as_the_environment_says_else_shortly(
    given: dict[str, str], turns: str, tmp_path: Path
) -> None:
    """OpenMP itself is asked: it prints its settings when it is loaded."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    code = "import sys; sys.argv = ['diffmae', 'doctor']; from diffmae_video.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        **{"capture_output": True, "text": True, "timeout": 300, "cwd": tmp_path},
        env=clean | given | {"OMP_DISPLAY_ENV": "verbose"},
    )
    shown = re.findall(r"GOMP_SPINCOUNT = '(.*)'", done.stderr)
    assert shown
    assert set(shown) == {turns}, done.stderr
