"""`diffmae finetune`: from scratch, from a pre-training, probes, and everything it must refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffmae_video.config import ModelSettings, Settings, settings_toml, with_overrides
from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.predictions import read_predictions
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.weights import load_model, save_model
from diffmae_video.pipelines.evaluate import evaluate
from diffmae_video.pipelines.finetune import finetune
from diffmae_video.pipelines.finetune_plan import measure_classifier, plan_finetune
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training.finetuning import build_classifier

RECIPE = """
[model]
preset = "nano"
width = 32
depth = 2
heads = 2
frames = 4
size = [32, 32]
decoder_width = 32
decoder_depth = 1
decoder_heads = 2
[data]
stride = 2
workers = 0
crop = "center"
flip = 0.0
[train]
batch_size = 6
steps = 4
base_lr = 0.05
precision = "fp32"
checkpoint_every = 2
log_every = 1
picture_every = 0
[finetune]
mixup = 0.0
cutmix = 0.0
drop_path = 0.0
[stage.evaluate.evaluate]
views = "2x1"
bootstrap = 20
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shards: Callable) -> Path:
    """A workspace with sharded squares and a recipe."""
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "shards", {"train": 12, "val": 6})
    Workspace.here().record("shards", tmp_path / "shards", dataset="squares")
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return tmp_path


def pretrained(folder: Path, **model) -> Path:
    """A pre-training run with random weights, on record."""
    fields = {"width": 32, "depth": 2, "heads": 2, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    settings = Settings(model=ModelSettings(**{**fields, "preset": "nano", "frames": 4, "size": (32, 32), **model}))
    save_model(DiffMAE(settings.model, seed=5), folder, {"recipe": "smoke"})
    (folder / "config.toml").write_text(settings_toml(settings))
    Workspace.here().record("pretrain", folder, dataset="squares")
    return folder


def test_chain_from_scratch_to_eval(here: Path) -> None:
    result = finetune(Job(recipe="tiny.toml", device="cpu"), "squares", init="scratch")
    assert (result.step, result.init) == (4, "scratch")
    assert result.directory == here / "runs" / "finetune-001"
    assert {"val_top1", "val_top5"} <= set(result.metrics)
    model = load_model(result.directory)
    assert isinstance(model, Classifier)
    assert model.info["classes"] == ["right", "left", "down"]
    report = evaluate(Job(device="cpu"), "squares").report
    assert list(report["views"]) == ["2x1"]  # the recipe's [stage.evaluate]
    assert report["checkpoint"] == str(result.directory)


def test_another_model_than_the_pre_training_s_is_told_from_scratch(here: Path, capsys) -> None:
    pretrained(here / "runs" / "pretrain-001")
    job = Job(recipe="tiny.toml", device="cpu", dry_run=True)
    finetune(job, "squares", init="scratch")
    assert "Note: the newest" not in capsys.readouterr().out
    finetune(job.with_(overrides=("model.size=[48, 48]",)), "squares", init="scratch")
    assert "has model.size=[32, 32]; for a comparison with it, give the same" in capsys.readouterr().out


def test_pretrained_encoder_is_taken_over(here: Path) -> None:
    run = pretrained(here / "runs" / "pretrain-001")
    settings = with_overrides(Settings(model=load_model(run).settings), finetune={"drop_path": 0.0})
    model, _, line = build_classifier(str(run), settings, ["a", "b"])
    assert "new" in line
    source = load_model(run).encoder
    for name, tensor in model.encoder.blocks.state_dict().items():
        assert torch.equal(tensor, source.blocks.state_dict()[name])
    assert torch.equal(model.encoder.norm.weight, source.norm.weight)
    result = finetune(Job(recipe="tiny.toml", device="cpu", overrides=["train.steps=1"]), "squares")
    assert result.init == str(run)


def test_a_model_with_other_frames_and_size(here: Path) -> None:
    run = pretrained(here / "runs" / "pretrain-001", frames=8, size=(64, 64))
    changes = ["model.frames=4", "model.size=[32, 32]", "data.stride=3", "train.steps=1"]
    result = finetune(Job(recipe="tiny.toml", device="cpu", overrides=changes), "squares", init=str(run))
    info = load_model(result.directory).info
    assert (info["frames"], info["size"], info["stride"]) == (4, [32, 32], 3)
    report = evaluate(Job(device="cpu"), "squares", views="1x1").report
    assert (report["frames"], report["size"], report["stride"]) == (4, [32, 32], 3)
    plain = finetune(Job(recipe="tiny.toml", device="cpu", overrides=["train.steps=1"]), "squares", init=str(run))
    assert load_model(plain.directory).info["frames"] == 8  # a recipe's [model] is about pre-training


def test_a_model_of_16_frames_evaluates_other_lengths_and_sizes(here: Path, make_shards: Callable) -> None:
    make_shards(here / "few", {"train": 3, "val": 2}, frames=40)
    overrides = ["model.width=128", "model.depth=4", "model.heads=4", "model.frames=16", "model.size=[128, 128]"]
    overrides += ["data.stride=1", "train.steps=1", "train.batch_size=3"]
    run = finetune(Job(recipe="tiny.toml", data="few", device="cpu", overrides=overrides), "squares", init="scratch")
    seen = {}
    for frames, size in [(16, 128), (8, 128), (32, 128), (16, 256)]:
        changes = [f"model.frames={frames}", f"model.size=[{size}, {size}]", "data.stride=1"]
        result = evaluate(
            Job(checkpoint=run.directory, data="few", overrides=changes, device="cpu"), "squares", views="1x1"
        )
        assert (result.report["frames"], result.report["size"], result.used) == (frames, [size, size], 2)
        seen[frames, size] = read_predictions(result.directory).probabilities["1x1"]
        assert seen[frames, size].isfinite().all()
    assert all(not torch.equal(seen[16, 128], other) for place, other in seen.items() if place != (16, 128))


def test_training_improves_the_loss_and_repeats(here: Path) -> None:
    overrides = ["train.steps=80", "train.checkpoint_every=100"]
    losses = []
    for _ in range(2):
        result = finetune(Job(recipe="tiny.toml", device="cpu", overrides=overrides), "squares", init="scratch")
        lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line.get("loss") is not None])
    assert losses[0] == losses[1]
    assert sum(losses[0][-10:]) < 0.9 * sum(losses[0][:10])


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_labels_per_class(here: Path, capsys: pytest.CaptureFixture[str], protocol: str) -> None:
    overrides = ["data.labels_per_class=2", "train.batch_size=2", "train.steps=1"]
    finetune(Job(recipe="tiny.toml", device="cpu", overrides=overrides), "squares", init="scratch", protocol=protocol)
    said = " ".join(capsys.readouterr().out.split())
    labels = 2 * len(json.loads((here / "shards" / "manifest.json").read_text())["classes"])
    assert (f"{labels} training and" if protocol == "linear" else f"{labels} of their labels") in said


