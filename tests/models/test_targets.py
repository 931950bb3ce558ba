"""The second decoder on a frozen teacher's features."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import pytest
import timm
import torch

from diffmae_video.config import ModelSettings, TeacherSettings
from diffmae_video.errors import UsageError
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.targets import ImageTeacher
from diffmae_video.models.weights import load_model, save_model


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
    teacher = TeacherSettings(source="local", name=f"{__name__}:tiny_vit", depth=1)
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
    again = load_model(tmp_path)  # the teacher's module cannot be imported by this name here, and need not be
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


def test_unknown_teachers_are_named():
    for name in ("no.such.module:thing", "math:sqrt", "nonsense"):
        teacher = TeacherSettings(source="local", name=name)
        with pytest.raises(UsageError, match="teacher"):
            DiffMAE(settings(teacher=teacher))
    with pytest.raises(UsageError, match="timm"):
        DiffMAE(settings(teacher=TeacherSettings(source="timm", name="no_such_model")))
