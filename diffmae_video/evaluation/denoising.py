"""Recognition by generation: the label with which the hidden patches of a clip are denoised best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffmae_video.config import MaskChoice, MaskSettings
from diffmae_video.errors import UsageError
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import grid_shape


class DenoisingClassifier(nn.Module):
    """Classifies clips by the error that a DiffMAE with `model.labels` makes when it is told each label in turn.

    A clip's error under a label is the mean over several draws of mask, timestep and noise, the same draws for every
    label and every clip ("Your Diffusion Model is Secretly a Zero-Shot Classifier", arXiv 2303.16203; there nothing is
    visible). The logit of a label is the log-likelihood of the hidden values of one draw under a normal distribution
    with that mean squared error, its variance that of the best label.

    Args:
        model: trained with labels.
        mask: what is hidden; of a mix, each mask in turn.
        draws: masks and noises per clip.

    Raises:
        UsageError: the model knows no labels, or more than its `model.info` names.
    """

    def __init__(self, model: DiffMAE, mask: MaskSettings, draws: int) -> None:
        super().__init__()
        if not model.settings.labels:
            raise UsageError(
                "--protocol denoise: the checkpoint was trained without labels; take one trained with "
                "--set model.labels=data."
            )
        self.model, self.draws = model, draws
        self.masks: tuple[MaskSettings | MaskChoice, ...] = (mask, *mask.mix)
        self.num_classes = len(model.info.get("classes") or ()) or int(model.settings.labels)
        self.info: dict[str, Any] = model.info

    @torch.no_grad()
    def errors(self, clips: Tensor) -> Tensor:
        """Mean squared error of the hidden values under each label (B, K), for clips (B, C, T, H, W), normalised."""
        model, batch = self.model, len(clips)
        shape = grid_shape(*clips.shape[2:], tubelet=model.tubelet, patch=model.patch)
        total = torch.zeros(batch, self.num_classes, device=clips.device)
        for number in range(self.draws):
            kind = self.masks[number % len(self.masks)]
            mask = make_mask(kind.kind, kind.ratio, shape, [number] * batch).to(clips.device)
            draw = model.draw([number] * batch, mask)
            encoding = model.encode(clips, mask) if model.objective.sees else None
            for label in range(self.num_classes):
                told = draw._replace(label=torch.full((batch,), label, device=clips.device))
                total[:, label] += model(clips, mask, told, encoding=encoding).per_sample.float()
        return total / self.draws

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, K) of clips (B, C, T, H, W), normalised."""
        errors = self.errors(clips)
        shape = grid_shape(*clips.shape[2:], tubelet=self.model.tubelet, patch=self.model.patch)
        tokens = shape[0] * shape[1] * shape[2] * sum(mask.ratio for mask in self.masks) / len(self.masks)
        values = tokens * self.model.patch_values
        return -0.5 * values * errors / errors.amin(1, keepdim=True).clamp(min=1e-12)
