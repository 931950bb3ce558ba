"""What goes wrong in training, and what is left of the run then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import fsspec
import pytest
import safetensors.torch
import torch

from diffmae_video.data import remote
from diffmae_video.data.manifest import Manifest
from diffmae_video.errors import DataError, DiffmaeError, StorageError, UsageError
from diffmae_video.registry import loggers
from diffmae_video.training import checkpoint, pretraining
from diffmae_video.training import run as run_files
from diffmae_video.training.checkpoint import fetch_from_mirror, list_checkpoints
from diffmae_video.training.signals import Interruption


def spoil(monkeypatch, *calls):
    """The loss of these micro-batches is infinite."""
    plain, count = pretraining.PretrainTask.loss, [0]

    def loss(self, *args):
        output = plain(self, *args)
        count[0] += 1
        return output._replace(loss=output.loss * float("inf")) if count[0] in calls else output

    monkeypatch.setattr(pretraining.PretrainTask, "loss", loss)


def test_nonfinite_loss_stops_before_the_optimizer(runs, tmp_path, monkeypatch):
    spoil(monkeypatch, 3)
    with pytest.raises(DiffmaeError, match="step 3 is not finite"):
        runs.here(tmp_path / "run")
    note = json.loads((tmp_path / "run" / "nonfinite-00000003-rank0.json").read_text())
    assert len(note["keys"]) == len(note["seeds"]) == 4
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    monkeypatch.undo()
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(tmp_path))
    runs.here(tmp_path / "straight")
    runs.here(tmp_path / "run")
    runs.assert_same(tmp_path / "straight", tmp_path / "run")


def test_nonfinite_steps_are_skipped_and_counted(runs, tmp_path, monkeypatch):
    spoil(monkeypatch, 3, 5)
    result = runs.here(tmp_path / "run", "train.skip_nonfinite=2")
    assert result.metrics["skipped"] == 2
    assert all(
        tensor.isfinite().all() for tensor in runs.final(tmp_path / "run").values() if tensor.is_floating_point()
    )
    spoil(monkeypatch, 3, 5)
    with pytest.raises(DiffmaeError, match="step 5 is not finite"):
        runs.here(tmp_path / "other", "train.skip_nonfinite=1")


def test_checkpoint_is_on_disk_before_it_has_its_name(runs, tmp_path, monkeypatch):
    synced: list[str] = []
    plain_sync, plain_rename = checkpoint.sync_path, os.rename

    def rename(source, target):
        if ".tmp-step" in str(source):
            assert any(name.endswith(".safetensors") for name in synced)
            assert str(source) in synced  # the directory itself
        plain_rename(source, target)

    monkeypatch.setattr(checkpoint, "sync_path", lambda path: (synced.append(str(path)), plain_sync(path)))
    monkeypatch.setattr(os, "rename", rename)
    runs.here(tmp_path / "run", "train.steps=2")
    assert str(tmp_path / "run" / "checkpoints") in synced


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": -1}, "step -1"),
        ({"step": 10**12}, "step 1000000000000"),
        ({"step": "two"}, "step 'two'"),
        ({"step": 3}, "step 3"),  # the folder says 2
        ({"files": []}, "format"),
        ({"stream": {"epoch": -1, "consumed": 0}}, "place in the data"),
        ({"stream": {"epoch": 0, "consumed": 10**30}}, "place in the data"),
        ({"stream": None}, "odd values"),
        ({"optimizer": {}}, "odd values"),
        ({"best": [], "world": "one", "bad": 5}, "odd values"),
        ({"identity": None}, "odd values"),
    ],
)
def test_odd_numbers_of_a_checkpoint_are_one_sentence(runs, tmp_path_factory, tmp_path, change, said):
    if not hasattr(runs, "two_steps"):
        runs.two_steps = tmp_path_factory.mktemp("odd") / "run"
        runs.here(runs.two_steps, "train.steps=2")
    there = tmp_path / "step-00000002"
    shutil.copytree(runs.two_steps / "checkpoints" / "step-00000002", there)
    numbers = json.loads((there / "state.json").read_text())
    (there / "state.json").write_text(json.dumps({**numbers, **change}))
    with pytest.raises((DataError, UsageError)) as caught:
        runs.here(tmp_path / "on", "train.steps=2", resume=str(there))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_kept_checkpoints(runs, tmp_path):
    runs.here(tmp_path / "run", "train.checkpoint_every=1", "train.keep_last=2", "train.keep_every=4")
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == [f"step-{step:08d}" for step in (10, 9, 8, 4)]


def test_mirror_brings_a_run_back(runs, kill_at, tmp_path):
    mirror = f"train.mirror='file://{tmp_path / 'mirror'}'"
    runs.here(tmp_path / "straight")
    assert runs.child(tmp_path / "first", mirror, before=kill_at(5, signal.SIGTERM)) == [75]
    assert runs.here(tmp_path / "second", mirror).step == 10  # another machine: nothing but the mirror is there
    assert runs.final(tmp_path / "second").keys() == runs.final(tmp_path / "straight").keys()
    one, two = runs.final(tmp_path / "second"), runs.final(tmp_path / "straight")
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_data_end_the_run(runs, tmp_path, workers):
    """Every clip is noise: an error with their count, and no end of waiting for a good one."""
    shards = tmp_path / "shards"
    shutil.copytree(runs.shards, shards)
    manifest = Manifest.load(shards)
    table = manifest.samples("train")
    names = [shard.name for shard in manifest.shards]
    for number in range(len(table.offset)):
        with open(shards / names[table.shard[number]], "r+b") as file:
            file.seek(table.offset[number])
            file.write(os.urandom(int(table.size[number])))
    with pytest.raises(DataError, match=r"samples in a row cannot be read, .*diffmae verify"):
        type(runs)(shards).here(tmp_path / "run", f"data.workers={workers}")


def test_wandb_gets_the_numbers_of_one_run(runs, kill_at, tmp_path, monkeypatch):
    """Without a network: the files that `wandb sync` would upload, under one id before and after an interruption."""
    library = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = 'train.log_to=["wandb"]'
    assert runs.child(tmp_path / "run", wandb, before=kill_at(5, signal.SIGTERM)) == [75]
    runs.here(tmp_path / "run", wandb, "train.picture_every=10")
    library.teardown()  # its own process has written everything
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.stem for file in files}) == 1
    assert b"grad_norm" in files[-1].read_bytes()
    assert list((tmp_path / "run" / "wandb").rglob("reconstruction*.png"))


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_logger_that_is_missing_is_one_sentence(runs, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf"train\.log_to names {name}.*pip install 'diffmae-video\[{name}\]'"):
        runs.here(tmp_path / "run", f'train.log_to=["{name}"]')


@pytest.mark.parametrize("fails", ["start", "metrics", "picture", "close"])
def test_a_tracker_that_fails_is_refused_at_the_start_and_left_out_later(runs, tmp_path, monkeypatch, capsys, fails):
    asked = []

    class Server:
        def __init__(self, run):
            self.answer("start")

        def answer(self, what):
            asked.append(what)
            if what == fails:
                raise ConnectionError("no answer\nfrom the server.")

        def metrics(self, step, numbers):
            self.answer("metrics")

        def picture(self, step, name, array):
            self.answer("picture")

        def close(self):
            self.answer("close")

    monkeypatch.setitem(loggers._parts, "server", Server)
    words = ('train.log_to=["server"]', "train.log_every=1", "train.picture_every=3")
    if fails == "start":
        with pytest.raises(UsageError, match=r"names server, .*Error: no answer from the server\); set it up"):
            runs.here(tmp_path / "run", *words)
        return
    assert runs.here(tmp_path / "run", *words).step == 10
    assert asked.count(fails) == 1
    assert capsys.readouterr().out.count("Warning: server gets no more of this run") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"loss"') >= 10


def test_run_in_use_is_refused(tmp_path):
    refused = pytest.raises(UsageError, match=rf"in use by process {os.getpid()}")
    with run_files.lock(tmp_path / "run"), refused, run_files.lock(tmp_path / "run"):
        pass


def test_folder_of_something_else_is_refused(runs, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something that is no run"):
        runs.here(tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["text.txt"]


def test_too_few_samples(runs, tmp_path):
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=r"22 clips an epoch, fewer than .* = 32; set train\.batch_size=16"):
            runs.here(tmp_path / "run", "train.batch_size=32", dry_run=dry_run)
    assert runs.here(tmp_path / "run", "train.batch_size=16", "train.steps=1").step == 1
    with pytest.raises(UsageError, match=r"set train\.batch_size=6, or"):  # 3 micro-batches of one video, twice
        runs.here(tmp_path / "other", "train.batch_size=60", "train.accumulate=3", "data.repeats=2", "data.split=val")


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_before_its_first_step_leaves_the_folder_free(runs, tmp_path, there):
    if there:
        (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="fewer than"):
        runs.here(tmp_path / "run", "train.batch_size=32")
    assert (tmp_path / "run").exists() == there
    assert runs.here(tmp_path / "run", "train.steps=2").step == 2


def test_a_signal_before_the_first_step_leaves_the_folder_free(runs, tmp_path):
    def before(rank):
        from diffmae_video.training.trainer import Trainer

        def start(self, found):
            raise Interruption("SIGTERM")

        Trainer.start = start

    assert runs.child(tmp_path / "run", before=before) == [99]
    assert not (tmp_path / "run").exists()


def test_a_signal_while_an_interrupted_run_starts_again_is_a_stop(runs, kill_at, tmp_path):
    def before(rank):
        from diffmae_video.training.trainer import Trainer

        def start(self, found):
            raise Interruption("SIGTERM")

        Trainer.start = start

    assert runs.child(tmp_path / "run", before=kill_at(5, signal.SIGTERM)) == [75]
    assert runs.child(tmp_path / "run", before=before) == [75]
    assert runs.here(tmp_path / "run").step == 10


def test_out_of_memory_names_the_setting(runs, tmp_path, monkeypatch):
    def loss(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pretraining.PretrainTask, "loss", loss)
    with pytest.raises(DiffmaeError, match=r"Out of memory with 4 clips .*train\.accumulate=2"):
        runs.here(tmp_path / "run", "train.accumulate=1")


def test_nothing_is_unpickled(runs, tmp_path):
    runs.here(tmp_path / "run", "train.steps=2")
    files = {path.suffix for path in (tmp_path / "run" / "checkpoints" / "step-00000002").iterdir()}
    assert files == {".safetensors", ".json"}
    weights = safetensors.torch.load_file(tmp_path / "run" / "weights.safetensors")
    average = runs.final(tmp_path / "run", 2)
    assert all(weights[name.removeprefix("ema.")].equal(average[name]) for name in average if name.startswith("ema."))


def test_a_mirror_that_does_not_answer_is_no_verdict_on_its_checkpoints(tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    store.pipe_file("/away/step-00000010/state.json", b"not a state")
    warned: list[str] = []
    assert fetch_from_mirror("memory://away", tmp_path / "one", warned.append) is None
    assert "step-00000010" in warned[0]

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("503 Slow Down")

    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(type(store), "get_file", failing)
    with pytest.raises(StorageError, match=r"step-00000010/state.json failed 4 times"):
        fetch_from_mirror("memory://away", tmp_path / "two", warned.append)
    assert not list((tmp_path / "two").iterdir())
    assert len(warned) == 1
