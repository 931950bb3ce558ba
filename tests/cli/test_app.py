"""The command line frame: exit codes, one-line errors, help, version, doctor, recipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from diffmae_video._version import __version__
from diffmae_video.cli.app import app, run
from diffmae_video.errors import DataError, Stopped, UsageError


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"diffmae-video {__version__}"


def test_help_lists_the_stages_without_importing_torch() -> None:
    code = (
        "import sys\nfrom diffmae_video.cli.app import run\ncode = run(['--help'])\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code + "sys.exit(code)"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("shard", "pretrain", "finetune", "eval", "render-inpaint", "demo", "doctor", "recipes"):
        assert command in done.stdout


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "--vidoe"]) == 2
    assert "--vidoe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("x.tar is damaged; shard again."), 3),
        (Stopped("Saved; run again."), 75),
        (ZeroDivisionError("no"), 1),
    ],
)
def test_errors_are_one_line_and_the_documented_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(typer.main, "get_command", lambda _: type("Command", (), {"main": staticmethod(fail)}))
    assert run([]) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "Traceback" not in printed
    assert str(error) in printed


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFMAE_DEBUG", "1")
    with pytest.raises(Exception, match="nowhere"):
        run(["recipes", "show", "nowhere"])


@pytest.mark.parametrize("words", [["--debug", "recipes", "show", "x"], ["recipes", "show", "x", "--debug"]])
def test_debug_works_before_and_after_the_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFMAE_DEBUG", "")
    with pytest.raises(UsageError, match="no such recipe"):
        run(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "--task", "k400"], "No finetune result for task k400 is known"),
        (["pretrain"], "No shards result for media video is known"),
        (["pretrain", "--nproc", "2"], "No shards result for media video is known"),
        (["finetune", "--task", "k400"], "no shards of it are known"),
        (["features"], "No pretrain result is known"),
        (["predict", "x.mp4"], "No finetune result is known"),
        (["loss-sweep"], "No pretrain result is known"),
        (["pretrain", "--device", "tpu"], "--device"),
    ],
)
def test_early_errors_import_no_torch(words: list[str], said: str, tmp_path: Path) -> None:
    _ends_early(words, said, 2, ["torch", "numpy"], tmp_path)


@pytest.mark.parametrize(
    ("words", "said", "expected"),
    [
        (["pretrain", "--recipe", "nope"], "--recipe nope: no such recipe", 2),
        (["pretrain", "--data", "nothing"], "nothing holds no manifest.json", 3),
        (["render-inpaint", "nothing.mp4"], "nothing.mp4 cannot be read", 3),
    ],
)
def test_names_that_are_not_there_are_told_without_torch(
    words: list[str], said: str, expected: int, tmp_path: Path
) -> None:
    _ends_early(words, said, expected, ["torch"], tmp_path)


def _ends_early(words: list[str], said: str, expected: int, absent: list[str], folder: Path) -> None:
    """The command ends with this code and sentence, has not imported these modules, and leaves nothing."""
    code = (
        "import sys\nfrom diffmae_video.cli.app import run\ncode = run(sys.argv[1:])\n"
        f"assert not {{*{absent!r}}} & sys.modules.keys()\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr
    assert said in done.stderr
    assert list(folder.iterdir()) == []


def test_a_signal_while_a_command_starts_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heeded")

    monkeypatch.setattr(typer.main, "get_command", lambda _: type("Command", (), {"main": staticmethod(start)}))
    before = signal.getsignal(signal.SIGTERM)
    assert run([]) == 1
    assert capsys.readouterr().err == "diffmae: Stopped by SIGTERM before it could save; run the same command again.\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("moment", ["at work", "in the step", "while it leaves", "while it is told"])
def test_a_second_ctrl_c_shows_no_traceback(moment: str, tmp_path: Path) -> None:
    """Once the first has asked a stage to stop, the second interrupts wherever the process is."""
    program = (
        "import os, signal, sys, typer\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from diffmae_video.cli import app\n"
        "from diffmae_video.training.signals import stop_on_signal\n"
        "def interrupt(): os.kill(os.getpid(), signal.SIGINT)\n"
        "moment = sys.argv.pop()\n"
        "def start(*_, **__):\n"
        "    if moment == 'at work': interrupt()\n"
        "    with stop_on_signal() as stop:\n"
        "        interrupt()\n"
        "        try:\n"
        "            if moment == 'in the step': interrupt()\n"
        "            stop.check('it is saved')\n"
        "        finally:\n"
        "            if moment == 'while it leaves': interrupt()\n"
        "real = typer.echo\n"
        "def echo(*args, **kwargs):\n"
        "    if moment == 'while it is told': interrupt()\n"
        "    real(*args, **kwargs)\n"
        "typer.echo = echo\n"
        "typer.main.get_command = lambda _: type('Command', (), {'main': staticmethod(start)})\n"
        "app.main()"
    )
    done = subprocess.run([sys.executable, "-c", program, moment], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == ("" if moment == "while it is told" else "diffmae: Interrupted.\n")


def test_every_option_has_an_environment_variable() -> None:
    def parameters(command: object, path: str) -> list[tuple[str, object]]:
        found = [(path, parameter) for parameter in command.params]
        for name, inner in getattr(command, "commands", {}).items():
            found += parameters(inner, f"{path} {name}")
        return found

    options = [
        (path, parameter)
        for path, parameter in parameters(typer.main.get_command(app), "diffmae")
        if parameter.param_type_name == "option"
        and parameter.name not in ("help", "version")
        and "completion" not in parameter.name
    ]
    assert options
    bare = [
        f"{path} {option.opts[0]}" for path, option in options if not str(option.envvar or "").startswith("DIFFMAE_")
    ]
    assert bare == []


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    assert "smoke" in capsys.readouterr().out
    assert run(["recipes", "show", "smoke", "--stage", "finetune", "--set", "train.steps=7"]) == 0
    assert "steps = 7" in capsys.readouterr().out
    assert run(["recipes", "show", "smoke", "--stage", "lunch"]) == 2


def test_doctor_finds_a_working_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    for part in ("torch", "libx264", "GiB free", "Everything needed is here"):
        assert part in printed
