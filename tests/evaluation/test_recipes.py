"""The fine-tuning recipes hold the peers' figures (MAE FINETUNE.md; VideoMAE's scripts)."""

from __future__ import annotations

import pytest

from diffmae_video.config import load_settings, recipe_chain, recipe_names

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


@pytest.mark.parametrize(
    (
        "name",
        "epochs",
        "lr_per_256_clips",
        "clips",
        "repeats",
        "layer_decay",
        "drop_path",
        "dropout",
        "augment",
        "clip",
    ),
    [
        # MAE, FINETUNE.md
        ("mae-base", 100, 5e-4, 1024, 1, 0.65, 0.1, 0.0, "rand-m9-mstd0.5-inc1", 0.0),
        ("mae-large", 50, 1e-3, 1024, 1, 0.75, 0.2, 0.0, "rand-m9-mstd0.5-inc1", 0.0),
        ("mae-huge", 50, 1e-3, 1024, 1, 0.75, 0.3, 0.0, "rand-m9-mstd0.5-inc1", 0.0),
        # MAE-ST's command for ViT-L; SlowFast's configurations for the ratios between sizes
        ("mae-st-base", 75, 4.8e-3, 512, 2, 0.65, 0.1, 0.3, "rand-m7-mstd0.5-inc1", 5.0),
        ("mae-st-large", 50, 2.4e-3, 512, 2, 0.75, 0.2, 0.3, "rand-m7-mstd0.5-inc1", 5.0),
        ("mae-st-huge", 75, 2.4e-3, 512, 2, 0.80, 0.2, 0.5, "rand-m7-mstd0.5-inc1", 5.0),
        # VideoMAE's scripts: learning rates for 256 videos of two clips
        ("videomae-small", 150, 5e-4 / 2, 12 * 32 * 2, 2, 0.75, 0.1, 0.0, "rand-m7-n4-mstd0.5-inc1", 0.0),
        ("videomae-base", 75, 5e-4 / 2, 6 * 64 * 2, 2, 0.75, 0.1, 0.0, "rand-m7-n4-mstd0.5-inc1", 0.0),
        ("videomae-large", 35, 2e-3 / 2, 2 * 64 * 2, 2, 0.75, 0.1, 0.0, "rand-m7-n4-mstd0.5-inc1", 0.0),
        ("videomae-huge", 50, 1e-3 / 2, 8 * 64 * 2, 2, 0.75, 0.2, 0.5, "rand-m7-n4-mstd0.5-inc1", 0.0),
    ],
)
def test_peers_published_fine_tuning(
    name: str,
    epochs: float,
    lr_per_256_clips: float,
    clips: int,
    repeats: int,
    layer_decay: float,
    drop_path: float,
    dropout: float,
    augment: str,
    clip: float,
) -> None:
    """What a peer's recipe says of fine-tuning is the peer's, and none of its pre-training."""
    settings = load_settings(name, "finetune")
    train, data, tuning = settings.train, settings.data, settings.finetune
    assert (train.epochs, train.warmup_epochs, train.batch_size, data.repeats) == (epochs, 5, clips, repeats)
    assert train.base_lr == pytest.approx(lr_per_256_clips)
    assert (train.betas, train.weight_decay, train.min_lr, train.clip_grad) == ((0.9, 0.999), 0.05, 1e-6, clip)
    assert (train.layer_decay, tuning.drop_path, tuning.dropout) == (layer_decay, drop_path, dropout)
    assert (tuning.mixup, tuning.cutmix, tuning.smoothing, tuning.head_init) == (0.8, 1.0, 0.1, 2e-5)
    assert (data.crop, data.crop_area, data.flip) == ("random_resized", (0.08, 1.0), 0.5)
    assert (data.rand_augment, data.erasing) == (augment, 0.25)


@pytest.mark.parametrize(
    ("name", "views", "protocol", "seconds", "segments"),
    [
        ("mae-st-large", "7x3", "slowfast", 64 / 30, False),
        ("videomae-base", "5x3", "videomae", None, False),
        ("finetune-k400-base", "7x3", "videomae", None, False),
        ("finetune-ssv2-base", "2x3", "segments", None, True),
        ("finetune-ucf101-base", "5x3", "videomae", None, False),
    ],
)
def test_clips_are_tested_as_they_are_trained(
    name: str, views: str, protocol: str, seconds: float | None, segments: bool
) -> None:
    tested = load_settings(name, "evaluate").evaluate
    assert (tested.views, tested.protocol) == (views, protocol)
    data = load_settings(name, "finetune").data
    assert data.seconds(16) == (None if seconds is None else pytest.approx(seconds))
    assert data.segments == segments


@pytest.mark.parametrize("name", recipe_names())
def test_a_child_changes_no_stage_unasked(name: str) -> None:
    """Whatever a parent says of a stage, a child keeps, unless it speaks of that stage itself."""
    chain = recipe_chain(name)
    for stage in ("pretrain", "finetune", "evaluate", "render"):
        said: dict[tuple[str, str], object] = {}
        for recipe in reversed(chain):
            for section, table in recipe.stages.get(stage, {}).items():
                said |= {(section, key): value for key, value in table.items()}
        settings = load_settings(name, stage).model_dump(mode="json")
        assert {place: settings[place[0]][place[1]] for place in said} == said
