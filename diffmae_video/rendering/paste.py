"""Put what the model painted into a hole of a frame, so that neither colours nor edges show where it begins."""

from __future__ import annotations

import cv2
import numpy as np

FINEST = 256
"""Pixels of the longer side at which a membrane is relaxed; it is smooth, so that a larger one is enlarged."""
SWEEPS = 4
"""Relaxations at each size."""


class Hole:
    """The hidden part of a window, for all pictures that are pasted into it.

    Args:
        hidden: bool (H, W).
        feather: pixels inside the hole over which the colour of the nearest pixel outside fades into the picture; 0
            for a hard edge.
        blend: first spread the step at the edge over the hole (`membrane`).
    """

    def __init__(self, hidden: np.ndarray, feather: int = 2, blend: bool = True) -> None:
        self.hidden, self.blend = hidden, blend
        self.plain = bool(hidden.all()) or not (feather or blend)  # nothing outside, or nothing wanted of it
        if self.plain:
            return
        distance, labels = cv2.distanceTransformWithLabels(
            np.ascontiguousarray(hidden).view(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        labels = np.asarray(labels, dtype=np.int64)
        outside = np.flatnonzero(~hidden)
        nearest = np.zeros(labels.max() + 1, dtype=np.int64)
        nearest[labels.ravel()[outside]] = outside
        self.nearest = nearest[labels]  # (H, W): place of the visible pixel that each is closest to
        self.share = np.minimum(distance / (feather + 1), 1.0)[..., None]  # of the picture, 0 outside
        self.rim = hidden & (distance < 1.5)  # hidden pixels that touch a visible one

    def paste(self, target: np.ndarray, picture: np.ndarray) -> None:
        """Fill the hole of a target with a picture, both uint8 (H, W, 3); no pixel outside the hole changes."""
        if self.plain:
            target[self.hidden] = picture[self.hidden]
            return
        edge = np.take(target.reshape(-1, 3), self.nearest, axis=0).astype(np.float32)
        step = picture - edge
        if self.blend:
            step -= membrane(step, self.rim)
        mixed = (edge + self.share * step + 0.5).clip(0, 255).astype(np.uint8)
        np.copyto(target, mixed, where=self.hidden[..., None])


def membrane(values: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The smoothest surface through given values: Laplace's equation, relaxed from coarse to fine.

    Perez et al. 2003 ("Poisson image editing") paste so: the difference to the surroundings at the edge of the pasted
    part is continued into it and added.

    Args:
        values: float32 (H, W, 3), read where `given`.
        given: bool (H, W).

    Returns:
        float32 (H, W, 3). Given values stay as they are up to FINEST pixels, and about so beyond.
    """
    return _relaxed(np.where(given[..., None], values, np.float32(0)), given.astype(np.float32))


def _relaxed(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`membrane` of sums of values and their weights: a coarse cell stands for the mean of what is given inside it."""
    height, width = weight.shape
    given = weight[..., None] > 0
    values = values / np.maximum(weight, 1e-6)[..., None]
    if max(height, width) <= 2 or given.all():
        mean = values.sum((0, 1)) / max(1, np.count_nonzero(given))
        return np.where(given, values, mean)
    half = ((width + 1) // 2, (height + 1) // 2)
    coarse = _relaxed(
        cv2.resize(values, half, interpolation=cv2.INTER_AREA),
        cv2.resize(given[..., 0].astype(np.float32), half, interpolation=cv2.INTER_AREA),
    )
    surface = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    if max(height, width) > FINEST:
        return surface
    surface = np.where(given, values, surface)
    for _ in range(SWEEPS):
        surface = np.where(given, values, cv2.blur(surface, (3, 3)))
    return surface
