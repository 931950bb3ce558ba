"""The second decoder on a frozen teacher's features."""

from __future__ import annotations

import json

import diffmae_video.compat  # noqa: F401

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from diffmae_video.config import ModelSettings, TeacherSettings
from diffmae_video.errors import DataError, UsageError
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.teachers import ImageTeacher, load_teacher
from diffmae_video.models.weights import load_model, save_model
from diffmae_video.registry import teachers


@teachers.register("tiny_vit")
def tiny_vit() -> ImageTeacher:
    """A timm ViT with a class token on 24 x 24 pixels: its 3 x 3 grid differs from the model's 4 x 4."""
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=24, patch_size=8, depth=1, embed_dim=24, num_heads=2, num_classes=0,
        global_pool="",
    )  # fmt: skip
    return ImageTeacher(network, (24, 24), (0.5,) * 3, (0.5,) * 3)


def settings(**changes) -> ModelSettings:
    """A small model with a teacher from this module."""
    teacher = TeacherSettings(source="local", name="tiny_vit", depth=1)
    fields = {"width": 32, "depth": 2, "heads": 2, "frames": 4, "size": (32, 32), "patch": 8, "teacher": teacher}
    fields |= {"preset": "nano", "decoder_width": 32, "decoder_heads": 2, "decoder_depth": 1}
    return ModelSettings(**{**fields, **changes})


@pytest.mark.parametrize("decoder", ["joint", "cross_self", "cross"])
def test_feature_loss_adds_to_the_pixel_loss(decoder, tmp_path):
    teacher = tiny_vit()
    net = DiffMAE(settings(decoder=decoder), teacher=teacher)
    plain = DiffMAE(settings(decoder=decoder, teacher=None))
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("feature_decoder")})
    mask, clips = make_mask("random", 0.75, (2, 4, 4), [0, 1]), torch.randn(2, 3, 4, 32, 32).clamp(-1, 1)
    draw = net.draw([1, 2], mask)
    out = net(clips, mask, draw)
    assert bool((out.per_sample > plain(clips, mask, draw).per_sample).all())
    out.loss.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("network" in name for name in net.state_dict())
    save_model(net, tmp_path)
    again = load_model(tmp_path)  # without its teacher, whose name a file may not use
    assert torch.equal(again.feature_decoder.decoder.head.weight, net.feature_decoder.decoder.head.weight)


