"""Checkpoints as training code leaves them: containers, prefixes, pooling, sizes; weights that would load wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import diffmae_video.compat  # noqa: F401

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file

from diffmae_video.config import ModelSettings
from diffmae_video.errors import DataError, UsageError
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.exporters import export_model
from diffmae_video.models.importers import import_weights, load_pretrained
from diffmae_video.models.tensors import CONTAINERS
from diffmae_video.pipelines.weights import import_file

IMAGE = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}


def vit(seed: int = 0, **options) -> torch.nn.Module:
    """timm's ViT with random values everywhere, so that every tensor matters."""
    model = timm.create_model("vit_base_patch16_224", num_classes=5, **IMAGE, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def images(seed: int = 3) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("source", ["auto", "mae", "timm"])
def test_fine_tuned_image_classifiers_pool_as_they_were_trained(tmp_path: Path, pool: str, source: str) -> None:
    # MAE's own fine-tuned weights have the same names: `fc_norm` and no `norm` where it averages patches
    theirs = vit(global_pool=pool)
    torch.save({"model": theirs.state_dict()}, tmp_path / "tuned.pth")
    ours = import_weights(source, tmp_path / "tuned.pth").eval()
    assert isinstance(ours, Classifier)
    assert ours.pool == ("class" if pool == "token" else "mean")
    with torch.no_grad():
        torch.testing.assert_close(ours(images()[:, :, None]), theirs(images()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_our_timm_export_comes_back_with_the_same_logits(tmp_path: Path, pool: str) -> None:
    model = ModelSettings(
        preset="nano", width=96, depth=2, heads=4, frames=1, tubelet=1, size=(32, 48), patch=8, class_token=True
    )
    ours = Classifier(Encoder(model), 4, pool=pool, head_init=0.5).eval()
    export_model(ours, tmp_path / "out", "timm")
    back = load_pretrained(tmp_path / "out").eval()
    assert back.settings.size == (32, 48)
    clips = torch.randn(2, 3, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(back(clips), ours(clips), atol=1e-6, rtol=1e-6)


def test_averages_behind_the_norm_are_refused(tmp_path: Path) -> None:
    theirs = vit(global_pool="avg", fc_norm=False)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_base_patch16_224", "model_args": {"global_pool": "avg", "num_heads": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="averages tokens behind their norm"):
        import_weights("auto", tmp_path)


PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=3),
    containers=st.lists(st.sampled_from(CONTAINERS), max_size=2),
    beside=st.booleans(),
)
def test_any_wrapping_gives_the_same_weights(
    tmp_path: Path, prefixes: list[str], containers: list[str], beside: bool
) -> None:
    theirs = vit()
    content: dict = {"".join(prefixes) + name: tensor for name, tensor in theirs.state_dict().items()}
    for container in containers:
        content = {container: content}
        if beside:
            content |= {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}}
    torch.save(content, tmp_path / "weights.pth")
    ours = import_weights("auto", tmp_path / "weights.pth").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(images()[:, :, None]), theirs(images()), atol=1e-5, rtol=1e-5)


def test_an_average_beside_the_weights_is_named_and_can_be_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, average = vit(0), vit(1)
    torch.save({"model": plain.state_dict(), "model_ema": average.state_dict()}, tmp_path / "both.pth")
    import_file("auto", tmp_path / "both.pth", out=tmp_path / "plain")
    assert "--key model_ema takes another table" in " ".join(capsys.readouterr().out.split())
    import_file("auto", tmp_path / "both.pth", out=tmp_path / "average", key="model_ema")
    for folder, theirs in (("plain", plain), ("average", average)):
        with torch.no_grad():
            logits = load_pretrained(tmp_path / folder).eval()(images()[:, :, None])
            torch.testing.assert_close(logits, theirs(images()), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match=r"--key ema: .* holds the tables model, model_ema"):
        import_weights("auto", tmp_path / "both.pth", key="ema")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    state = vit().state_dict()
    state["blocks.1.mlp.fc1.weight"][0, 0] = value
    torch.save({"model": state}, tmp_path / "bad.pth")
    with pytest.raises(DataError, match=r"blocks\.1\.mlp\.fc1\.weight holds values that are no numbers"):
        import_weights("auto", tmp_path / "bad.pth")


def test_pictures_that_are_no_squares_need_their_size(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_base_patch16_224", num_classes=3, **IMAGE | {"img_size": (32, 64)}).eval()
    save_file(theirs.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(UsageError, match="32 positions are no square grid: give --size"):
        import_weights("timm", tmp_path / "wide.safetensors")
    ours = import_weights("timm", tmp_path / "wide.safetensors", size=(32, 64)).eval()
    pictures = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures[:, :, None]), theirs(pictures), atol=1e-5, rtol=1e-5)


