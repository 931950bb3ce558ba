"""What only a CUDA device shows: `pytest -m gpu`. Every test skips without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from diffmae_video import Classifier, DiffMAE, Job, pretrain
from diffmae_video.config import ModelSettings, Settings, with_overrides
from diffmae_video.data.synthetic import write_demo_data
from diffmae_video.masking import make_mask
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.exporters import export_model
from diffmae_video.models.weights import save_model
from diffmae_video.pipelines.evaluate import evaluate
from diffmae_video.pipelines.plan import measure
from diffmae_video.pipelines.shard import ShardJob, shard
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.hardware import autocast
from diffmae_video.training.optim import build_optimizer
from diffmae_video.training.parallel import parallelize
from diffmae_video.training.pretraining import PretrainTask
from tests.training.forking import free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SMALL = (
    *("model.frames=4", "model.size=[32, 32]", "model.tubelet=2", "model.patch=8", "train.batch_size=4"),
    *("train.steps=10", "train.checkpoint_every=2", "train.log_every=1", "train.ema=0.9", "data.workers=0"),
)
MODEL = {"preset": "nano", "frames": 4, "size": (32, 32), "patch": 8, "decoder_width": 64, "decoder_depth": 2}
GPU = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_demo_data(folder / "clips", train=22, val=4, size=32, frames=8, workers=1)
    shard(ShardJob(folder / "clips", folder / "shards", workers=1))
    return folder / "shards"


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A workspace of its own, memory counted from here on, and nothing left in the way of the next test."""
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(tmp_path))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.use_deterministic_algorithms(False)


def train(shards: Path, out: Path, *overrides: str) -> Any:
    job = Job(recipe="smoke", overrides=(*SMALL, *overrides), data=str(shards), out=out, device="cuda")
    return pretrain(job)


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def model_and_loss(seed: int = 0, **changes: Any) -> tuple[DiffMAE, Callable[[torch.nn.Module], torch.Tensor]]:
    """A small model on the GPU, and its loss on fixed clips."""
    settings = ModelSettings.model_validate({**MODEL, **changes})
    model = DiffMAE(settings, seed=seed).to(GPU).train()
    clips = torch.rand(4, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1)).to(GPU)
    mask = make_mask("random", 0.75, (2, 4, 4), range(4)).to(GPU)
    draw = model.draw(range(4), mask)
    return model, lambda wrapped: wrapped(clips, mask, draw).loss


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_training_learns_in_every_precision(shards: Path, tmp_path: Path, precision: str) -> None:
    result = train(shards, tmp_path / "run", f"train.precision={precision}", "train.steps=30", "train.base_lr=0.02")
    found = losses(tmp_path / "run")
    assert result.step == 30
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


def test_auto_is_what_this_card_computes_in(shards: Path, tmp_path: Path) -> None:
    train(shards, tmp_path / "run", "train.precision=auto", "train.steps=1")
    major = torch.cuda.get_device_capability()[0]
    expected = "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert identity["settings.train"]["precision"] == expected


def test_losses_are_those_of_the_cpu(shards: Path, tmp_path: Path) -> None:
    """Order, masks and targets do not depend on the device; noise does, which is drawn where the mask lives."""
    mae = ("model.objective=mae", "model.timestep=none", "train.precision=fp32")
    train(shards, tmp_path / "gpu", *mae)
    job = Job(recipe="smoke", overrides=(*SMALL, *mae), data=str(shards), out=tmp_path / "cpu", device="cpu")
    pretrain(job)
    torch.testing.assert_close(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=2e-3, atol=1e-4)


def test_a_compiled_step_has_the_same_loss_and_gradients() -> None:
    model, loss = model_and_loss()
    loss(model).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    value = loss(model).detach()
    model.zero_grad()
    compiled = torch.compile(model)
    other = loss(compiled)
    other.backward()
    torch.testing.assert_close(other.detach(), value, rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_group_of_one_gives_the_same_steps(sharding: str) -> None:
    def steps(spread: bool) -> list[float]:
        model, loss = model_and_loss()
        settings = with_overrides(Settings(), train={"sharding": sharding, "precision": "fp32"})
        wrapped = parallelize(model, settings.train, Distributed(device=GPU)) if spread else model
        optimizer = build_optimizer(model, settings.train)
        found = []
        for _ in range(3):
            value = loss(wrapped)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(value.item())
        return found

    alone = steps(False)
    port = free_port()
    torch.cuda.set_device(GPU)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        together = steps(True)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "heun"])
