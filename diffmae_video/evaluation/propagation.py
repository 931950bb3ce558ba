"""Objects followed by a frozen encoder: labels of the first frame go from patch to similar patch, frame by frame.

The protocol is DINO's on DAVIS 2017 (arXiv 2104.14294, section 4.2.2), which SiamMAE (arXiv 2305.14344) keeps. Nothing
is trained. The measures are DAVIS's: J, the overlap of regions, and F, the agreement of contours (Perazzi et al. 2016).

Letters beside those of docs/architecture.md: `R` frames that labels are taken from, `K` objects with the background.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmae_video.config import PropagateSettings

BOUND = 0.008
"""Contours agree within this share of the frame's diagonal."""


@dataclass(frozen=True)
class Grid:
    """Features of one frame: unit length, float (h, w, D)."""

    features: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.features.shape[0], self.features.shape[1]


def propagate(
    frames: Iterable[Tensor],
    first: np.ndarray,
    describe: Callable[[Tensor], Tensor],
    settings: PropagateSettings,
) -> Iterator[np.ndarray]:
    """Masks of all frames from that of the first.

    Args:
        frames: uint8 (C, H, W) each, of one size.
        first: integer (H, W), the mask of the first frame: 0 is background, objects count from 1.
        describe: a frame uint8 (C, H, W) -> its features (h, w, D); they are normalised here.
        settings: memory, top, radius, temperature.

    Yields:
        integer masks (H, W) like `first`, the first one itself first.
    """
    yield first
    size, count = first.shape, int(first.max()) + 1
    coming = iter(frames)
    start = Grid(F.normalize(describe(next(coming)), dim=-1))
    labels = _to_grid(first, count, start.shape).to(start.features.device)
    memory: deque[tuple[Grid, Tensor]] = deque(maxlen=settings.memory)
    near = neighbourhood(start.shape, settings.radius, start.features.device)
    known = (start, labels)
    for frame in coming:
        grid = Grid(F.normalize(describe(frame), dim=-1))
        labels = transfer(grid, [known, *memory], near, settings)
        memory.append((grid, labels))
        yield _to_mask(labels, size)


def transfer(
    grid: Grid, sources: Sequence[tuple[Grid, Tensor]], near: Tensor | None, settings: PropagateSettings
) -> Tensor:
    """Soft labels (K, h, w) of a frame from frames with labels.

    Each patch takes the mean label of the `top` most similar patches of all sources together, weighted by
    exp(cosine / temperature).

    Args:
        sources: grids and their labels (K, h, w).
        near: bool (N, N), which patches of a source each patch may look at; None for all.
    """
    features = grid.features.flatten(0, 1)  # (N, D)
    similar = torch.cat([features @ source.features.flatten(0, 1).T for source, _ in sources], dim=1)  # (N, R N)
    if near is not None:
        similar = similar.masked_fill(~near.repeat(1, len(sources)), -torch.inf)
    top, index = similar.topk(min(settings.top, similar.shape[1]), dim=1)  # (N, top)
    weights = (top / settings.temperature).softmax(dim=1)
    labels = torch.cat([labels.flatten(1) for _, labels in sources], dim=1)  # (K, R N)
    return (labels[:, index] * weights).sum(dim=-1).unflatten(1, grid.shape)


def neighbourhood(shape: tuple[int, int], radius: int, device: torch.device) -> Tensor | None:
    """bool (N, N): which patches lie within `radius` rows and columns of each; None where all do (radius 0)."""
    if not radius:
        return None
    row, column = (
        axis.flatten()
        for axis in torch.meshgrid(*(torch.arange(count, device=device) for count in shape), indexing="ij")
    )
    near = (row[:, None] - row).abs() <= radius
    return near & ((column[:, None] - column).abs() <= radius)


def _to_grid(mask: np.ndarray, count: int, shape: tuple[int, int]) -> Tensor:
    """One-hot labels (K, h, w) of a mask (H, W): of the pixel in the middle of each patch."""
    small = F.interpolate(torch.from_numpy(mask.astype(np.float32))[None, None], shape, mode="nearest-exact")[0, 0]
    return F.one_hot(small.long(), count).permute(2, 0, 1).float()


def _to_mask(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Integer mask (H, W): soft labels enlarged, each object's stretched to 0..1 first, the highest wins."""
    large = F.interpolate(labels[None].float(), size, mode="bilinear", align_corners=False)[0]  # (K, H, W)
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    spread = (high - low).clamp_min(1e-12)
    return torch.where(high > 0, (large - low) / spread, large).argmax(dim=0).cpu().numpy()


def region_similarity(found: np.ndarray, true: np.ndarray) -> float:
    """J: intersection over union of two masks bool (H, W); 1 where both are empty."""
    union = np.logical_or(found, true).sum()
    return float(np.logical_and(found, true).sum() / union) if union else 1.0


def contour_accuracy(found: np.ndarray, true: np.ndarray, bound: float = BOUND) -> float:
    """F: harmonic mean of the shares of each mask's contour that lie near the other's.

    Args:
        found, true: bool (H, W).
        bound: how near, as a share of the diagonal; rounded up to whole pixels.
    """
    radius = int(np.ceil(bound * np.hypot(*found.shape)))
    contours = _contour(found), _contour(true)
    counts = [int(contour.sum()) for contour in contours]
    if not all(counts):
        return 1.0 if not any(counts) else 0.0
    rows, columns = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(np.uint8)
    wide = [cv2.dilate(contour.astype(np.uint8), disk) > 0 for contour in contours]
    precision = (contours[0] & wide[1]).sum() / counts[0]
    recall = (contours[1] & wide[0]).sum() / counts[1]
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _contour(mask: np.ndarray) -> np.ndarray:
    """Pixels whose neighbour to the right, below, or between both is of the other kind."""
    mask = mask.astype(bool)
    edge = np.zeros_like(mask)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def score(found: Sequence[np.ndarray], true: Sequence[np.ndarray | None]) -> dict[int, tuple[float, float]]:
    """J and F of each object of a video, means over the frames between the first and the last, as DAVIS counts.

    Args:
        found: integer masks (H, W) of all frames.
        true: the same from people; None where a frame has none.

    Returns:
        object -> (J, F); objects are those of the first true mask.
    """
    assert true[0] is not None
    inner = [(a, b) for a, b in zip(found[1:-1], true[1:-1], strict=True) if b is not None]
    scores = {}
    for number in (one for one in np.unique(true[0]).tolist() if one):
        pairs = [(a == number, b == number) for a, b in inner]
        regions = [region_similarity(a, b) for a, b in pairs]
        contours = [contour_accuracy(a, b) for a, b in pairs]
        scores[int(number)] = (float(np.mean(regions)), float(np.mean(contours))) if pairs else (np.nan, np.nan)
    return scores
