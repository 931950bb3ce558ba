"""The second decoder, which predicts a frozen teacher's token features (DiffMAE's CLIP target).

The paper's teacher, layer and loss are not public; our choice: last-layer patch tokens, layer-normalised, and squared
error.
F is the width of the teacher.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmae_video.config import ModelSettings
from diffmae_video.errors import UsageError
from diffmae_video.models.decoder import Decoder, Encoding
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.layers import seeded
from diffmae_video.models.patches import PIXEL_NORMS, gather_tokens, masked_mean
from diffmae_video.models.teachers import load_teacher


class FeatureDecoder(nn.Module):
    """A decoder of mask tokens whose targets are a frozen teacher's features at the masked places.

    The teacher sees the first frame of every tubelet. It is held outside the module tree: it is neither trained nor
    saved with the model.

    Args:
        model: settings with a teacher.
        encoder: whose tokens the decoder reads.
        teacher: the frozen network; built from the settings when it is first needed, if None.
        seed: of the initial weights.
    """

    def __init__(self, model: ModelSettings, encoder: Encoder, teacher: Any, seed: int) -> None:
        super().__init__()
        assert model.teacher is not None
        self.settings, self.model = model.teacher, model
        self.detached = False  # a model from a file does not build the teacher that the file names
        self._teacher = [teacher] if teacher is not None else []
        width = model.teacher.width or self.teacher.width
        own = {"decoder_depth": model.teacher.depth, "decoder_class": False, "decoder_class_position": False}
        own |= {"labels": 0}  # a teacher's features are those of the clip, whatever label is asked for
        settings = model.model_copy(update=own)
        with seeded(seed):
            self.decoder = Decoder(settings, encoder, outputs=width, inputs=None, timestep="none")

    @property
    def teacher(self) -> Any:
        """The frozen network, built when first needed.

        Raises:
            UsageError: the model comes from a file, and nobody has given it its teacher.
        """
        if not self._teacher and self.detached:
            raise UsageError(
                "This model was loaded without its teacher: call model.feature_decoder.use_teacher(network), with "
                "load_teacher(model.settings.teacher) if you trust what its model.json names."
            )
        if not self._teacher:
            self._teacher.append(load_teacher(self.settings))
        return self._teacher[0]

    def use_teacher(self, teacher: Any) -> None:
        """Predict this network's features."""
        self._teacher[:] = [teacher]  # in a list, which hides it from the module tree

    @torch.no_grad()
    def targets(self, clips: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Layer-normalised teacher features on our grid: clips (B, C, T, H, W), normalised -> (B, N, F)."""
        self.use_teacher(self.teacher.to(clips.device))
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
        predicted = self.decoder(None, None, index, valid, encoding)  #   (B, K, F)
        error = F.mse_loss(predicted.float(), wanted, reduction="none").mean(2)  # (B, K)
        return self.settings.weight * masked_mean(error, valid)
