"""Weights of other projects through the command line: `diffmae import`, then `diffmae finetune` and `diffmae eval`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffmae_video.compat  # noqa: F401

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from diffmae_video.cli.app import run
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.weights import load_model
from diffmae_video.pipelines.workspace import Workspace

WIDTH, INNER, DEPTH, PATCH, SPATIAL, TIMES = 48, 32, 2, 8, 16, 2  # 4 frames of 32 x 32 pixels

RECIPE = """
[data]
stride = 2
workers = 0
crop = "center"
flip = 0.0
[train]
batch_size = 3
steps = 1
base_lr = 1e-9
precision = "fp32"
picture_every = 0
[finetune]
drop_path = 0.0
"""


def image_vit() -> dict[str, Tensor]:
    """timm's ViT with a head of 5 classes."""
    options = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3, "img_size": 32, "patch_size": PATCH}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **options).state_dict()


def mae() -> dict[str, Tensor]:
    """A pre-training of facebookresearch/mae: the ViT, and a decoder beside it."""
    tensors = {name: value for name, value in image_vit().items() if not name.startswith("head.")}
    modules = {
        "embed": nn.Linear(WIDTH, INNER),
        "norm": nn.LayerNorm(INNER),
        "blocks.0": Block(INNER, 2, qkv_bias=True),
    }
    modules["pred"] = nn.Linear(INNER, 3 * PATCH**2)
    for name, module in modules.items():
        tensors |= {f"decoder_{name}.{key}": value for key, value in module.state_dict().items()}
    places = torch.randn(1, 1 + SPATIAL, INNER)
    places[:, 0] = 0  # mae's fixed table has no position for the class token
    return tensors | {"mask_token": torch.randn(1, 1, INNER), "decoder_pos_embed": places}


def mae_st() -> dict[str, Tensor]:
    """A pre-training of facebookresearch/mae_st: separate positions, tubelets of two, split qkv."""
    tensors = {name: value for name, value in mae().items() if "pos_embed" not in name}
    for prefix, width in (("", WIDTH), ("decoder_", INNER)):
        tensors[f"{prefix}pos_embed_spatial"] = torch.randn(1, SPATIAL, width)
        tensors[f"{prefix}pos_embed_temporal"] = torch.randn(1, TIMES, width)
        tensors[f"{prefix}pos_embed_class"] = torch.randn(1, 1, width)
    tensors["decoder_cls_token"] = torch.randn(1, 1, INNER)
    tensors["patch_embed.proj.weight"] = torch.randn(WIDTH, 3, 2, PATCH, PATCH) * 0.1
    for name in [name for name in tensors if ".qkv." in name]:
        for part, value in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace(".qkv.", f".{part}.")] = value.contiguous()
    return tensors


def videomae(folder: Path) -> Path:
    """A pre-training of VideoMAE as transformers saves it."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = VideoMAEConfig(
        **{"image_size": 32, "patch_size": PATCH, "num_frames": 4, "hidden_size": WIDTH, "num_hidden_layers": DEPTH},
        **{"num_attention_heads": 3, "intermediate_size": 4 * WIDTH, "decoder_hidden_size": INNER},
        **{"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 4 * INNER},
        use_mean_pooling=False,  # as the published pre-trainings have it: the encoder ends in its norm
    )
    VideoMAEForPreTraining(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("source", ["timm", "mae", "mae_st", "hf-videomae"])
def test_import_finetune_eval(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shards: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "shards", {"train": 3, "val": 3})
    Workspace.here().record("shards", tmp_path / "shards", dataset="squares")
    (tmp_path / "tiny.toml").write_text(RECIPE)
    torch.manual_seed(0)
    if source == "hf-videomae":
        file, key = videomae(tmp_path / "hf"), None
    else:
        tensors = {"timm": image_vit, "mae": mae, "mae_st": mae_st}[source]()
        save_file(tensors, tmp_path / "peer.safetensors")
        file, key = tmp_path / "peer.safetensors", "blocks.1.mlp.fc2.weight"

    sizes = ["--heads", "3"] + (["--frames", "4"] if source in ("timm", "mae") else [])
    sizes += [] if source == "timm" else ["--decoder-heads", "2"]
    assert run(["import", source, str(file), "--out", "peer", *sizes]) == 0
    options = ["--task", "squares", "--device", "cpu"]
    assert run(["finetune", *options, "--init", "peer", "--recipe", "tiny.toml"]) == 0
    tuned, peer = load_model("runs/finetune-001"), load_model("peer").encoder
    assert isinstance(tuned, Classifier)
    assert tuned.head.out_features == 3  # a head of other classes is not kept
    assert tuned.encoder.shape == (TIMES, 4, 4)
    for name, parameter in peer.named_parameters():  # one step of next to no length: still the peer's weights
        torch.testing.assert_close(tuned.encoder.get_parameter(name), parameter, atol=1e-6, rtol=0)
    if key:
        torch.testing.assert_close(tuned.encoder.get_parameter(key), tensors[key], atol=1e-6, rtol=0)
    assert run(["eval", *options, "--views", "1x1"]) == 0
    assert (tmp_path / "runs" / "eval-001" / "eval.json").is_file()


def test_imported_classifiers_are_evaluated_with_the_names_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shards: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "shards", {"train": 3, "val": 3})
    Workspace.here().record("shards", tmp_path / "shards", dataset="squares")
    torch.manual_seed(0)
    tensors = image_vit()
    for classes in (3, 5):  # the data has three
        tensors["head.weight"], tensors["head.bias"] = torch.randn(classes, WIDTH), torch.zeros(classes)
        save_file(tensors, tmp_path / f"tuned{classes}.safetensors")
        arguments = ["--out", f"peer{classes}", "--heads", "3", "--frames", "4"]
        assert run(["import", "timm", f"tuned{classes}.safetensors", *arguments]) == 0
    options = ["--task", "squares", "--device", "cpu", "--views", "1x1"]
    assert run(["eval", *options, "--checkpoint", "peer3", "--out", "result"]) == 0
    assert "came without class names: its 3 classes are taken to be those of the data" in capsys.readouterr().out
    assert json.loads((tmp_path / "result" / "eval.json").read_text())["classes"] == 3
    assert run(["eval", *options, "--checkpoint", "peer5"]) == 3
    assert "The labels of peer5 are not those of" in capsys.readouterr().err
