"""`diffmae export` puts on the card what was measured of these very weights in this workspace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from diffmae_video.cli.app import run
from diffmae_video.cli.weights import Format, Source
from diffmae_video.config import ModelSettings
from diffmae_video.files import sha256_of
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.dialects import SOURCES
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.exporters import FORMATS
from diffmae_video.models.weights import load_model, save_model
from diffmae_video.pipelines.workspace import Workspace

SMALL = {"preset": "nano", "width": 16, "depth": 1, "heads": 2, "frames": 4, "size": (16, 16), "patch": 8}


def test_export_knows_the_evaluations_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace.here()
    for name, seed in (("old", 1), ("new", 0)):
        save_model(Classifier(Encoder(ModelSettings(**SMALL), seed), 2, seed=seed), name, {"dataset": "squares"})
        workspace.record("finetune", name, task="squares")
        scores = {"top1": 0.25 + seed / 2, "top5": 1.0, "top5_rank": 2, "top1_interval": None}
        report = {"task": "squares", "split": "val", "videos": {"used": 8}, "views": {"5x3": scores}}
        report["weights_sha256"] = sha256_of(Path(name, "weights.safetensors"))
        folder = tmp_path / f"eval-{name}"
        folder.mkdir()
        (folder / "eval.json").write_text(json.dumps(report))
        workspace.record("eval", folder, task="squares")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/eval.json").write_text("{")
    workspace.record("eval", tmp_path / "damaged")
    assert run(["export", "--licence", "cc0-1.0"]) == 0
    assert "the newest finetune run" in capsys.readouterr().out
    card = Path("export-safetensors/README.md").read_text()
    assert "- squares, split val, 8 videos, views 5x3: top-1 25.0%, top-2 100.0%" in card
    assert card.count("views 5x3") == 1  # the other's 75 % are of other weights
    assert "license: cc0-1.0" in card
    assert load_model("export-safetensors").info["evaluations"][0]["views"]["5x3"]["top1"] == 0.25


def test_the_command_line_offers_what_the_library_knows() -> None:
    assert tuple(source.value for source in Source) == SOURCES
    assert tuple(form.value for form in Format) == FORMATS


def test_nothing_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["export"]) == 2
    assert "diffmae pretrain" in capsys.readouterr().err


def test_import_lists_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm

    monkeypatch.chdir(tmp_path)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 4, "num_classes": 2}
    tensors = timm.create_model("vit_tiny_patch16_224", **sizes).state_dict()
    del tensors["head.bias"]
    save_file(tensors | {"extra": tensors["norm.bias"].clone()}, "vit.safetensors")
    words = ["import", "timm", "vit.safetensors", "--heads", "4"]
    assert run(words) == 3
    error = capsys.readouterr().err
    for part in ("missing head.bias (2,)", "unexpected extra (48,)", "--allow-partial"):
        assert part in error
    assert error.count("\n") == 1
    assert not Path("vit-imported").exists()
    assert run([*words, "--allow-partial"]) == 0
    assert "  missing head.bias (2,)\n" in capsys.readouterr().out
    model = load_model("vit-imported")
    assert len(model.info["problems"]) == 2
    assert model.encoder.heads == 4
    assert run(["export", "--checkpoint", "vit-imported", "--format", "timm"]) == 0
    assert (
        "| Not imported | missing head.bias (2,); unexpected extra (48,) |" in Path("export-timm/README.md").read_text()
    )
