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

if TYPE_CHECKING:
    from diffmae_video.models.diffmae import Encoding


class ImageTeacher(nn.Module):
    """A frozen image network as a token grid: pixels in [0, 1] (B, C, H, W) -> (B, h * w, F).

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
        with torch.no_grad():
            self.width = self(torch.zeros(1, 3, *size)).shape[-1]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in [0, 1] -> tokens (B, h * w, F), a square grid."""
        images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        features = self.network((images - self.mean) / self.std)
        if isinstance(features, tuple | list):  # open_clip: (pooled, tokens)
            features = features[-1]
        if features.dim() == 4:
            return features.flatten(2).transpose(1, 2)
        side = math.isqrt(features.shape[1])
        return features[:, features.shape[1] - side**2 :]

    def train(self, mode: bool = True) -> ImageTeacher:
        """Always in evaluation mode."""
        return super().train(False)


def load_teacher(settings: TeacherSettings) -> ImageTeacher:
    """Build the teacher a recipe names: timm or open_clip by name, or a local callable that returns an ImageTeacher.

    Raises:
        UsageError: the library is missing, the name is unknown, or the callable returns something else.
    """
    if settings.source == "timm":
        try:
            network = timm.create_model(
                settings.name, pretrained=settings.checkpoint is None, num_classes=0, global_pool=""
            )
        except (RuntimeError, OSError) as error:
            raise UsageError(
                f"model.teacher {settings.name}: {error}; give a timm name, and offline model.teacher.checkpoint."
            ) from error
        _load(network, settings.checkpoint)
        config = network.pretrained_cfg
        return ImageTeacher(network, tuple(config["input_size"][1:]), config["mean"], config["std"])
    if settings.source == "open_clip":
        try:
            import open_clip
        except ImportError as error:
            raise UsageError(
                "model.teacher.source = open_clip needs open_clip: pip install diffmae-video[clip]."
            ) from error
        name, _, tag = settings.name.partition(":")
        network = open_clip.create_model(name, pretrained=None if settings.checkpoint else tag or None).visual
        _load(network, settings.checkpoint)
        network.output_tokens = True
        return ImageTeacher(network, _pair(network.image_size), network.image_mean, network.image_std)
    module, _, attribute = settings.name.partition(":")
    try:
        teacher = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(
            f"model.teacher.name = {settings.name}: {error}; write it as package.module:callable."
        ) from error
    if not isinstance(teacher, nn.Module) or not hasattr(teacher, "width"):
        raise UsageError(f"model.teacher.name = {settings.name} did not return an ImageTeacher; see models/targets.py.")
    _load(getattr(teacher, "network", teacher), settings.checkpoint)
    return teacher


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _load(network: nn.Module, checkpoint: str | None) -> None:
    if checkpoint is None:
        return
    from diffmae_video.models.importers import read_tensors

    tensors = read_tensors(checkpoint)
    missing, _ = network.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("head.")}, strict=False)
    if missing:
        raise UsageError(f"model.teacher.checkpoint = {checkpoint} lacks {', '.join(missing)}; give the teacher's own.")


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
        grid = self.teacher(
            (frames * std + mean).clamp(0, 1)
        ).float()  #            (B * T/t, h * w, F) or (.., F, h, w)
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
