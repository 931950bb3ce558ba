"""Several processes, micro-batches and shards give the gradients of one process with the whole batch."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

import psutil
import pytest
import torch

from diffmae_video.config import DiffusionSettings, ModelSettings, TrainSettings
from diffmae_video.errors import DataError, DiffmaeError, UsageError
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.training import distributed, parallel
from diffmae_video.training.hardware import pick_device
from diffmae_video.training.signals import stop_on_signal
from diffmae_video.training.task import micro_batch_size
from tests.training.forking import exit_codes, forked, free_port

MODEL = ModelSettings(
    preset="nano",
    width=32,
    depth=2,
    heads=2,
    frames=4,
    size=(16, 16),
    patch=8,
    decoder_depth=2,
    decoder_width=32,
    decoder_heads=2,
)


def gradients(model, wrapped, seeds, parts=1):
    """Gradients of the mean loss over clips made from `seeds`, in `parts` micro-batches."""
    chunks = torch.tensor(seeds).chunk(parts)
    for number, chunk in enumerate(chunks):
        made = [
            torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(int(s)), dtype=torch.float64)
            for s in chunk
        ]
        mask = make_mask("random", 0.5, (2, 2, 2), chunk)
        draw = model.draw(chunk, mask)
        draw = draw._replace(noise=draw.noise.double())
        with parallel.synchronized(wrapped, number == parts - 1):
            (wrapped(torch.stack(made), mask, draw).loss / parts).backward()
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def build():
    return DiffMAE(MODEL, DiffusionSettings(), seed=3).double()


@pytest.fixture(scope="module")
def whole():
    model = build()
    return gradients(model, model, list(range(8)))


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_accumulation_equals_the_large_batch(whole):
    model = build()
    assert_close(gradients(model, model, list(range(8)), parts=4), whole)


def _rank(rank, port, sharding, folder):
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with distributed.start("cpu") as processes:
        model = build()
        wrapped = parallel.parallelize(model, TrainSettings(sharding=sharding), processes)
        found = gradients(model, wrapped, list(range(rank * 4, rank * 4 + 4)), parts=2)
        norm = parallel.gradient_norm(model, 0.0)
        if rank == 0:
            torch.save({"gradients": found, "norm": norm}, folder / "found.pt")
        processes.barrier()
        os._exit(0)  # gloo's destructor was seen to wait for a peer that had gone


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_equal_the_double_batch(whole, sharding, tmp_path):
    port = free_port()
    assert exit_codes([forked(_rank, rank, port, sharding, tmp_path) for rank in range(2)], 120) == [0, 0]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_close(found["gradients"], whole)
    expected = torch.cat([gradient.flatten() for gradient in whole.values()]).norm()
    torch.testing.assert_close(found["norm"], expected, rtol=1e-9, atol=0)


def fail_on_rank_one():
    with distributed.start("cpu") as processes, stop_on_signal():  # as in training: SIGTERM alone ends nobody
        if processes.rank == 1:
            raise DataError("Shard x is damaged; make it again.")
        processes.barrier()


def test_failed_rank_ends_all_and_its_error_is_the_one_shown(capfd):
    started = time.monotonic()
    with pytest.raises(DataError, match=r"Shard x is damaged; make it again\."):
        distributed.launch(fail_on_rank_one, 2)
    assert time.monotonic() - started < 60  # a hang would last half an hour, the timeout of gloo
    assert "Traceback" not in "".join(capfd.readouterr())


def crash_when_the_other_one_fails():
    with distributed.start("cpu") as processes, stop_on_signal():
        if processes.rank == 1:
            raise DataError("Shard x is damaged; make it again.")
        try:
            processes.barrier()
        finally:  # gloo was seen to abort when its peer had gone
            os.abort()


def test_a_rank_that_crashes_because_another_failed_does_not_hide_its_error():
    with pytest.raises(DataError, match=r"Shard x is damaged; make it again\."):
        distributed.launch(crash_when_the_other_one_fails, 2)


def crash():
    os.abort()


def test_a_crash_names_its_signal():
    with pytest.raises(DiffmaeError, match=r"ended by SIGABRT\); run again"):
        distributed.launch(crash, 2)


def test_ranks_come_from_torchrun_then_slurm():
    assert distributed.ranks_from_environment({}) == (0, 1, 0, 1)
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert distributed.ranks_from_environment(torchrun) == (5, 8, 1, 4)
    slurm = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "2",
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node[003-004]",
    }
    assert distributed.ranks_from_environment(slurm) == (6, 8, 2, 4)
    assert (slurm["MASTER_ADDR"], slurm["MASTER_PORT"]) == ("node003", "20123")
    assert distributed.ranks_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == (
        0,
        1,
        0,
        1,
    )  # sbatch's shell


def test_batch_must_divide():
    assert micro_batch_size(TrainSettings(batch_size=64, accumulate=2), 4) == 8
    with pytest.raises(UsageError, match="make it a multiple of 6"):
        micro_batch_size(TrainSettings(batch_size=64, accumulate=2), 3)


def test_missing_device_is_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DiffmaeError, match="sees no CUDA device"):
        pick_device("cuda")


def wait_for_a_signal(folder):
    (folder / f"{os.environ['RANK']}.pid.part").write_text(str(os.getpid()))
    (folder / f"{os.environ['RANK']}.pid.part").rename(folder / f"{os.environ['RANK']}.pid")
    threading.Event().wait()


def test_processes_leave_when_their_launcher_is_killed(tmp_path):
    context = multiprocessing.get_context("spawn")
    launcher = context.Process(target=distributed.launch, args=(wait_for_a_signal, 2, tmp_path))
    launcher.start()
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert launcher.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [psutil.Process(int(path.read_text())) for path in tmp_path.glob("*.pid")]
    launcher.kill()
    launcher.join()
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
