"""How the view moves between the frames of a shot, from what is visible in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import cv2
import numpy as np

POINTS = 600
"""Corners that are followed from a frame to the next."""
LEAST_POINTS = 12
"""Followed corners that a motion must rest on."""
LEAST_SHARE = 0.2
"""Share of the followed corners that must agree with one motion."""
REACH = (15, 15)
"""Pixels around a corner by which it is recognised."""
INLIER = 1.0
"""Pixels by which a corner may miss the common motion."""
ALIKE = 0.5
"""Correlation of two aligned frames from which on they show the same scene."""


STANDS = 0.95
"""Share of the difference between aligned frames that must be left without motion for the view to stand still."""
MISFIT = 12
"""Difference of grey beyond which a pixel shows something else."""


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenCV on one thread: its DIS flow gives other values for another number of them."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def ellipse(radius: int) -> np.ndarray:
    """A disc of this radius in pixels as a structuring element, uint8 (2 radius + 1, 2 radius + 1)."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def look_up(values: np.ndarray, flow: np.ndarray, top: int = 0, left: int = 0) -> np.ndarray:
    """Values (H, W) or (H, W, C) at the places to which a flow (h, w, 2) of the box at `top`, `left` leads; 0 outside
    of them."""
    height, width = flow.shape[:2]
    grid = np.meshgrid(np.arange(left, left + width, dtype=np.float32), np.arange(top, top + height, dtype=np.float32))
    return cv2.remap(values, grid[0] + flow[..., 0], grid[1] + flow[..., 1], cv2.INTER_LINEAR)


class View:
    """A frame of the window.

    Args:
        number: of the frame in the video.
        rgb: uint8 (H, W, 3); what is hidden in it is not read.
        hidden: bool (H, W).
    """

    def __init__(self, number: int, rgb: np.ndarray, hidden: np.ndarray) -> None:
        self.number, self.rgb, self.hidden = number, rgb, hidden

    @cached_property
    def grey(self) -> np.ndarray:
        """uint8 (H, W), the hidden part filled smoothly from around it."""
        grey = cv2.cvtColor(self.rgb, cv2.COLOR_RGB2GRAY)
        if not self.hidden.any():
            return grey
        smooth = spread(grey[..., None].astype(np.float32), (~self.hidden).astype(np.float32))[..., 0]
        return np.where(self.hidden, smooth + 0.5, grey).astype(np.uint8)

    @cached_property
    def covered(self) -> np.ndarray:
        """uint8 (H, W): 255 where a pixel or a neighbour is hidden, as cubic interpolation reads them, else 0."""
        return cv2.dilate(self.hidden.view(np.uint8) * np.uint8(255), np.ones((3, 3), np.uint8))

    @cached_property
    def corners(self) -> np.ndarray:
        """Corners worth following, away from what is hidden: float32 (N, 1, 2), x and y."""
        shown = cv2.erode((~self.hidden).astype(np.uint8), np.ones((9, 9), np.uint8), borderValue=1)
        found = cv2.goodFeaturesToTrack(self.grey, POINTS, 0.005, 5, mask=shown)
        return np.zeros((0, 1, 2), np.float32) if found is None else found.reshape(-1, 1, 2)


