"""Settings: closed to unknown keys, readable errors, recipes that layer as documented."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmae_video.config import (
    Settings,
    load_settings,
    read_settings,
    recipe_names,
    setting_keys,
    settings_toml,
    with_overrides,
)
from diffmae_video.config.fit_text import FitLength, read_fit_length
from diffmae_video.data.datasets import dataset_info
from diffmae_video.errors import UsageError
from diffmae_video.masking import make_mask
from diffmae_video.models.patches import grid_shape


def write_recipe(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return str(path)


def test_recipe_layers_in_the_documented_order(tmp_path: Path) -> None:
    base = write_recipe(
        tmp_path, "base", "[train]\nbase_lr = 1.0\nbatch_size = 2\nepochs = 3\n[stage.finetune.train]\nepochs = 4\n"
    )
    child = write_recipe(
        tmp_path, "child", f'extends = "{base}"\n[train]\nbatch_size = 8\n[stage.finetune.train]\nbase_lr = 2.0\n'
    )
    pretrain = load_settings(child, "pretrain", ["train.ema=0.5"]).train
    finetune = load_settings(child, "finetune", ["train.base_lr = 3.0"]).train
    assert (pretrain.base_lr, pretrain.batch_size, pretrain.epochs, pretrain.ema) == (1.0, 8, 3, 0.5)
    assert (finetune.base_lr, finetune.batch_size, finetune.epochs, finetune.ema) == (3.0, 8, 4, 0.0)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.bas_lr=1", ["train.bas_lr", "train.base_lr"]),
        ("base_lr=1", ["base_lr", "train.base_lr"]),
        ("train.base_lr=-1", ["train.base_lr", "greater than 0"]),
        ("model.size=[30, 32]", ["model", "multiples of patch"]),
        ("model.loss_tokens=0.5", ["loss_tokens", "cross"]),
        ("train.precision=fp8", ["train.precision", "bf16"]),
        ("nonsense", ["nonsense", "section.field=value"]),
    ],
)
def test_a_wrong_override_names_the_key_and_the_remedy(override: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(None, "pretrain", [override])
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("diffusion.timesteps=1000000000", "less than or equal to 100000"),
        ("model.depth=1000000", "less than or equal to 1000"),
        ("model.width=1000000", "less than or equal to"),
        ("model.patch=1", "tokens"),
        ("train.base_lr=inf", "finite"),
        ("train.base_lr=nan", "finite"),
        ("render.steps=100000000", "less than or equal to"),
        ("evaluate.batch_views=1000000000", "less than or equal to"),
    ],
)
def test_numbers_without_bound_are_refused_in_one_sentence(override: str, said: str) -> None:
    changes = [override] if override != "model.patch=1" else ["model.size=[4096, 4096]", override]
    with pytest.raises(UsageError) as caught:
        load_settings(None, "pretrain", changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_published_sizes_stay_within_the_bounds() -> None:
    giant = {"width": 1408, "depth": 40, "heads": 16, "patch": 14}  # ViT-g
    with_overrides(Settings(), model={**giant, "mlp_ratio": 48 / 11})
    with_overrides(Settings(), model={"width": 6144, "depth": 48, "heads": 48, "frames": 1})  # ViT-22B
    with_overrides(Settings(), model={"frames": 64, "size": (1024, 1024)})


def test_words_and_lists_can_be_set(tmp_path: Path) -> None:
    settings = load_settings(None, "pretrain", ["mask.kind=tube", "model.size=[64, 32]", "data.path=a/b"])
    assert (settings.mask.kind, settings.model.size, settings.data.path) == ("tube", (64, 32), "a/b")


def test_resolved_settings_survive_the_file(tmp_path: Path) -> None:
    settings = with_overrides(Settings(), seed=3, train={"steps": 5}, data={"sources": ({"path": "x", "weight": 2},)})
    path = tmp_path / "config.toml"
    path.write_text(settings_toml(settings))
    assert read_settings(path) == settings


def test_every_builtin_recipe_resolves_in_every_stage() -> None:
    assert {"smoke", "demo"} <= set(recipe_names())
    for name in recipe_names():
        for stage in ("pretrain", "finetune", "evaluate", "render"):
            assert isinstance(load_settings(name, stage), Settings)


def test_unknown_recipes_are_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean smoke\?"):
        load_settings("smok", "pretrain")
    with pytest.raises(UsageError, match="no such file"):
        load_settings(str(tmp_path / "gone.toml"), "pretrain")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_settings(write_recipe(tmp_path, "broken", "[train\n"), "pretrain")
    (tmp_path / "latin.toml").write_bytes('summary = "für"\n'.encode("latin-1"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_settings(str(tmp_path / "latin.toml"), "pretrain")
    with pytest.raises(UsageError, match="cannot be read"):
        read_settings(tmp_path / "latin.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        dataset_info(str(tmp_path / "latin.toml"))
    with pytest.raises(UsageError, match=r"\[stage\.training\]"):
        load_settings(write_recipe(tmp_path, "stage", "[stage.training.train]\nepochs = 1\n"), "pretrain")
    circle = tmp_path / "circle.toml"
    circle.write_text(f'extends = "{circle}"\n')
    with pytest.raises(UsageError, match="circle"):
        load_settings(str(circle), "pretrain")


def test_every_setting_is_documented() -> None:
    def undocumented(section: type, prefix: str = "") -> list[str]:
        missing = []
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                missing += undocumented(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                missing.append(prefix + name)
        return missing

    assert undocumented(Settings) == []
    assert "train.base_lr" in setting_keys()


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "videos", "repeats", "lr_per_256_videos", "mask", "decoder", "size"),
    [  # videos: a batch as the authors count it, GPUs x batch of each; decoder: blocks, width, heads; size: kept tokens
        ("mae-base", 800, 40, 64 * 64, 1, 1.5e-4, ("random", 0.75), (8, 512, 16), 49),
        ("mae-large", 800, 40, 64 * 64, 1, 1.5e-4, ("random", 0.75), (8, 512, 16), 49),
        ("mae-huge", 800, 40, 64 * 64, 1, 1.5e-4, ("random", 0.75), (8, 512, 16), 64),
        ("mae-st-base", 100, 5, 512, 4, 1.6e-3, ("random", 0.9), (4, 512, 16), 156),
        ("mae-st-large", 100, 5, 512, 4, 1.6e-3, ("random", 0.9), (4, 512, 16), 156),
        ("mae-st-huge", 100, 5, 512, 4, 1.6e-3, ("random", 0.9), (4, 512, 16), 156),
        ("videomae-small", 1600, 40, 32 * 64, 1, 1.5e-4, ("tube", 0.9), (4, 192, 3), 160),
        ("videomae-base", 1600, 40, 32 * 64, 1, 1.5e-4, ("tube", 0.9), (4, 384, 6), 160),
        ("videomae-large", 1600, 40, 8 * 64, 1, 1.5e-4, ("tube", 0.9), (12, 512, 8), 160),
        ("videomae-huge", 1600, 40, 16 * 64, 1, 1.5e-4, ("tube", 0.9), (12, 640, 8), 160),
    ],
)
def test_peers_published_pretraining(
    name: str,
    epochs: int,
    warmup: int,
    videos: int,
    repeats: int,
    lr_per_256_videos: float,
    mask: tuple[str, float],
    decoder: tuple[int, int, int],
    size: int,
) -> None:
    """MAE's PRETRAIN.md, MAE-ST's PRETRAIN.md, VideoMAE's scripts. Here a batch counts every clip."""
    settings = load_settings(name, "pretrain")
    model, train, data = settings.model, settings.train, settings.data
    assert (train.epochs, train.warmup_epochs, data.repeats) == (epochs, warmup, repeats)
    assert train.batch_size == videos * repeats
    assert train.base_lr * train.batch_size / 256 == pytest.approx(lr_per_256_videos * videos / 256)
    assert (train.betas, train.weight_decay) == ((0.9, 0.95), 0.05)
    assert (model.decoder_depth, model.decoder_width, model.decoder_heads) == decoder
    assert (model.objective, model.decoder) == ("mae", "joint")
    assert model.target == ("norm_pixel_channel" if name.startswith("videomae") else "norm_pixel")
    assert (settings.mask.kind, settings.mask.ratio) == mask
    grid = grid_shape(model.frames, *model.size, model.tubelet, model.patch)
    assert make_mask(*mask, grid, [0]).visible.shape[1] == size
    assert train.clip_grad == (0.02 if "-st-" in name else 0.0)
    assert data.flip == (0.0 if name.startswith("videomae") else 0.5)
    assert model.positions == ("flat" if name.startswith("videomae") else "learned" if "-st-" in name else "sincos")
    if name.startswith("videomae"):
        assert train.min_lr == pytest.approx(1e-5 * videos / 256)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        *(("auto", None), ("off", None), ("90s", FitLength(90.0)), ("10m", FitLength(600.0))),
        *(("1.5h", FitLength(5400.0)), ("1step", FitLength(steps=1)), ("40steps", FitLength(steps=40))),
    ],
)
def test_length_of_a_fit(text: str, length: FitLength | None) -> None:
    assert read_fit_length(text) == length


@pytest.mark.parametrize("text", ["", "10", "0steps", "0.5s", "8d", "200h", "-3m", "3 m", "nan", "1e3s"])
def test_no_length_of_a_fit(text: str) -> None:
    with pytest.raises(ValueError, match=r"fit|week"):
        read_fit_length(text)
