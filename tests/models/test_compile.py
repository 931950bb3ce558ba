"""The training step is one graph for torch.compile, whatever it predicts; gradients are those of the plain step."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import pytest
import timm
import torch

from diffmae_video.config import ModelSettings, TeacherSettings
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.teachers import ImageTeacher

SMALL = {"preset": "nano", "width": 32, "depth": 2, "heads": 2, "frames": 4, "size": (32, 32), "patch": 8}
SMALL |= {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 2}
CHOICES = {
    "velocity": {"target": "velocity", "decoder": "joint"},
    "norm_pixel": {"target": "norm_pixel", "decoder": "cross"},
    "mae": {"objective": "mae", "decoder": "joint"},
    "ddpm": {"objective": "ddpm"},
    "class token": {"class_token": True, "positions": "learned", "decoder": "joint", "timestep": "none"},
    "checkpointing": {},
    "selective": {},
    "teacher": {"teacher": TeacherSettings(source="local", name="nothing:here", depth=1), "decoder": "cross"},
}


def image_teacher() -> ImageTeacher:
    """A ViT with a class token, on another grid than the model's."""
    torch.manual_seed(0)
    options = {"img_size": 24, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", **options)
    return ImageTeacher(network, (24, 24), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("choice", CHOICES)
def test_one_graph(choice):
    torch._dynamo.reset()
    teacher = image_teacher() if choice == "teacher" else None
    net = DiffMAE(ModelSettings(**SMALL | CHOICES[choice]), teacher=teacher).train()
    net.set_grad_checkpointing("selective" if choice == "selective" else choice == "checkpointing")
    mask, clips = make_mask("random", 0.75, (2, 4, 4), [0, 1]), torch.randn(2, 3, 4, 32, 32).clamp(-1, 1)
    draw, results = net.draw([1, 2], mask), []
    for step in (net, torch.compile(net, backend="eager", fullgraph=True)):  # an error at the first graph break
        net.zero_grad()
        loss = step(clips, mask, draw).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in net.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-6, rtol=1e-4)
