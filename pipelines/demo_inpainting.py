"""The demo's table of inpainting: PSNR on masked pixels of validation clips, DiffMAE beside plain fillings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffmae_video.pipelines import console

if TYPE_CHECKING:
    from torch import Tensor

    from diffmae_video.config import RenderSettings
    from diffmae_video.masking import Mask

METHODS = {
    "copy": "copy of the nearest visible frame",
    "mean": "mean of the visible pixels",
    "opencv": "OpenCV inpainting (Telea), frame by frame",
    "one_step": "DiffMAE, one step",
    "sampled": "DiffMAE, sampled",
}
"""Key -> what it is, baselines first."""


def inpainting_table(
    checkpoint: Path,
    data: Path,
    render: RenderSettings,
    *,
    masks: Sequence[str],
    clips: int,
    seed: int,
    device: str,
) -> dict[str, dict[str, float]]:
    """Fill the same masks by every method.

    Args:
        checkpoint: pre-training run.
        data: shards; the first clips of the evaluation split are used.
        render: sampler and steps.
        masks: `KIND:RATIO` texts.
        clips: how many.

    Returns:
        Mask -> method -> PSNR in dB over the masked pixels of a clip (all channels, 0..255), mean over the clips.
    """
    import torch

    from diffmae_video.config import read_settings, with_overrides
    from diffmae_video.data.stream import build_stream
    from diffmae_video.masking import make_mask
    from diffmae_video.models.patches import denormalize_pixels, normalize_pixels
    from diffmae_video.models.weights import load_model
    from diffmae_video.pipelines.recipes import pick_device

    place = torch.device(pick_device(device))
    model = load_model(checkpoint).eval().to(place)
    settings = with_overrides(read_settings(checkpoint / "config.toml"), data={"path": str(data), "workers": 0})
    norm = settings.model.pixel_norm
    scores: dict[str, dict[str, list[float]]] = {mask: {name: [] for name in METHODS} for mask in masks}
    stream = build_stream(settings, split=settings.data.eval_split, batch_size=min(16, clips), training=False)
    done = 0
    with console.progress(clips, "inpainting", "clips") as line:
        for batch in stream:
            source = batch.clips[: clips - done]  #                                   uint8 (B, T, C, H, W)
            seeds = [seed * 1_000_003 + done + i for i in range(len(source))]
            for text in masks:
                kind, _, ratio = text.partition(":")
                mask = make_mask(kind, float(ratio), model.encoder.shape, seeds)
                hidden = _pixels(mask, model.tubelet, model.patch)  #                 bool (B, T, H, W)
                known = normalize_pixels(source, norm).to(place)
                filled = plain_fillings(source, hidden)
                for name, steps in (("one_step", 1), ("sampled", render.steps)):
                    with torch.inference_mode():
                        made = model.sample(
                            known, mask.to(place), seeds=seeds, sampler=render.sampler, steps=steps, eta=render.eta
                        )
                    filled[name] = denormalize_pixels(made.cpu(), norm).numpy()
                for name, result in filled.items():
                    scores[text][name] += masked_psnr(source.numpy(), result, hidden)
            done += len(source)
            line.update(len(source))
            if done >= clips:
                break
    stream.close()
    return {text: {name: float(np.mean(values)) for name, values in row.items()} for text, row in scores.items()}


def plain_fillings(clips: Tensor, hidden: np.ndarray) -> dict[str, np.ndarray]:
    """Fill clips uint8 (B, T, C, H, W) where hidden (B, T, H, W) without any model, by each of the baselines."""
    import cv2

    filled: dict[str, list[np.ndarray]] = {"copy": [], "mean": [], "opencv": []}
    for clip, cover in zip(clips.numpy(), hidden, strict=True):
        frames = clip.transpose(0, 2, 3, 1)  #                                        (T, H, W, C)
        seen = ~cover
        mean = np.rint(frames[seen].mean(0)).astype(np.uint8)  #                      (C,)
        filled["mean"].append(np.where(cover[..., None], mean, frames))
        time = np.arange(len(frames))
        distance = np.abs(time[:, None] - time)[..., None, None] + np.where(seen, 0, 10**6)  # (T, T, H, W) to from
        nearest = distance.argmin(1)  #                                               (T, H, W) frame to copy from
        copied = np.take_along_axis(frames, nearest[..., None], 0)
        filled["copy"].append(np.where((cover & ~seen.any(0))[..., None], mean, copied))
        painted = [
            cv2.inpaint(np.ascontiguousarray(frame), part.astype(np.uint8), 3, cv2.INPAINT_TELEA)
            for frame, part in zip(frames, cover, strict=True)
        ]
        filled["opencv"].append(np.stack(painted))
    return {name: np.stack(parts).transpose(0, 1, 4, 2, 3) for name, parts in filled.items()}


def masked_psnr(clips: np.ndarray, filled: np.ndarray, hidden: np.ndarray) -> list[float]:
    """PSNR in dB of each clip over its hidden pixels; clips and filled uint8 (B, T, C, H, W), hidden (B, T, H, W)."""
    square = (clips.astype(np.float64) - filled) ** 2
    error = [float(one.transpose(0, 2, 3, 1)[cover].mean()) for one, cover in zip(square, hidden, strict=True)]
    return [10 * np.log10(255**2 / max(value, 1e-10)) for value in error]


def _pixels(mask: Mask, tubelet: int, patch: int) -> np.ndarray:
    """The token grid of a mask in pixels, bool (B, T, H, W)."""
    grid = mask.grid.numpy().reshape(-1, *mask.shape)
    return grid.repeat(tubelet, 1).repeat(patch, 2).repeat(patch, 3)