def test_label_fraction_and_frozen_blocks(here: Path) -> None:
    overrides = ["data.label_fraction=0.25", "train.batch_size=3", "finetune.freeze=1", "train.steps=2"]
    result = finetune(Job(recipe="tiny.toml", device="cpu", overrides=overrides), "squares", init="scratch")
    trained, fresh = load_model(result.directory), Encoder(load_model(result.directory).settings, seed=0)
    assert torch.equal(trained.encoder.patch_embed.proj.weight, fresh.patch_embed.proj.weight)
    assert torch.equal(trained.encoder.blocks[0].mlp.fc1.weight, fresh.blocks[0].mlp.fc1.weight)
    assert not torch.equal(trained.encoder.blocks[1].mlp.fc1.weight, fresh.blocks[1].mlp.fc1.weight)
    with pytest.raises(UsageError, match="has 2 blocks"):
        finetune(Job(recipe="tiny.toml", device="cpu", overrides=["finetune.freeze=3"]), "squares", init="scratch")


@pytest.mark.parametrize("protocol", ["linear", "attentive"])
def test_probe_leaves_a_classifier_that_eval_agrees_with(here: Path, protocol: str) -> None:
    run = pretrained(here / "runs" / "pretrain-001")
    exact = ("evaluate.precision=fp32",)
    result = finetune(Job(recipe="tiny.toml", device="cpu", overrides=exact), "squares", protocol=protocol)
    probed = json.loads((result.directory / "probe.json").read_text())
    assert probed["top1"] == result.metrics["val_top1"]
    model, source = load_model(result.directory), load_model(run).encoder
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    tested = evaluate(Job(device="cpu", overrides=exact), "squares", views="1x1")
    expected = read_predictions(result.directory).probabilities["1x1"]
    tolerance = 1e-4 if protocol == "linear" else 2e-2  # tokens are cached in half precision
    assert torch.allclose(read_predictions(tested.directory).probabilities["1x1"], expected, atol=tolerance)


