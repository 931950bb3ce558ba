"""Model cards: they say what was recorded with the weights, and their code runs."""

from __future__ import annotations

import os
import re
import stat

import diffmae_video.compat  # noqa: F401

import numpy as np
import pytest
import torch
import transformers

from diffmae_video.config import ModelSettings
from diffmae_video.models.card import model_card
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.exporters import export_model
from diffmae_video.models.patches import normalize_pixels

SMALL = {"preset": "nano", "width": 48, "depth": 1, "heads": 4, "size": (32, 32), "patch": 8, "pixel_norm": "kinetics"}
SMALL |= {"decoder_width": 32, "decoder_heads": 4, "decoder_depth": 1}
VIDEO = SMALL | {"frames": 8, "positions": "flat"}
IMAGE = SMALL | {"frames": 1, "tubelet": 1, "class_token": True}
MAE = {"objective": "mae", "decoder": "joint", "target": "norm_pixel", "timestep": "none"}

SCORES = {"top1": 0.5, "top5": 0.75, "top5_rank": 3, "top1_interval": [0.4, 0.625]}
INFO = {
    "dataset": "k400",
    "classes": ["run", "jump", "swim"],
    "recipe": "/home/me/recipes/mine.toml",
    "init": "/home/me/runs/pretrain-003",
    "step": 200,
    "metrics": {"epoch": 20.0, "samples": 3200, "loss": 0.123456, "val_top1": 0.45, "peak_memory": 0.6, "lr": 1e-8},
    "evaluations": [{"task": "k400", "split": "val", "videos": {"used": 95}, "views": {"7x3": SCORES}}],
}


def classifier(**changes) -> Classifier:
    """An untrained classifier of three classes with everything on record."""
    model = Classifier(Encoder(ModelSettings(**VIDEO | changes)), 3)
    model.info = dict(INFO)
    return model


def test_what_a_card_says():
    card = model_card(classifier(), "safetensors", "cc-by-4.0")
    front, body = card.split("---\n", 2)[1:]
    assert front.splitlines()[:3] == [
        "library_name: diffmae-video",
        "license: cc-by-4.0",
        "pipeline_tag: video-classification",
    ]
    for line in (
        "# Classifier, recipe mine",
        "| Data | k400 |",
        "| Recipe | mine |",
        "| Trained | 200 steps, 20 epochs, 3200 samples |",
        "| Started from | pretrain-003 |",
        "| Licence | cc-by-4.0 |",
        "Classes (3): run, jump, swim.",
        "- training loss: 0.1235",
        "- validation top-1, one view: 0.45",
        "- k400, split val, 95 videos, views 7x3: top-1 50.0% (95% interval 40.0% to 62.5%), top-3 75.0%",
    ):
        assert line in body.splitlines()
    assert "8 x 32 x 32 pixels RGB, patches 2 x 8 x 8, (x / 255 - [0.45, 0.45, 0.45]) / [0.225, 0.225, 0.225]" in body
    assert "peak_memory" not in body  # of the machine, not of the model
    assert "/home/me" not in body


def test_what_was_not_recorded_is_named():
    model = Classifier(Encoder(ModelSettings(**VIDEO)), 3)
    model.info = {"imported_from": "videomae", "file": "x.pth", "problems": ["missing head.bias (3,)"]}
    card = model_card(model, "hf", "unknown")
    for line in (
        "| Data | not recorded |",
        "| Recipe | not recorded |",
        "| Imported from | videomae, x.pth |",
        "| Not imported | missing head.bias (3,) |",
        "Classes (3): names not recorded.",
        "Nothing was recorded with the weights.",
    ):
        assert line in card.splitlines()


@pytest.mark.parametrize(
    ("form", "model"),
    [
        ("safetensors", lambda: classifier()),
        ("safetensors", lambda: DiffMAE(ModelSettings(**VIDEO))),
        ("timm", lambda: classifier(**IMAGE)),
        ("hf", lambda: classifier(encoder_norm_eps=1e-5)),
        ("hf", lambda: DiffMAE(ModelSettings(**VIDEO | MAE))),
        ("hf", lambda: DiffMAE(ModelSettings(**IMAGE | MAE))),
        ("onnx", lambda: classifier()),
    ],
)
def test_the_code_of_a_card_runs_and_loads_these_weights(form, model, tmp_path):
    model = model().eval()
    files = export_model(model, tmp_path / "out", form)
    umask = os.umask(0)
    os.umask(umask)
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask for file in files)  # as other files are
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    clips = torch.randn(2, 3, model.settings.frames, 32, 32)
    names = {"clips": clips.numpy() if form == "onnx" else clips}
    exec(code.replace("FOLDER", str(tmp_path / "out")), names)
    if form == "onnx":
        np.testing.assert_allclose(names["out"], model(clips).detach().numpy(), atol=2e-5, rtol=1e-4)
        return
    loaded = names["model"].eval()
    with torch.no_grad():
        if isinstance(model, DiffMAE):
            own, theirs = model.encoder.blocks[0].mlp.fc1.weight, dict(loaded.named_parameters())
            assert any(torch.equal(own, tensor) for tensor in theirs.values() if tensor.shape == own.shape)
        else:
            shaped = {"timm": clips[:, :, 0], "hf": clips.transpose(1, 2)}.get(form, clips)
            logits = loaded(shaped).logits if form == "hf" else loaded(shaped)
            torch.testing.assert_close(logits, model(clips), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_transformers_prepares_frames_as_we_do(kind, tmp_path):
    model = classifier() if kind == "video" else DiffMAE(ModelSettings(**IMAGE | MAE))
    export_model(model, tmp_path / "out", "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    frames = np.random.default_rng(0).integers(0, 256, (model.settings.frames, 32, 32, 3), dtype=np.uint8)
    pixels = processor(list(frames), return_tensors="pt")["pixel_values"]  # (1, T, 3, H, W), or (1, 3, H, W)
    ours = normalize_pixels(torch.from_numpy(frames).permute(0, 3, 1, 2)[None], "kinetics").transpose(1, 2)
    torch.testing.assert_close(pixels.view(ours.shape), ours, atol=1e-5, rtol=1e-5)