def spread(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Continue values smoothly into where their weight is 0, from coarse to fine.

    Args:
        values: float32 (H, W, C), read where the weight is above 0.
        weight: float32 (H, W), from 0 to 1.

    Returns:
        float32 (H, W, C): the values where the weight is 1, a mean of the nearest ones where it is 0.
    """
    mass = values * weight[..., None]
    height, width = weight.shape
    if min(height, width) <= 2:
        total = max(float(weight.sum()), 1e-6)
        mean = mass.sum((0, 1)) / total
        return mass + (1 - weight[..., None]) * mean
    size = ((width + 1) // 2, (height + 1) // 2)
    less_mass = cv2.pyrDown(mass, dstsize=size).reshape(size[1], size[0], -1)
    less = cv2.pyrDown(weight, dstsize=size)
    full = np.minimum(1, 2 * less)  # a cell that is half covered is known
    coarse = spread(less_mass / np.maximum(less, 1e-6)[..., None], full)
    fine = cv2.pyrUp(coarse, dstsize=(width, height)).reshape(height, width, -1)
    return mass + (1 - weight[..., None]) * fine


def neighbour_motion(a: View, b: View) -> np.ndarray | None:
    """Where the points of a frame lie in another of the same shot: a homography float64 (3, 3), or None at a cut."""
    tracks = follow(a, b)
    motion = None if tracks is None else fit_motion(*tracks, a.hidden.shape)
    still = np.eye(3)
    if motion is not None and _alike(a, b, motion) > ALIKE:
        # corners gather on things that move before a plain wall: pixels tell whether the view does
        stands = not np.array_equal(motion, still) and _misfit(a, b, still) < STANDS * _misfit(a, b, motion)
        return still if stands else motion
    return still if _alike(a, b, still) > (1 + ALIKE) / 2 else None


def follow(a: View, b: View) -> tuple[np.ndarray, np.ndarray] | None:
    """Corners of a frame and where they are in another, both float32 (N, 2); None where too few are found.

    Lucas and Kanade's method in pyramids, there and back: what does not return to its place is dropped.
    """
    points = a.corners
    if len(points) < LEAST_POINTS:
        return None
    found, good, _ = cv2.calcOpticalFlowPyrLK(a.grey, b.grey, points, points.copy(), winSize=REACH, maxLevel=4)
    back, _, _ = cv2.calcOpticalFlowPyrLK(
        b.grey, a.grey, found, points.copy(), winSize=REACH, maxLevel=4, flags=cv2.OPTFLOW_USE_INITIAL_FLOW
    )
    height, width = b.hidden.shape
    place = np.rint(found[:, 0]).astype(int)
    kept = (place >= 0).all(1) & (place[:, 0] < width) & (place[:, 1] < height)
    kept &= (good[:, 0] > 0) & (np.abs(back - points)[:, 0].max(1) < 0.5)
    kept[kept] = ~b.hidden[place[kept, 1], place[kept, 0]]
    if kept.sum() < max(LEAST_POINTS, LEAST_SHARE * len(points)):
        return None
    return points[kept, 0], found[kept, 0]


def fit_motion(p: np.ndarray, q: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """The common motion of points p to q, float32 (N, 2) each: a homography float64 (3, 3), or None.

    Of no motion, a shift, a similarity, an affine map and a homography, the simplest that explains the points is taken
    (Bayesian information criterion): a still camera stays exactly still, and few points bend nothing.
    """
    full, agree = cv2.findHomography(p, q, cv2.USAC_MAGSAC, INLIER, maxIters=2000, confidence=0.999)
    if full is None or agree is None:
        return None
    agree = agree[:, 0] > 0
    if agree.sum() < max(LEAST_POINTS, LEAST_SHARE * len(p)):
        return None
    p, q = p[agree].astype(np.float64), q[agree].astype(np.float64)
    moved = np.median(q - p, axis=0)
    models = [(0, np.eye(3)), (2, np.array([[1, 0, moved[0]], [0, 1, moved[1]], [0, 0, 1]]))]
    similar, _ = cv2.estimateAffinePartial2D(p, q, method=cv2.LMEDS, refineIters=10)
    if similar is not None:
        models.append((4, np.vstack([similar, [0, 0, 1]])))
    affine, *_ = np.linalg.lstsq(np.column_stack([p, np.ones(len(p))]), q, rcond=None)
    models.append((6, np.vstack([affine.T, [0, 0, 1]])))
    if sane(full, size):
        models.append((8, full))
    errors = [np.linalg.norm(_moved(p, model) - q, axis=1) for _, model in models]
    noise = max(0.08, 1.2 * min(float(np.median(error)) for error in errors))
    costs = [
        float(np.minimum((error / noise) ** 2, 9).sum()) + free * np.log(len(p))
        for error, (free, _) in zip(errors, models, strict=True)
    ]
    best = models[int(np.argmin(costs))][1]
    return best if sane(best, size) else None


def sane(motion: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether a homography maps a frame of (H, W) to a shape that a camera could have seen."""
    height, width = size
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    scale = np.column_stack([corners, np.ones(4)]) @ motion[2]
    if not np.isfinite(motion).all() or (scale < 0.4).any() or (scale > 2.5).any():
        return False
    area = cv2.contourArea(_moved(corners, motion).astype(np.float32), oriented=True) / (height * width)
    return 0.2 < abs(area) < 5 and cv2.contourArea(corners.astype(np.float32), oriented=True) * area > 0


def _moved(points: np.ndarray, motion: np.ndarray) -> np.ndarray:
    return cv2.perspectiveTransform(points[:, None], motion)[:, 0]


def _misfit(a: View, b: View, motion: np.ndarray) -> float:
    """Mean difference of grey of two aligned frames where both are seen, each pixel's up to MISFIT."""
    height, width = a.hidden.shape
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    other = cv2.warpPerspective(b.grey, motion, (width, height), flags=flags)
    covered = cv2.warpPerspective(b.covered, motion, (width, height), flags=flags, borderValue=255)
    both = (covered == 0) & (a.covered == 0)
    if not both.any():
        return float(MISFIT)
    return float(np.minimum(cv2.absdiff(a.grey, other), MISFIT)[both].mean())


def _alike(a: View, b: View, motion: np.ndarray) -> float:
    """Correlation of what two aligned frames both show, from -1 to 1; light and contrast may differ."""
    height, width = a.hidden.shape
    step = max(1, min(height, width) // 60)
    size = (width // step, height // step)
    shrink = np.diag([1 / step, 1 / step, 1.0])
    small = shrink @ motion @ np.linalg.inv(shrink)
    one = cv2.resize(a.grey, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    two = cv2.resize(b.grey, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    shown = [1 - cv2.resize(view.hidden.astype(np.float32), size, interpolation=cv2.INTER_AREA) for view in (a, b)]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    two = cv2.warpPerspective(two, small, size, flags=flags)
    both = (shown[0] > 0.99) & (cv2.warpPerspective(shown[1], small, size, flags=flags) > 0.99)
    if both.sum() < 32:
        return 0.0
    x, y = one[both] - one[both].mean(), two[both] - two[both].mean()
    spread_ = float(np.sqrt((x * x).mean() * (y * y).mean()))
    return float((x * y).mean() / (spread_ + 4))  # flat pictures (black ones) are alike to nothing
