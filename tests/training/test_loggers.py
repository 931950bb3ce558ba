"""Loggers by name: each is told the run, its numbers and its pictures, and goes on as one run after an interruption."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffmae_video.config import TrainSettings, load_settings
from diffmae_video.errors import UsageError
from diffmae_video.registry import loggers
from diffmae_video.training.logging import RunLog

SETTINGS = {"seed": 3, "train": {"base_lr": 0.1}}


class Library(types.ModuleType):
    """Stands for wandb, trackio or mlflow: notes every call, with the names that ours use."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.info = types.SimpleNamespace(run_id="theirs")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments[0] if arguments else options))
            return self

        return call

    def of(self, name: str) -> list[Any]:
        return [given for called, given in self.calls if called == name]


def log(folder: Path, name: str, step: int) -> None:
    opened = RunLog(folder, step, ("tensorboard", name), "mine", SETTINGS)
    opened.metrics(step + 1, {"loss": 0.5, "note": "x"})
    opened.pictures(step + 1, {"clips": np.zeros((4, 4, 3), np.uint8), "movie": np.zeros((2, 4, 4, 3), np.uint8)})
    opened.close()


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_gets_one_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(name)
    monkeypatch.setitem(__import__("sys").modules, name, library)
    folder = tmp_path / "run-001"
    folder.mkdir()
    log(folder, name, 0)
    log(folder, name, 1)
    numbers = library.of("log_metrics" if name == "mlflow" else "log")
    assert {"loss": 0.5} in numbers
    if name == "mlflow":
        assert library.of("set_experiment") == ["mine", "mine"]
        first, second = library.of("start_run")
        assert (first["run_id"], first["run_name"], second["run_id"]) == (None, "run-001", "theirs")
        assert library.of("log_params") == [{"seed": "3", "train.base_lr": "0.1"}]
        assert len(library.of("log_image")) == 2
        assert len(library.of("end_run")) == 2
        return
    first, second = library.of("init")
    assert first == second  # the same project, name and id
    assert first["project"] == "mine"
    assert first["name"].startswith("run-001")
    assert len(library.of("Image")) == 2
    assert len(library.of("finish")) == 2


def test_tensorboard_and_files_hold_the_same(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = RunLog(tmp_path, 0)
    opened.metrics(1, {"loss": 0.5})
    opened.pictures(1, {"clips": np.zeros((4, 4, 3), np.uint8), "movie": np.zeros((2, 4, 4, 3), np.uint8)})
    opened.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["clips-00000001.png"]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Scalars("loss")[0].value == 0.5
    assert sorted(board.Tags()["images"]) == ["clips", "movie"]


def test_nothing_but_files_where_no_logger_is_named(tmp_path: Path) -> None:
    opened = RunLog(tmp_path, 0, ())
    opened.metrics(1, {"loss": 0.5})
    opened.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_names_are_checked_and_old_settings_are_read() -> None:
    assert set(loggers.names()) >= {"tensorboard", "wandb", "trackio", "mlflow"}
    with pytest.raises(UsageError, match=r"train\.log_to.*'wanbd' is no logger \(did you mean wandb\?\)"):
        load_settings(None, "pretrain", ['train.log_to=["wanbd"]'])
    assert TrainSettings.model_validate({"wandb": True}).log_to == ("tensorboard", "wandb")
    assert TrainSettings.model_validate({"wandb": False}).log_to == ("tensorboard",)
