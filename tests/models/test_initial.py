"""Pre-training from other weights: what is taken, what starts anew, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffmae_video.config import ModelSettings
from diffmae_video.errors import UsageError
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.exporters import export_model
from diffmae_video.models.initial import start_from
from diffmae_video.models.weights import save_model

SIZES = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}


def settings(**changes: object) -> ModelSettings:
    return ModelSettings.model_validate({"frames": 4, "size": (32, 32), **SIZES, **changes})


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_encoder_and_decoder_of_the_same_kind_are_taken(tmp_path: Path) -> None:
    given, model = DiffMAE(settings(), seed=1), DiffMAE(settings(), seed=2)
    save_model(given, tmp_path)
    line = start_from(model, tmp_path)
    assert same(tensors(model), tensors(given))
    encoder, decoder = (len(part.state_dict()) for part in (model.encoder, model.decoder))
    expected = f"{encoder} tensors of the encoder and {decoder} of the decoder from {tmp_path}; 0 tensors start anew."
    assert line == f"Weights: {expected}"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"objective": "mae", "timestep": "none"}, "its decoder has objective mae, not diffmae"),
        ({"target": "velocity"}, "its decoder has target velocity, not pixel"),
        ({"decoder_depth": 2}, "its decoder has other tensors"),
    ],
)
def test_a_decoder_of_another_kind_is_left(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    given, model = DiffMAE(settings(**changes), seed=1), DiffMAE(settings(), seed=2)
    before = tensors(model.decoder)
    save_model(given, tmp_path)
    line = start_from(model, tmp_path)
    assert same(tensors(model.encoder), tensors(given.encoder))
    assert same(tensors(model.decoder), before)
    assert line.endswith(f"{len(before)} tensors start anew ({why}).")


def test_the_encoder_of_a_classifier_is_taken_and_its_head_left(tmp_path: Path) -> None:
    given, model = Classifier(Encoder(settings(), seed=1), 5), DiffMAE(settings(), seed=2)
    save_model(given, tmp_path)
    assert "(there is no decoder in it)" in start_from(model, tmp_path)
    assert same(tensors(model.encoder), tensors(given.encoder))


@pytest.mark.parametrize("positions", ["learned", "joint"])
def test_learned_positions_are_resized(tmp_path: Path, positions: str) -> None:
    given = DiffMAE(settings(positions=positions), seed=1)
    model = DiffMAE(settings(positions=positions, frames=8, size=(48, 40)), seed=2)
    save_model(given, tmp_path)
    line = start_from(model, tmp_path, "the source")
    expected = given.encoder.positions((4, 6, 5))
    torch.testing.assert_close(model.encoder.positions((4, 6, 5)), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        model.decoder.positions((4, 6, 5)), given.decoder.positions((4, 6, 5)), rtol=0, atol=1e-6
    )
    assert "(grid 2x4x4 resized to 4x6x5)" in line
    assert "from the source;" in line


def test_an_image_model_is_inflated_and_a_still_clip_gives_its_tokens(tmp_path: Path) -> None:
    image = {"frames": 1, "tubelet": 1, "objective": "mae", "timestep": "none", "decoder": "joint"}
    given = DiffMAE(settings(**image), seed=1).eval()
    model = DiffMAE(settings(objective="mae", timestep="none", decoder="joint", frames=2), seed=2).eval()
    save_model(given, tmp_path)
    line = start_from(model, tmp_path)
    still = torch.rand(1, 3, 1, 32, 32)
    torch.testing.assert_close(model.encoder(still.expand(-1, -1, 2, -1, -1)), given.encoder(still), rtol=0, atol=1e-5)
    head = model.decoder.head.weight.unflatten(0, (2, -1))  # (t, p * p * C, E)
    assert torch.equal(head[0], given.decoder.head.weight)
    assert torch.equal(head[1], given.decoder.head.weight)
    assert "image kernels inflated" in line


def test_another_projects_weights(tmp_path: Path) -> None:
    kind = {"objective": "mae", "timestep": "none", "decoder": "joint", "positions": "flat", "pixel_norm": "imagenet"}
    given = DiffMAE(settings(target="norm_pixel_channel", **kind), seed=1)
    with torch.no_grad():  # VideoMAE has no such biases
        given.decoder.latent_embed.bias.zero_()
        for block in [*given.encoder.blocks, *given.decoder.blocks]:
            block.attn.qkv.bias.unflatten(0, (3, -1))[1].zero_()
    export_model(given, tmp_path / "hf", "hf")
    model = DiffMAE(settings(target="norm_pixel_channel", **kind), seed=2)
    start_from(model, tmp_path / "hf" / "model.safetensors")
    assert same(tensors(model), tensors(given))


def test_another_encoder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    save_model(DiffMAE(settings(depth=3, tubelet=4, positions="learned", class_token=True)), tmp_path)
    with pytest.raises(UsageError) as caught:
        start_from(DiffMAE(settings()), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"--init {tmp_path} has an encoder of depth 3 (model.depth = 2 here), class_token true")
    for setting in ("depth=3", "class_token=true", "positions=learned", "tubelet=4"):
        assert f"--set model.{setting}" in message
    assert "\n" not in message
    assert "width" not in message