def video_vit(frames: int, **extra: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A fine-tuned VideoMAE of width 192, patch 16 at 224 pixels, with learned positions over all tokens."""
    width = 192
    shapes = {
        "patch_embed.proj.weight": (width, 3, 2, 16, 16),
        "patch_embed.proj.bias": (width,),
        "pos_embed": (1, frames // 2 * 196, width),
        "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.0.attn.q_bias": (width,),
        "blocks.0.attn.v_bias": (width,),
        "blocks.0.attn.proj.weight": (width, width),
        "blocks.0.attn.proj.bias": (width,),
        "blocks.0.mlp.fc1.weight": (4 * width, width),
        "blocks.0.mlp.fc1.bias": (4 * width,),
        "blocks.0.mlp.fc2.weight": (width, 4 * width),
        "blocks.0.mlp.fc2.bias": (width,),
        **{f"blocks.0.norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")},
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
        "head.weight": (3, width),
        "head.bias": (3,),
        **extra,
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}


@pytest.mark.parametrize("frames", [16, 32])
def test_videomae_with_learned_positions_keeps_its_frames(tmp_path: Path, frames: int) -> None:
    tensors = video_vit(frames)
    save_file(tensors, tmp_path / "video.safetensors")
    ours = import_weights("auto", tmp_path / "video.safetensors")
    assert (ours.settings.frames, ours.settings.size, ours.pool) == (frames, (224, 224), "mean")
    assert ours.info["imported_from"] == "videomae"
    assert torch.equal(ours.encoder.positions(ours.encoder.shape), tensors["pos_embed"])


def test_positions_that_do_not_divide_into_the_frames_are_refused(tmp_path: Path) -> None:
    save_file(video_vit(16), tmp_path / "video.safetensors")
    with pytest.raises(UsageError, match="1568 positions do not divide into 5 times"):
        import_weights("auto", tmp_path / "video.safetensors", frames=10)


def test_first_patch_classifiers_and_crossmae_are_refused_with_a_reason(tmp_path: Path) -> None:
    state = {"classifier.weight": torch.zeros(2, 192), "videomae.embeddings.patch_embeddings.projection.bias": None}
    state["videomae.embeddings.patch_embeddings.projection.bias"] = torch.zeros(192)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 192, "use_mean_pooling": False}))
    with pytest.raises(DataError, match="classifies by its first patch"):
        import_weights("auto", tmp_path)
    crossmae = vit().state_dict() | {"wfm.weight": torch.zeros(1), "mask_token": torch.zeros(1, 1, 64)}
    save_file(crossmae, tmp_path / "crossmae.safetensors")
    with pytest.raises(DataError, match="CrossMAE's, whose decoder mixes all encoder outputs"):
        import_weights("auto", tmp_path / "crossmae.safetensors")


def test_class_names_come_from_a_file_or_the_folder(tmp_path: Path) -> None:
    torch.save({"model": vit().state_dict()}, tmp_path / "tuned.pth")
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\neel\n")
    import_file("auto", tmp_path / "tuned.pth", out=tmp_path / "named", classes=names)
    assert load_pretrained(tmp_path / "named").info["classes"] == ["ant", "bee", "cat", "dog", "eel"]
    names.write_text("ant\nbee\n")
    with pytest.raises(UsageError, match="2 names for the 5 classes"):
        import_file("auto", tmp_path / "tuned.pth", out=tmp_path / "few", classes=names)
    names.write_text("ant\nant\n")
    with pytest.raises(UsageError, match="none twice"):
        import_file("auto", tmp_path / "tuned.pth", out=tmp_path / "twice", classes=names)


def test_an_epsilon_that_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    sizes = {"preset": "nano", "frames": 1, "tubelet": 1, "size": (32, 32), "patch": 8}
    model = Classifier(Encoder(ModelSettings(**sizes, layer_norm_eps=1e-3)), 3)
    with pytest.raises(UsageError, match=r"layer_norm_eps is 0\.001"):
        export_model(model, tmp_path / "timm", "timm")
    clip = {"preset": "nano", "frames": 4, "tubelet": 2, "size": (32, 32), "patch": 8, "positions": "flat"}
    model = Classifier(Encoder(ModelSettings(**clip, encoder_norm_eps=1e-3)), 3)
    with pytest.raises(UsageError, match=r"encoder_norm_eps is 0\.001"):
        export_model(model, tmp_path / "hf", "hf")