def test_targets_are_the_teachers_tokens_at_their_places():
    class Means(torch.nn.Module):
        """Mean colour of each 8 x 8 cell as a map."""

        width = 3

        def forward(self, images):
            return torch.nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)

    net = DiffMAE(settings(), teacher=Means())
    clips = torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    targets = net.feature_decoder.targets(clips, (2, 4, 4))
    assert targets.shape == (1, 32, 3)
    cell = (clips[0, :, 2, 8:16, 16:24] / 2 + 0.5).mean((1, 2))  # second tubelet, row 1, column 2
    expected = torch.nn.functional.layer_norm(cell, (3,))
    torch.testing.assert_close(targets[0, 16 + 4 + 2], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cell", [4, 16])
def test_teachers_of_another_grid_are_resized_to_ours(cell):
    """A teacher whose first feature rises along x and second along y, on a frame wider than high: so do our targets."""

    class Ramps(torch.nn.Module):
        width = 3

        def forward(self, images):
            rows, columns = images.shape[2] // cell, images.shape[3] // cell
            y, x = torch.meshgrid(
                (torch.arange(rows) + 0.5) * cell, (torch.arange(columns) + 0.5) * cell, indexing="ij"
            )
            return torch.stack([x, y, -x - y]).expand(len(images), -1, -1, -1)

    net = DiffMAE(settings(size=(32, 64)), teacher=Ramps())
    targets = net.feature_decoder.targets(torch.zeros(1, 3, 4, 32, 64), (2, 4, 8)).unflatten(1, (2, 4, 8))
    inner = targets[0, :, 1:3, 2:6]  # away from the borders, where interpolation is exact on a ramp
    y, x = torch.meshgrid(torch.arange(1, 3) * 8 + 4.0, torch.arange(2, 6) * 8 + 4.0, indexing="ij")
    expected = torch.nn.functional.layer_norm(torch.stack([x, y, -x - y], -1), (3,))
    tolerance = 0.12 if cell == 16 else 0.01  # two rows of 16 pixels are all border
    torch.testing.assert_close(inner, expected.expand(2, -1, -1, -1), atol=tolerance, rtol=0)


def test_a_teacher_without_a_grid_is_refused():
    class Odd(torch.nn.Module):
        width = 3

        def forward(self, images):
            return torch.zeros(len(images), 17, 3)

    net = DiffMAE(settings(), teacher=Odd())
    with pytest.raises(UsageError, match="17 tokens"):
        net.feature_decoder.targets(torch.zeros(1, 3, 4, 32, 32), (2, 4, 4))


# --- CLIP by name: random weights stand for the published ones, which only a download brings -------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's models
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
TOWERS = {  # open_clip's own ViT, and a timm network as its image tower
    "clip-own": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "clip-timm": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": ""},
}


@pytest.fixture(scope="module")
def clips_of_random_weights(tmp_path_factory) -> dict[str, tuple[torch.nn.Module, str]]:
    """Small CLIP models under names that open_clip knows from here on, and their checkpoints."""
    folder, out = tmp_path_factory.mktemp("clip"), {}
    for name, tower in TOWERS.items():
        config = {"embed_dim": 24, "vision_cfg": tower, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        torch.manual_seed(1)
        model = open_clip.create_model(name).eval()
        torch.save(model.state_dict(), folder / f"{name}.pt")
        out[name] = model, str(folder / f"{name}.pt")
    return out


def as_clip_wants(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] by CLIP's mean and deviation."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def test_open_clip_teacher(clips_of_random_weights):
    """Its tokens are what open_clip's own intermediate features are after the last norm."""
    model, checkpoint = clips_of_random_weights["clip-own"]
    teacher = load_teacher(TeacherSettings(source="open_clip", name="clip-own", checkpoint=checkpoint))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (grid,) = model.visual.forward_intermediates(
            as_clip_wants(images), indices=1, normalize_intermediates=True, intermediates_only=True
        )["image_intermediates"]  # (B, F, h, w)
    assert teacher.width == 32
    torch.testing.assert_close(teacher(images), grid.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_open_clip_teacher_on_a_timm_tower(clips_of_random_weights):
    model, checkpoint = clips_of_random_weights["clip-timm"]
    teacher = load_teacher(TeacherSettings(source="open_clip", name="clip-timm", checkpoint=checkpoint))
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.visual.trunk.forward_features(as_clip_wants(images))[:, 1:]  # without the class token
    assert teacher.width == 192
    torch.testing.assert_close(teacher(images), tokens, atol=1e-5, rtol=1e-5)


def test_a_model_learns_from_open_clip(clips_of_random_weights):
    _, checkpoint = clips_of_random_weights["clip-own"]
    net = DiffMAE(settings(teacher=TeacherSettings(source="open_clip", name="clip-own", checkpoint=checkpoint)))
    mask, clips = make_mask("random", 0.75, (2, 4, 4), [0, 1]), torch.randn(2, 3, 4, 32, 32).clamp(-1, 1)
    net(clips, mask, net.draw([1, 2], mask)).loss.backward()
    assert float(net.feature_decoder.decoder.head.weight.grad.abs().sum()) > 0
    assert net.settings.teacher.width == 32


def test_clip_by_timms_name(tmp_path):
    name = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"  # timm's smallest CLIP
    torch.manual_seed(0)
    peer = timm.create_model(name, pretrained=False).eval()
    save_file(peer.state_dict(), tmp_path / "clip.safetensors")
    teacher = load_teacher(TeacherSettings(name=name, checkpoint=str(tmp_path / "clip.safetensors")))
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = peer.forward_features(as_clip_wants(images))[:, 1:]
    torch.testing.assert_close(teacher(images), tokens, atol=1e-5, rtol=1e-5)


def test_teachers_of_other_weights_are_refused(clips_of_random_weights, tmp_path):
    (_, own), (_, other) = clips_of_random_weights.values()
    for checkpoint, error, text in ((other, UsageError, "missing class_embedding"), (__file__, DataError, "refused")):
        with pytest.raises(error, match=text):
            load_teacher(TeacherSettings(source="open_clip", name="clip-own", checkpoint=checkpoint))
    with pytest.raises(UsageError, match=r"no weights.*NAME:TAG"):
        load_teacher(TeacherSettings(source="open_clip", name="clip-own"))
    with pytest.raises(UsageError, match=r"clip-nobody.*NAME:TAG"):
        load_teacher(TeacherSettings(source="open_clip", name="clip-nobody:openai", checkpoint=own))


def test_a_teacher_without_tokens_is_refused():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 9))
    with pytest.raises(UsageError, match="no grid of tokens"):
        ImageTeacher(network, (8, 8), (0.5,) * 3, (0.5,) * 3)


def test_unknown_teachers_are_named():
    for name in ("no.such.module:thing", "math:sqrt", "nonsense"):
        teacher = TeacherSettings(source="local", name=name)
        with pytest.raises(UsageError, match="teacher"):
            DiffMAE(settings(teacher=teacher))
    with pytest.raises(UsageError, match="timm"):
        DiffMAE(settings(teacher=TeacherSettings(source="timm", name="no_such_model")))


def test_a_model_from_a_file_does_not_build_the_teacher_that_the_file_names(tmp_path):
    built = []
    teachers.register("noted")(lambda: built.append(1) or tiny_vit())
    net = DiffMAE(settings(teacher=TeacherSettings(source="local", name="noted", depth=1)), teacher=tiny_vit())
    save_model(net, tmp_path)
    again, mask = load_model(tmp_path), make_mask("random", 0.75, (2, 4, 4), [0, 1])
    clips = torch.zeros(2, 3, 4, 32, 32)
    with pytest.raises(UsageError, match="without its teacher"):
        again(clips, mask, again.draw([1, 2], mask))
    assert again.sample(clips, mask, seeds=[1, 2]).shape == clips.shape  # for which it needs none
    assert not built
    again.feature_decoder.use_teacher(tiny_vit())
    draw = net.draw([1, 2], mask)
    assert torch.equal(again(clips, mask, draw).loss, net(clips, mask, draw).loss)
    description = json.loads((tmp_path / "model.json").read_text())
    del description["model"]["teacher"]["width"]  # the way to have it asked while the model is built
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match="teacher has no width"):
        load_model(tmp_path)
    assert not built
