"""Frozen teachers, and the second decoder that predicts their token features (DiffMAE's CLIP target).

The paper's teacher, layer and loss are not public; our choice: last-layer patch tokens, layer-normalised, and squared
error.
Letters: B batch, C channels, T H W frames and pixels, t tubelet, N tokens, K predicted tokens, F teacher width.
"""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmae_video.config import ModelSettings, TeacherSettings
from diffmae_video.errors import UsageError
from diffmae_video.models.decoder import Decoder
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.layers import seeded
from diffmae_video.models.patches import PIXEL_NORMS, gather_tokens
from diffmae_video.models.tensors import read_tensors, tensor_problems

if TYPE_CHECKING:
    from diffmae_video.models.diffmae import Encoding


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
    """Build the teacher a recipe names: timm or open_clip by name, or a local callable that returns one.

    Raises:
        UsageError: the library is missing, the name is unknown, its weights cannot be had or do not fit, or the
            callable returns something else.
        DataError: `model.teacher.checkpoint` is damaged or holds more than tensors.
    """
    make, hint = {
        "timm": (_timm_teacher, "give a timm name, and offline model.teacher.checkpoint"),
        "open_clip": (_open_clip_teacher, "write it as NAME:TAG, or give model.teacher.checkpoint"),
        "local": (_local_teacher, "write it as package.module:callable"),
    }[settings.source]
    try:
        return make(settings)
    except (ImportError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"model.teacher.name = {settings.name}: {reason}; {hint}.") from error


def _timm_teacher(settings: TeacherSettings) -> ImageTeacher:
    network = timm.create_model(settings.name, pretrained=settings.checkpoint is None, num_classes=0, global_pool="")
    _load(network, settings.checkpoint)
    config = network.pretrained_cfg
    return ImageTeacher(network, tuple(config["input_size"][1:]), config["mean"], config["std"])


def _open_clip_teacher(settings: TeacherSettings) -> ImageTeacher:
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
    tower = clip.visual
    _load(tower, settings.checkpoint, "visual.")
    if hasattr(tower, "trunk"):  # a timm network behind a projection: its tokens, not their pool
        network = tower.trunk
        network.reset_classifier(0, "")
    else:
        network = tower
        network.output_tokens = True
    return ImageTeacher(network, _pair(tower.image_size), tower.image_mean, tower.image_std)


def _local_teacher(settings: TeacherSettings) -> nn.Module:
    module, _, attribute = settings.name.partition(":")
    teacher = getattr(importlib.import_module(module), attribute)()
    if not isinstance(teacher, nn.Module) or not hasattr(teacher, "width"):
        raise TypeError("it did not return an ImageTeacher or another module with .width, see models/targets.py")
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


class FeatureDecoder(nn.Module):
    """A decoder of mask tokens whose targets are a frozen teacher's features at the masked places.

    The teacher sees the first frame of every tubelet. It is held outside the module tree: it is neither trained nor
    saved with the model, and a loaded model only loads it when a loss is asked for.
    """

    def __init__(self, model: ModelSettings, encoder: Encoder, teacher: Any, seed: int) -> None:
        super().__init__()
        self.settings, self.model = model.teacher, model
        self._teacher = [teacher] if teacher is not None else []
        width = self.teacher.width if model.teacher.width is None else model.teacher.width
        with seeded(seed):
            settings = model.model_copy(update={"decoder_depth": model.teacher.depth, "decoder_class": False})
            self.decoder = Decoder(
                settings, encoder.width, encoder.depth, encoder.shape, outputs=width, inputs=None, timestep="none"
            )

    @property
    def teacher(self) -> Any:
        """The frozen network, built when first needed."""
        if not self._teacher:
            self._teacher.append(load_teacher(self.settings))
        return self._teacher[0]

    @torch.no_grad()
    def targets(self, clips: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Layer-normalised teacher features on our grid: clips (B, C, T, H, W), normalised -> (B, N, F)."""
        self._teacher[:] = [self.teacher.to(clips.device)]
        mean, std = (torch.tensor(v, device=clips.device).view(1, 3, 1, 1) for v in PIXEL_NORMS[self.model.pixel_norm])
        frames = clips[:, :, :: self.model.tubelet].transpose(1, 2).flatten(0, 1)  # (B * T/t, C, H, W)
        frames = (frames * std + mean).clamp(0, 1)
        grid = self.teacher(frames).float()  #                                     (B * T/t, h * w, F) or (.., F, h, w)
        if grid.dim() == 3:
            side = math.isqrt(grid.shape[1])
            if side**2 != grid.shape[1]:
                raise UsageError(
                    f"model.teacher gives {grid.shape[1]} tokens, which are no square grid; a teacher of another grid "
                    "must return a map (B, width, h, w), and one with a class token must drop it."
                )
            grid = grid.transpose(1, 2).unflatten(2, (side, side))  #                (B * T/t, F, h, w)
        if grid.shape[2:] != shape[1:]:
            grid = F.interpolate(grid, shape[1:], mode="bicubic", antialias=True)
        tokens = grid.flatten(2).transpose(1, 2).unflatten(0, (-1, shape[0])).flatten(1, 2)  # (B, N, F)
        return F.layer_norm(tokens, tokens.shape[-1:])

    def loss(self, clips: Tensor, encoding: Encoding, index: Tensor, valid: Tensor | None) -> Tensor:
        """Weighted squared error (B,) at the masked places index (B, K), where valid."""
        mask = encoding.mask
        wanted = gather_tokens(self.targets(clips, mask.shape), index)  # (B, K, F)
        features = encoding.features
        predicted = self.decoder(
            None, None, index, valid, mask.shape, encoding.latents, features, mask.visible, encoding.valid
        )
        error = (predicted.float() - wanted).square().mean(2)  #           (B, K)
        if valid is not None:
            return self.settings.weight * (error * valid).sum(1) / valid.sum(1).clamp(min=1)
        return self.settings.weight * error.mean(1)
