"""Frozen networks whose token features a second decoder predicts.

F is the width of the teacher.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmae_video import registry
from diffmae_video.config import TeacherSettings
from diffmae_video.errors import UsageError
from diffmae_video.models.tensors import read_tensors, tensor_problems


class ImageTeacher(nn.Module):
    """A frozen image network as a token grid: pixels in [0, 1] (B, C, H, W) -> (B, h * w, F) or (B, F, h, w).

    Args:
        network: returns tokens (B, n, F), class or register tokens first, or a map (B, F, h, w).
        size: (H, W) it wants; frames are resized to it.
        mean: of the pixels it was trained on.
        std: likewise.
    """

    def __init__(
        self, network: nn.Module, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.network, self.size = network.eval().requires_grad_(False), size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        features = self(torch.zeros(1, 3, *size))
        self.width = features.shape[-1] if features.dim() == 3 else features.shape[1]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in [0, 1] -> tokens (B, h * w, F) of a square grid, or the network's map (B, F, h, w).

        Raises:
            UsageError: the network gives neither, but one vector an image.
        """
        images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        features = self.network((images - self.mean) / self.std)
        if isinstance(features, tuple | list):  # open_clip: (pooled, tokens)
            features = features[-1]
        if features.dim() == 4:
            return features
        if features.dim() != 3:
            raise UsageError(
                f"model.teacher gives {(*features.shape,)} for {len(images)} image(s), which is no grid of tokens: "
                "choose a network with patch tokens or a feature map."
            )
        side = math.isqrt(features.shape[1])
        return features[:, features.shape[1] - side**2 :]

    def train(self, mode: bool = True) -> ImageTeacher:
        """Always in evaluation mode."""
        return super().train(False)


def load_teacher(settings: TeacherSettings) -> Any:
    """Build the teacher a recipe names: of timm or open_clip, or one that is registered (`registry.teachers`).

    A registered teacher is a function without arguments that returns the module. Another package adds one through an
    entry point of the group `diffmae_video.teachers`, a script by `@teachers.register(name)`; settings name no code.

    Raises:
        UsageError: the library is missing, the name is unknown, its weights cannot be had or do not fit, or the
            function returns something else.
        DataError: `model.teacher.checkpoint` is damaged or holds more than tensors.
    """
    make, hint = {
        "timm": (_timm_teacher, "give a timm name, and offline model.teacher.checkpoint"),
        "open_clip": (_open_clip_teacher, "write it as NAME:TAG, or give model.teacher.checkpoint"),
        "local": (_local_teacher, "give the name of an entry point of diffmae_video.teachers"),
    }[settings.source]
    try:
        return make(settings)
    except (ImportError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"model.teacher.name = {settings.name}: {reason}; {hint}.") from error


def _timm_teacher(settings: TeacherSettings) -> ImageTeacher:
    import diffmae_video.compat  # noqa: F401 - before timm, which imports torchvision

    import timm

    network: Any = timm.create_model(
        settings.name, pretrained=settings.checkpoint is None, num_classes=0, global_pool=""
    )
    _load(network, settings.checkpoint)
    config = network.pretrained_cfg
    return ImageTeacher(network, tuple(config["input_size"][1:]), config["mean"], config["std"])


def _open_clip_teacher(settings: TeacherSettings) -> ImageTeacher:
    import diffmae_video.compat  # noqa: F401 - before open_clip, which imports torchvision

    try:
        import open_clip
    except ImportError as error:
        raise UsageError(
            "model.teacher.source = open_clip needs open_clip: pip install 'diffmae-video[clip]'."
        ) from error
    name, _, tag = settings.name.partition(":")
    if name in ("hf-hub", "local-dir"):  # open_clip's own addresses of a model with its weights
        name, tag = settings.name, ""
    elif not tag and settings.checkpoint is None:
        raise ValueError("the name tells no weights, and a random teacher teaches nothing")
    own = settings.checkpoint is None
    clip = open_clip.create_model(
        name, pretrained=(tag or None) if own else None, load_weights=own, require_pretrained=own, pretrained_text=False
    )
    tower: Any = clip.visual
    _load(tower, settings.checkpoint, "visual.")
    if hasattr(tower, "trunk"):  # a timm network behind a projection: its tokens, not their pool
        network = tower.trunk
        network.reset_classifier(0, "")
    else:
        network = tower
        network.output_tokens = True
    return ImageTeacher(network, _pair(tower.image_size), tower.image_mean, tower.image_std)


def _local_teacher(settings: TeacherSettings) -> nn.Module:
    teacher = registry.teachers.get(settings.name)()
    if not isinstance(teacher, nn.Module) or not hasattr(teacher, "width"):
        raise TypeError("it did not return an ImageTeacher or another module with .width, see models/teachers.py")
    _load(getattr(teacher, "network", teacher), settings.checkpoint)
    return teacher


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _load(network: nn.Module, checkpoint: str | None, prefix: str = "") -> None:
    """Fill the network from a file, or from the part of it under `prefix` where it holds a larger model."""
    if checkpoint is None:
        return
    tensors = read_tensors(checkpoint)
    if prefix and any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    tensors = {name: value for name, value in tensors.items() if not name.startswith("head.")}  # of its classes
    problems = tensor_problems(network, tensors)
    if problems:
        raise UsageError(
            f"model.teacher.checkpoint = {checkpoint} does not fit: {'; '.join(problems)}; give the teacher's own."
        )
    network.load_state_dict(tensors)
