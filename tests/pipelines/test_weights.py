"""`diffmae export` puts on the card what was measured of these very weights in this workspace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffmae_video.cli.app import run
from diffmae_video.config import ModelSettings
from diffmae_video.data.shards import sha256_of
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.encoder import Encoder
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


def test_nothing_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["export"]) == 2
    assert "diffmae pretrain" in capsys.readouterr().err
