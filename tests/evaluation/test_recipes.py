"""The fine-tuning recipes hold the peers' figures (MAE FINETUNE.md; VideoMAE's scripts)."""

from __future__ import annotations

import pytest

from diffmae_video.config import load_settings, recipe_names

NAMES = [name for name in recipe_names() if name.startswith("finetune-")]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_resolves_for_its_stages(name: str) -> None:
    task, size = name.split("-")[1:]
    settings = load_settings(name, "finetune")
    assert settings.model.preset == size
    assert settings.finetune.protocol == "finetune"
    assert settings.train.batch_size % settings.data.repeats == 0
    views = load_settings(name, "evaluate").evaluate.views
    assert views == {"k400": "7x3", "ssv2": "2x3", "ucf101": "5x3", "hmdb51": "10x3", "imagenet": "1x1"}[task]


@pytest.mark.parametrize(
    ("name", "epochs", "lr_per_256_videos", "clips", "layer_decay", "drop_path", "dropout"),
    [
        ("finetune-k400-small", 150, 5e-4, 12 * 32 * 2, 0.75, 0.1, 0.0),
        ("finetune-k400-base", 75, 5e-4, 6 * 64 * 2, 0.75, 0.1, 0.0),
        ("finetune-k400-large", 35, 2e-3, 2 * 64 * 2, 0.75, 0.1, 0.0),
        ("finetune-k400-huge", 50, 1e-3, 8 * 64 * 2, 0.75, 0.2, 0.5),
        ("finetune-ssv2-base", 30, 5e-4, 6 * 64 * 2, 0.75, 0.1, 0.0),
        ("finetune-ucf101-base", 100, 5e-4, 16 * 8 * 2, 0.7, 0.2, 0.5),
        ("finetune-imagenet-base", 100, 5e-4, 1024, 0.65, 0.1, 0.0),
        ("finetune-imagenet-large", 50, 1e-3, 1024, 0.75, 0.2, 0.0),
        ("finetune-imagenet-huge", 50, 1e-3, 1024, 0.75, 0.3, 0.0),
    ],
)
def test_published_figures(
    name: str, epochs: float, lr_per_256_videos: float, clips: int, layer_decay: float, drop_path: float, dropout: float
) -> None:
    settings = load_settings(name, "finetune")
    assert settings.train.epochs == epochs
    assert settings.train.batch_size == clips
    peak = lr_per_256_videos * (clips / settings.data.repeats) / 256
    assert settings.train.base_lr * settings.train.batch_size / 256 == pytest.approx(peak)
    assert settings.train.layer_decay == layer_decay
    assert (settings.finetune.drop_path, settings.finetune.dropout) == (drop_path, dropout)
    assert (settings.finetune.mixup, settings.finetune.cutmix, settings.finetune.smoothing) == (0.8, 1.0, 0.1)
