"""Interrupted, asked to stop, or out of space in the middle of a save: what stands is whole, and the run goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess

import pytest

from diffmae_video.errors import DiffmaeError
from diffmae_video.training import checkpoint, pretraining
from diffmae_video.training.checkpoint import list_checkpoints, read_checkpoint


def whole(run):
    """Names of the checkpoints of a run, each checked to the last byte."""
    return [read_checkpoint(path).path.name for path in list_checkpoints(run / "checkpoints")]


def at_save(step, point, act):
    """A `before` that acts when the checkpoint of `step` has come to `point`: its files, its name, or what follows."""

    def before(rank):
        name = f"step-{step:08d}"
        plain_sync, plain_rename, plain_prune = checkpoint.sync_path, os.rename, checkpoint.Checkpointer._prune

        def sync_path(path):
            plain_sync(path)
            if point == "files" and name in str(path):
                act()

        def rename(source, target):
            if point == "before-rename" and str(target).endswith(name):
                act()
            plain_rename(source, target)
            if point == "after-rename" and str(target).endswith(name):
                act()

        def prune(self, newest):
            plain_prune(self, newest)
            if point == "before-export" and newest == step:
                act()

        checkpoint.sync_path, os.rename, checkpoint.Checkpointer._prune = sync_path, rename, prune

    return before


@pytest.mark.parametrize("point", ["files", "before-rename", "after-rename", "before-export"])
def test_killed_in_a_save(runs, tmp_path, point):
    runs.here(tmp_path / "straight")
    before = at_save(6, point, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert runs.child(tmp_path / "run", before=before) == [-signal.SIGKILL]
    newest = "step-00000004" if point in ("files", "before-rename") else "step-00000006"
    assert whole(tmp_path / "run")[0] == newest
    runs.here(tmp_path / "run")
    runs.assert_same(tmp_path / "straight", tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))


def test_signals_in_a_save_do_no_harm(runs, tmp_path):
    """One at every file that is synced: the first in a save under way, others in the save that it asked for."""
    signals = iter([signal.SIGTERM, signal.SIGUSR1] * 50)

    def before(rank):
        plain = checkpoint.sync_path

        def sync_path(path):
            if "step-00000002" not in str(path):
                os.kill(os.getpid(), next(signals))
            plain(path)

        checkpoint.sync_path = sync_path

    runs.here(tmp_path / "straight")
    for _ in range(10):
        code = runs.child(tmp_path / "run", before=before)
        assert whole(tmp_path / "run")
        if code == [0]:
            break
        assert code == [75]
    runs.here(tmp_path / "run")
    runs.assert_same(tmp_path / "straight", tmp_path / "run")


@contextlib.contextmanager
def small_disk(folder, size):
    """A tmpfs of `size` bytes; yields a function that gives it another size."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield lambda other: subprocess.run(["mount", "-o", f"remount,size={other}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(runs, tmp_path):
    """A real file system that holds one checkpoint and half of another."""
    runs.here(tmp_path / "straight")
    one = sum(path.stat().st_size for path in (tmp_path / "straight" / "checkpoints" / "step-00000010").iterdir())
    rest = sum(path.stat().st_size for path in (tmp_path / "straight").iterdir() if path.is_file())
    with small_disk(tmp_path / "disk", int(1.5 * one + 2 * rest)) as resize:
        out = tmp_path / "disk" / "run"
        match = r"No space left .* step-00000004 .*the last whole one is step-00000002.*; free some space"
        with pytest.raises(DiffmaeError, match=match):
            runs.here(out)
        assert whole(out) == ["step-00000002"]
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
        with pytest.raises(DiffmaeError, match="No space left"):  # still full: the same again, nothing lost
            runs.here(out)
        assert whole(out) == ["step-00000002"]
        resize(8 * (one + rest))
        runs.here(out)
        runs.assert_same(tmp_path / "straight", out)


def test_file_size_limit(runs, tmp_path, capfd):
    """The system refuses to write a file to its end: what a quota does, where no disk can be mounted."""
    runs.here(tmp_path / "straight")
    largest = max(path.stat().st_size for path in (tmp_path / "straight" / "checkpoints").rglob("*.safetensors"))

    def before(rank):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, resource.RLIM_INFINITY))

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails with EFBIG
        at_save(2, "after-rename", limit)(rank)

    assert runs.child(tmp_path / "run", before=before) == [1]
    assert "step-00000004 could not be written" in capfd.readouterr().out
    assert whole(tmp_path / "run") == ["step-00000002"]
    runs.here(tmp_path / "run")
    runs.assert_same(tmp_path / "straight", tmp_path / "run")


def test_error_of_a_background_save_ends_the_run_soon(runs, tmp_path, monkeypatch):
    """It surfaces at the next step, not at the next save."""
    steps = []
    plain_loss = pretraining.PretrainTask.loss

    def loss(self, *args):
        steps.append(1)
        return plain_loss(self, *args)

    def sync_path(path):
        raise OSError(5, os.strerror(5), str(path))

    monkeypatch.setattr(pretraining.PretrainTask, "loss", loss)
    monkeypatch.setattr(checkpoint, "sync_path", sync_path)
    with pytest.raises(DiffmaeError, match=r"step-00000002 could not be written .*none stands yet"):
        runs.here(tmp_path / "run", "train.steps=3000", "train.checkpoint_every=2", "train.log_every=1000")
    assert len(steps) <= 4  # the next save, two steps later, would wait for it at the latest


def test_the_best_checkpoint_is_kept(runs, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.0, 5.0])
    monkeypatch.setattr(pretraining.PretrainTask, "validate", lambda *_: {"val_loss": next(losses)})
    runs.here(tmp_path / "run", "train.validate_every=2", "train.checkpoint_every=1", "train.keep_last=1")
    assert whole(tmp_path / "run") == ["step-00000010", "step-00000004"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000004").state["best"] == 1.0