def test_knn_and_reused_features(here: Path) -> None:
    pretrained(here / "runs" / "pretrain-001")
    first = finetune(Job(recipe="tiny.toml", device="cpu", overrides=["finetune.knn=3"]), "squares", protocol="knn")
    cached = sorted((here / ".diffmae" / "features").rglob("*.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in cached]
    assert len(cached) == 2
    finetune(Job(recipe="tiny.toml", device="cpu"), "squares", protocol="linear")
    assert [path.stat().st_mtime_ns for path in cached] == stamps
    assert read_predictions(first.directory).probabilities["1x1"].sum(1).allclose(torch.ones(6))
    assert Workspace.here().latest("finetune").path.endswith("finetune-002")  # kNN leaves no classifier


def test_classes_of_a_classifier_keep_its_head(here: Path) -> None:
    first = finetune(Job(recipe="tiny.toml", device="cpu"), "squares", init="scratch")
    settings = with_overrides(Settings(model=load_model(first.directory).settings), finetune={"drop_path": 0.0})
    same, _, line = build_classifier(str(first.directory), settings, ["right", "left", "down"])
    assert "kept" in line
    clips = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(same.eval()(clips), load_model(first.directory).eval()(clips))
    other, _, line = build_classifier(str(first.directory), settings, ["right", "down", "left"])
    assert "new" in line
    assert not torch.equal(other.head.weight, same.head.weight)


def test_refusals(here: Path) -> None:
    with pytest.raises(UsageError, match="No pre-training is known"):
        finetune(Job(recipe="tiny.toml", device="cpu"), "squares")
    with pytest.raises(UsageError, match="no such run"):
        finetune(Job(recipe="tiny.toml", device="cpu"), "squares", init="nowhere")
    with pytest.raises(UsageError, match="did you mean squares"):
        finetune(Job(recipe="tiny.toml", device="cpu"), "square", init="scratch")
    (here / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no model\.json"):
        finetune(Job(recipe="tiny.toml", device="cpu"), "squares", init="empty")
    with pytest.raises(DataError, match="no split"):
        finetune(Job(recipe="tiny.toml", device="cpu", overrides=["data.split=test"]), "squares", init="scratch")
    run = pretrained(here / "runs" / "pretrain-001")
    with pytest.raises(UsageError, match="have 16"):
        finetune(Job(recipe="tiny.toml", device="cpu", overrides=["model.patch=8"]), "squares", init=str(run))
    with pytest.raises(UsageError, match="no class token"):
        finetune(Job(recipe="tiny.toml", device="cpu", overrides=["finetune.pool=class"]), "squares", init=str(run))
    assert not (here / "runs" / "finetune-001").exists()


@pytest.mark.parametrize(
    ("recipe", "stage", "wanted"),
    [
        ("my recipes/own.toml", "[stage.finetune.train]\nsteps = 7\n", "my recipes/own.toml"),
        ("tiny.toml", "", "video-tiny"),  # it says nothing of fine-tuning: chosen by device, as without a recipe
        ("gone.toml", None, "video-tiny"),
    ],
)
def test_auto_takes_the_recipe_of_the_pretraining(
    here: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, stage: str | None, wanted: str
) -> None:
    run = pretrained(here / "pre")
    description = json.loads((run / "model.json").read_text())
    description["info"]["recipe"] = recipe
    (run / "model.json").write_text(json.dumps(description))
    if stage is not None:
        (here / recipe).parent.mkdir(exist_ok=True)
        (here / recipe).write_text(RECIPE + stage)
    asked = Job(device="cpu", overrides=["train.batch_size=4"])  # there are 12 clips
    plan = plan_finetune(asked, "squares")
    assert plan.recipe == wanted
    assert (plan.settings.train.steps == 7) == (wanted == recipe)
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(here))  # from another folder the path is the workspace's
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    again = plan_finetune(asked, "squares")
    assert again.settings == plan.settings


def test_dry_run_tells_the_cost_and_makes_nothing(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert finetune(Job(recipe="tiny.toml", device="cpu", dry_run=True), "squares", init="scratch") is None
    output = capsys.readouterr().out
    assert all(name in output for name in ("FLOPs a clip", "memory a process", "device hours", "4 steps of 6 clips"))
    assert not (here / "runs").exists()


@pytest.mark.parametrize(("freeze", "protocol"), [(0, "finetune"), (2, "finetune"), (0, "linear")])
def test_predicted_cost_against_a_count_by_hand(here: Path, make_shards: Callable, freeze: int, protocol: str) -> None:
    """Matrix products of a ViT: 24 N D^2 + 4 N^2 D a block; the backward pass of what is trained costs twice that."""
    settings = with_overrides(
        Settings(model=ModelSettings(preset="tiny", frames=16, size=(64, 64))),
        finetune={"freeze": freeze, "protocol": protocol},
        train={"precision": "fp32"},
    )
    cost = measure_classifier(settings, make_shards(here / "shards", {"train": 3}), clips=4)
    tokens, width, depth, patch = 8 * 4 * 4, 192, 12, 2 * 16 * 16 * 3
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    assert cost.forward_flops == pytest.approx(depth * block + 2 * tokens * patch * width, rel=0.01)
    trained = 0 if protocol == "linear" else depth - freeze
    assert cost.train_flops - cost.forward_flops == pytest.approx(
        2 * trained * block, rel=0.06 if trained else 0, abs=1e6
    )
    real = Classifier(Encoder(settings.model), 3)
    assert cost.parameters == sum(parameter.numel() for parameter in real.parameters())