def test_samples_are_those_of_the_cpu(sampler: str) -> None:
    model = DiffMAE(ModelSettings.model_validate(MODEL), seed=0).eval()
    clips = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = make_mask("random", 0.75, (2, 4, 4), range(2))
    options: dict[str, Any] = {"seeds": [1, 2], "sampler": sampler, "steps": 4}
    expected = model.sample(clips, mask, **options)
    found = model.to(GPU).sample(clips.to(GPU), mask.to(GPU), **options).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    seen = ~mask.pixels(2, 8)[:, None].expand_as(clips)
    assert torch.equal(found[seen], clips[seen])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    train(shards, tmp_path / "straight", "model.drop_path=0.5")
    plain, calls = PretrainTask.loss, []

    def failing(self: PretrainTask, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("the machine went away")
        return plain(self, *arguments)

    monkeypatch.setattr(PretrainTask, "loss", failing)
    with pytest.raises(RuntimeError, match="went away"):
        train(shards, tmp_path / "broken", "model.drop_path=0.5")
    monkeypatch.setattr(PretrainTask, "loss", plain)
    assert train(shards, tmp_path / "broken", "model.drop_path=0.5").step == 10
    one, two = (_tensors(tmp_path / name) for name in ("straight", "broken"))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in (run / "checkpoints" / "step-00000010").glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def test_evaluation_scores_are_those_of_the_cpu(shards: Path, tmp_path: Path) -> None:
    from diffmae_video.data.manifest import Manifest

    manifest = Manifest.load(shards)
    settings = ModelSettings.model_validate(MODEL)
    model = Classifier(Encoder(settings), len(manifest.classes), head_init=1.0)
    save_model(model, tmp_path / "model", {"classes": manifest.classes, "dataset": manifest.dataset})
    reports = {}
    for device in ("cuda", "cpu"):
        job = Job(
            checkpoint=str(tmp_path / "model"),
            data=str(shards),
            out=tmp_path / device,
            device=device,
            overrides=("evaluate.precision=fp32", "evaluate.bootstrap=10", "data.workers=0"),
        )
        result = evaluate(job, manifest.dataset, views="2x1")
        assert result is not None
        reports[device] = result.report["views"]
    assert reports["cuda"] == reports["cpu"]


def test_onnx_gives_the_logits_of_the_gpu(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Classifier(Encoder(ModelSettings.model_validate(MODEL)), 5, head_init=1.0).eval()
    export_model(model, tmp_path / "onnx", "onnx")
    clips = torch.rand(3, 3, 4, 32, 32)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"clips": clips.numpy()})
    with torch.inference_mode():
        expected = model.to(GPU)(clips.to(GPU)).cpu()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


def _peak(settings: Settings, clips: int) -> int:
    """The most that the GPU held in the second of two optimizer steps, bytes."""
    model = DiffMAE(settings.model, settings.diffusion).to(GPU).train()
    wrapped = parallelize(model, settings.train, Distributed(device=GPU))
    optimizer = build_optimizer(model, settings.train)
    shape = (settings.model.frames, *settings.model.size)
    pixels = torch.rand(clips, 3, *shape, device=GPU)
    grid = (shape[0] // settings.model.tubelet, *(side // settings.model.patch for side in shape[1:]))
    mask = make_mask(settings.mask.kind, settings.mask.ratio, grid, range(clips)).to(GPU)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with autocast(GPU, settings.train.precision):
            value = wrapped(pixels, mask, model.draw(range(clips), mask)).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_is_within_half_again_of_the_prediction(precision: str) -> None:
    settings = with_overrides(
        Settings(),
        model={"preset": "tiny", "size": (112, 112)},
        train={"precision": precision, "ema": 0.0},
    )
    predicted = measure(settings, 8).memory()
    held = _peak(settings, 8)
    assert 0.5 * predicted < held < 1.5 * predicted, (held / 2**20, predicted / 2**20)


def test_checkpointing_saves_memory_and_selective_less_of_it() -> None:
    peaks = {}
    for mode in (False, "selective", True):
        settings = with_overrides(
            Settings(),
            model={"preset": "tiny", "size": (112, 112)},
            train={"precision": "bf16", "ema": 0.0, "grad_checkpointing": mode},
        )
        torch.cuda.empty_cache()
        peaks[mode] = _peak(settings, 16)
    assert peaks[True] < peaks["selective"] < peaks[False], peaks
