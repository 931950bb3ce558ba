"""Saved, exported and imported models; the classifier; ONNX and torch.export."""

from __future__ import annotations

import json

import diffmae_video.compat  # noqa: F401

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay

from diffmae_video import load_pretrained
from diffmae_video.config import DiffusionSettings, ModelSettings
from diffmae_video.errors import DataError, UsageError
from diffmae_video.files import sha256_of
from diffmae_video.masking import make_mask
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.exporters import export_model
from diffmae_video.models.importers import import_weights
from diffmae_video.models.weights import load_model, save_model, saved_sha256

SMALL = {"preset": "nano", "width": 48, "depth": 2, "heads": 4, "size": (32, 32), "patch": 8}
SMALL |= {"decoder_width": 32, "decoder_heads": 4, "decoder_depth": 2}
VIDEO = SMALL | {"frames": 8, "pixel_norm": "imagenet"}
IMAGE = SMALL | {"frames": 1, "tubelet": 1, "pixel_norm": "imagenet"}
MAE = {"objective": "mae", "decoder": "joint", "target": "norm_pixel", "timestep": "none"}


def shaken(model):
    """Every parameter away from its initial value, so that a lost bias shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("latent_embed.bias"):  # VideoMAE has none
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def same_tensors(one, two) -> bool:
    """Equal names and bits, but for key biases: they cancel in the softmax, and VideoMAE does not save them."""
    first, second = one.state_dict(), two.state_dict()
    for name in first:
        if name.endswith("qkv.bias"):
            third = len(first[name]) // 3
            for table in (first, second):
                table[name] = table[name].clone()
                table[name][third : 2 * third] = 0
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_save_and_load(tmp_path):
    model = shaken(DiffMAE(ModelSettings(**VIDEO), DiffusionSettings(rho=0.6)))
    save_model(model, tmp_path, {"dataset": "demo", "classes": ["a", "b"]})
    again = load_model(tmp_path / "weights.safetensors")
    assert same_tensors(model, again)
    assert again.info["kind"] == "diffmae"
    assert again.info["classes"] == ["a", "b"]
    assert again.diffusion == model.diffusion
    assert again.settings == model.settings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "weights.safetensors"]


def test_digest_is_of_the_weights_whatever_file_names_the_model(tmp_path):
    file = save_model(DiffMAE(ModelSettings(**VIDEO)), tmp_path)
    for path in (tmp_path, file, tmp_path / "model.json"):  # all that load_model takes
        assert saved_sha256(path) == sha256_of(file)


def test_damaged_models_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"model\.json"):
        load_model(tmp_path)
    model = Classifier(Encoder(ModelSettings(**VIDEO)), 3)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "weights.safetensors")
    del tensors["head.bias"]
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match=r"missing head\.bias"):
        load_model(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    with pytest.raises(DataError, match="cannot be read"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"format": 1, "kind": "other", "model": {}}))
    with pytest.raises(DataError, match="kind"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"depth": 10**6}}, "less than or equal to 1000"),
        ({"model": {"depth": 1000}}, "describes at least"),
        ({"model": {"patch": 1, "size": [4096, 4096], "frames": 8}}, "tokens"),
        ({"model": {"size": [4096, 4096], "patch": 4096, "width": 30000, "heads": 10}}, "parameters"),
        ({"model": {"mlp_ratio": float("inf")}}, "finite"),
        ({"model": {"size": "wide"}}, "size"),
        ({"model": []}, "model"),
        ({"diffusion": {"timesteps": 10**9}}, "less than or equal to 100000"),
        ({"format": "new"}, "cannot be read"),
        ({"diffusion": None}, "not valid"),
    ],
)
def test_odd_descriptions_are_refused_before_they_take_memory(tmp_path, change, said):
    save_model(DiffMAE(ModelSettings(**VIDEO), DiffusionSettings()), tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    for key, value in change.items():
        description[key] = {**description[key], **value} if isinstance(value, dict) else value
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(DataError) as caught:
        load_model(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_for_a_billion_classes_is_refused(tmp_path):
    save_model(Classifier(Encoder(ModelSettings(**VIDEO)), 3), tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    description["classifier"]["num_classes"] = 10**9
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match="describes at least"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    model = Classifier(Encoder(ModelSettings(**VIDEO)), 3)
    with torch.no_grad():
        model.encoder.blocks[1].mlp.fc1.weight[0, 0] = value
    save_model(model, tmp_path)
    with pytest.raises(DataError, match=r"1 of \d+ tensors, the first is encoder\.blocks\.1\.mlp\.fc1\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize("pool", ["mean", "class", "attentive"])
def test_classifier(pool, tmp_path):
    model = shaken(Classifier(Encoder(ModelSettings(**VIDEO, class_token=True)), 5, pool=pool, head_init=0.5))
    clips = torch.randn(2, 3, 8, 32, 32)
    logits = model(clips)
    assert logits.shape == (2, 5)
    features = model.forward_features(clips)
    assert torch.equal(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, 48)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).eval()(clips), logits)
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    expected = {"encoder.patch_embed.proj.weight": 0.125, "encoder.blocks.0.mlp.fc1.weight": 0.25}
    expected |= {"encoder.cls_token": 0.125, "encoder.blocks.1.mlp.fc1.weight": 0.5, "head.weight": 1.0}
    assert {name: scale[id(model.get_parameter(name))] for name in expected} == expected
    model.reset_classifier(0)
    assert model(clips).shape == (2, 48)


def test_intermediates():
    encoder, clips = Encoder(ModelSettings(**VIDEO)).eval(), torch.randn(1, 3, 8, 32, 32)
    final, features = encoder.forward_intermediates(clips, [0, -1], norm=True)
    assert torch.equal(features[1], final)
    assert torch.equal(final, encoder(clips))
    assert len(encoder.forward_intermediates(clips)[1]) == 2


def test_timm_round_trip(tmp_path):
    model = shaken(Classifier(Encoder(ModelSettings(**IMAGE)), 4))
    files = export_model(model, tmp_path / "timm", "timm", licence="cc0-1.0")
    assert [file.name for file in files] == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "timm/config.json").read_text())
    arguments = config["model_args"] | {"num_classes": 4, "global_pool": config["global_pool"]}
    peer = timm.create_model(config["architecture"], **arguments).eval()
    peer.load_state_dict(load_file(tmp_path / "timm/model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(peer(images), model(images[:, :, None]), atol=1e-5, rtol=1e-5)
    again = import_weights("timm", tmp_path / "timm/model.safetensors", heads=4)
    learned = {name: value for name, value in again.state_dict().items() if "positions" not in name}
    assert learned.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in learned.items())
    with torch.no_grad():  # and the positions, a table here and computed there
        assert torch.equal(again.eval()(images[:, :, None]), model(images[:, :, None]))
    assert "cc0-1.0" in (tmp_path / "timm/README.md").read_text()


def test_hugging_face_videomae_round_trip(tmp_path):
    model = shaken(DiffMAE(ModelSettings(**VIDEO | MAE, positions="flat", decoder_norm_eps=1e-5)))
    export_model(model, tmp_path / "hf", "hf")
    peer = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "hf").eval()
    mask, clips = make_mask("tube", 0.75, (4, 4, 4), [0, 0]), torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        expected = model(clips, mask, model.draw([0, 1], mask)).prediction
        theirs = peer(clips.transpose(1, 2), bool_masked_pos=mask.grid).logits
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    again = import_weights("hf-videomae", tmp_path / "hf")
    assert same_tensors(model, again)
    assert again.settings.decoder_heads == 4


def test_hugging_face_videomae_classifier_round_trip(tmp_path):
    settings = ModelSettings(**VIDEO, positions="flat", encoder_norm_eps=1e-5)
    model = shaken(Classifier(Encoder(settings), 3, head_init=0.1))
    model.info["classes"] = ["run", "jump", "swim"]
    export_model(model, tmp_path / "hf", "hf")
    peer = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "hf").eval()
    clips = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(peer(clips.transpose(1, 2)).logits, model(clips), atol=1e-5, rtol=1e-5)
    assert peer.config.id2label[1] == "jump"
    assert same_tensors(model, import_weights("auto", tmp_path / "hf"))


def test_hugging_face_vitmae_round_trip(tmp_path):
    model = shaken(DiffMAE(ModelSettings(**IMAGE | MAE, class_token=True, positions="learned")))
    export_model(model, tmp_path / "hf", "hf")
    again = import_weights("hf-vitmae", tmp_path / "hf")
    mask, images = make_mask("random", 0.75, (1, 4, 4), [0, 1]), torch.randn(2, 3, 1, 32, 32)
    draw = model.draw([0, 1], mask)
    with torch.no_grad():
        assert torch.equal(again(images, mask, draw).prediction, model(images, mask, draw).prediction)
    peer = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf").eval()
    noise = mask.grid.float()  # theirs keeps the lowest
    with torch.no_grad():
        logits = peer(images[:, :, 0], noise=noise).logits
    expected = model(images, mask, draw).prediction
    torch.testing.assert_close(logits[mask.grid].view_as(expected), expected, atol=1e-5, rtol=1e-5)


def test_formats_that_cannot_hold_a_model_say_so(tmp_path):
    model = DiffMAE(ModelSettings(**VIDEO))
    for form in ("hf", "timm", "gguf"):
        with pytest.raises(UsageError, match="--format"):
            export_model(model, tmp_path / "out", form)
        assert list(tmp_path.iterdir()) == []


def test_onnx_agrees(tmp_path):
    clips = torch.randn(3, 3, 8, 32, 32)  # three, exported with two: the batch is free
    classifier = shaken(Classifier(Encoder(ModelSettings(**VIDEO)), 4))
    pretrained = shaken(DiffMAE(ModelSettings(**VIDEO)))
    for name, model, expected in (
        ("classifier", classifier, classifier(clips)),
        ("encoder", pretrained, pretrained.encoder(clips)),
    ):
        export_model(model, tmp_path / name, "onnx")
        session = onnxruntime.InferenceSession(tmp_path / name / "model.onnx")
        (out,) = session.run(None, {"clips": clips.numpy()})
        np.testing.assert_allclose(out, expected.detach().numpy(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("pool", "positions"), [("mean", "sincos"), ("class", "learned"), ("attentive", "flat")])
def test_torch_export_in_any_batch(pool, positions):
    encoder = Encoder(ModelSettings(**VIDEO, positions=positions, class_token=pool == "class"))
    clips, batch = torch.randn(3, 3, 8, 32, 32), {0: torch.export.Dim("batch", min=1)}
    for network in (shaken(encoder), shaken(Classifier(encoder, 4, pool=pool))):
        program = torch.export.export(network, (clips[:2],), dynamic_shapes=(batch,))
        for count in (3, 1):
            torch.testing.assert_close(program.module()(clips[:count]), network(clips[:count]), atol=1e-5, rtol=1e-5)


def test_commands(tmp_path, monkeypatch, capsys):
    from diffmae_video.cli.app import run

    monkeypatch.chdir(tmp_path)
    peer = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
    save_file(peer.state_dict(), "vit.safetensors")
    assert run(["import", "timm", "vit.safetensors", "--frames", "4", "--out", "model"]) == 0
    assert "Classifier, 192 wide, 2 blocks, 3 heads" in capsys.readouterr().out
    assert load_pretrained("model").encoder.shape == (2, 4, 4)
    assert torch.equal(load_pretrained("vit.safetensors").head.weight, peer.head.weight)
    assert run(["import", "timm", "vit.safetensors", "--out", "model"]) == 2  # taken
    assert run(["export", "--checkpoint", "model", "--out", "out"]) == 0
    assert "README.md" in capsys.readouterr().out
    assert same_tensors(load_model("out"), load_model("model"))
    assert run(["export", "--checkpoint", "model", "--format", "hf", "--out", "hf"]) == 2
    assert run(["import", "videomae", "vit.safetensors", "--out", "x"]) == 2
    (tmp_path / "bad.pth").write_bytes(b"junk")
    assert run(["import", "auto", "bad.pth", "--out", "x"]) == 3
    assert not (tmp_path / "x").exists()
