"""What one frame shows of a hole in another: chosen by what surrounds the hole, aligned to it, and judged by it.

Letters: h, w are the sides of a box around a hole, K frames that were chosen. Errors are squared differences of values
from 0 to 255, mean over the three channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from diffmae_video.rendering.motion import View, spread

LEAST_RING = 40
"""Pixels seen in both frames on which an alignment must rest."""
FLOW_LEAST = 24
"""Shortest side of a box in which flow is looked for."""
CAP = 60.0**2
"""Error beyond which no difference is made."""
NOISE = 9.0
"""Error that two frames of a still scene have."""
HAZARD = 6.0
"""Error that each frame of distance adds, since things move that the surroundings do not show."""
SURVEY_HAZARD = 12.0
"""The same before a frame is aligned."""
ROUNDS = 2
"""Times that flow is measured, each after the last was applied."""
FLOW_MOST = 200
"""Longest side of the picture in which flow is measured."""
HELPS = 0.9
"""Share of the error without flow that must be left with it."""
FLOW_MISS = 25
"""Difference of grey beyond which a flow is not believed."""
SOON = 0.03
"""Share of a hole for which a frame is taken because none nearer in time shows it."""
SAMPLED = 3000
"""About so many pixels tell the exposure, and how well frames match."""
LEAST_GAIN = 0.02
"""Frames are added while the logarithm of the precision rises so much."""


class Region:
    """A box of a frame around a hole.

    Args:
        view: the frame.
        box: rows and columns, with room for what surrounds the hole.
    """

    def __init__(self, view: View, box: tuple[slice, slice]) -> None:
        self.view, self.box = view, box
        self.target = view.rgb[box].astype(np.float32)  # (h, w, 3); not read where hidden
        self.hidden = view.hidden[box]
        self.grey = view.grey[box]
        rows, columns = np.mgrid[box]
        self.points = np.stack([columns, rows], -1).astype(np.float32)  # (h, w, 2), x and y in the frame
        self.step = max(1, round(np.sqrt(self.hidden.size) / 64))  # of the coarse grid on which frames are surveyed

        self.size: tuple[int, int] = self.hidden.shape


@dataclass
class Candidate:
    """A frame as the region would see it."""

    distance: int  # frames
    rgb: np.ndarray  # float32 (h, w, 3)
    smooth: np.ndarray  # float32 (h, w, 3), its mean over what is seen in 5 x 5 pixels
    shown: np.ndarray  # bool (h, w)
    error: np.ndarray  # float32 (h, w): that of the surroundings, continued into the hole


def warped(points: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Where points float32 (h, w, 2) lie in another frame."""
    return cv2.perspectiveTransform(points, motion).astype(np.float32, copy=False)


def visible_at(covered: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether a frame shows places (h, w, 2): inside, and no pixel around is `covered`, uint8 (H, W) of 0 and 255."""
    height, width = covered.shape
    covered = cv2.remap(covered, places[..., 0], places[..., 1], cv2.INTER_LINEAR, borderValue=255)
    x, y = places[..., 0], places[..., 1]
    return (covered == 0) & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _read(picture: np.ndarray, places: np.ndarray, interpolation: int) -> np.ndarray:
    """A picture (H, W) or (H, W, 3) at places (h, w, 2), its edge continued."""
    return cv2.remap(picture, places[..., 0], places[..., 1], interpolation, borderMode=cv2.BORDER_REPLICATE)


def survey(region: Region, others: Sequence[tuple[View, np.ndarray]], most: int) -> list[int]:
    """Choose up to `most` frames that together show most of the hole, where the surroundings match best."""
    step = region.step
    hidden = region.hidden[::step, ::step]
    points = np.ascontiguousarray(region.points[::step, ::step])
    grey = region.grey[::step, ::step].astype(np.float32)
    precision = []  # (n, hidden points): 1 / expected error, 0 where the place is not shown
    for other, motion in others:
        places = warped(points, motion)
        shown = visible_at(other.covered, places)
        both = shown & ~hidden
        if both.sum() < LEAST_RING / step or not (shown & hidden).any():
            precision.append(np.zeros(int(hidden.sum()), np.float32))
            continue
        error = _read(other.grey, places, cv2.INTER_LINEAR) - grey
        error -= np.median(error[both])
        error = local_error(error**2, both)
        distance = abs(other.number - region.view.number)
        expected = error[hidden] + NOISE + SURVEY_HAZARD * distance
        precision.append(np.where(shown[hidden], 1 / expected, 0) ** 2)
    chosen: list[int] = []
    table = np.stack(precision) if precision else np.zeros((0, 1), np.float32)
    total = np.full(table.shape[1], 1e-8, np.float32)
    while len(chosen) < most and len(table):
        gains = np.log((total + table) / total).mean(1)
        gains[chosen] = 0
        best = int(gains.argmax())
        if gains[best] < LEAST_GAIN:
            break
        chosen.append(best)
        total += table[best]
    return chosen


def soonest(region: Region, others: Sequence[tuple[View, np.ndarray]], chosen: Sequence[int], most: int) -> list[int]:
    """Up to `most` frames beside the chosen ones that are the nearest in time to show some part of the hole.

    What moves behind the hole is told best by them.

    Args:
        others: nearest first.
    """
    step = region.step
    hidden = region.hidden[::step, ::step]
    points = np.ascontiguousarray(region.points[::step, ::step])
    open_ = hidden.copy()  # not shown by a nearer frame
    found: list[int] = []
    for number, (other, motion) in enumerate(others):
        new = visible_at(other.covered, warped(points, motion)) & open_
        if new.sum() > SOON * hidden.sum():
            open_ &= ~new
            if number not in chosen:
                found.append(number)
        if len(found) == most or open_.sum() <= SOON * hidden.sum():
            break
    return found


def squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean over the channels of the squared difference: float32 (h, w) of float32 (h, w, 3) twice."""
    return cv2.transform((a - b) ** 2, np.full((1, 3), 1 / 3, np.float32))


def local_error(error: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Errors float32 (h, w) known where `both`, capped, averaged over neighbours, and continued into the rest."""
    known = both.astype(np.float32)
    error = cv2.blur(np.where(both, np.minimum(error, CAP), 0).astype(np.float32), (5, 5))
    weight = cv2.blur(known, (5, 5))
    return spread((error / np.maximum(weight, 1e-3))[..., None], known)[..., 0]


def align(region: Region, other: View, motion: np.ndarray) -> Candidate | None:
    """Warp a frame to the region by the motion of the view and a flow that is measured around the hole.

    The flow is measured ROUNDS times, and kept where the surroundings match better with it.

    Returns:
        None where the two frames share too little.
    """
    plain = _Sample(region, other, motion, np.zeros((*region.size, 2), np.float32))
    if plain.count < LEAST_RING:
        return None
    sample = plain
    if min(region.size) >= FLOW_LEAST:
        for _ in range(ROUNDS):
            trial = _Sample(region, other, motion, sample.flow + completed_flow(region, sample))
            if not trial.better(sample):
                break
            sample = trial
    rgb, shown, error = _judged(region, plain)
    if sample is not plain:  # a flow that helps on one side of the hole may do harm on another
        flowing = _judged(region, sample)
        helps = flowing[2] < HELPS * error
        rgb = np.where(helps[..., None], flowing[0], rgb)
        shown, error = np.where(helps, flowing[1], shown), np.where(helps, flowing[2], error)
    known = shown.astype(np.float32)
    smooth = cv2.blur(rgb * known[..., None], (5, 5)) / np.maximum(cv2.blur(known, (5, 5)), 1e-3)[..., None]
    return Candidate(abs(other.number - region.view.number), rgb, smooth, shown, error)


def _judged(region: Region, sample: _Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A sample in the light of the region, where it is seen, and its local error."""
    rgb = sample.rgb + _light(region.target - sample.rgb, sample.both, max(region.size))
    return rgb, sample.shown, local_error(squared_error(rgb, region.target), sample.both)


class _Sample:
    """A frame sampled where the motion and a flow put the region's pixels, with the region's exposure."""

    def __init__(self, region: Region, other: View, motion: np.ndarray, flow: np.ndarray) -> None:
        self.flow = flow
        places = warped(region.points + flow, motion)
        self.rgb = _read(other.rgb, places, cv2.INTER_CUBIC).astype(np.float32)
        # whole pixels are copied as they are; in between, neighbours are read too
        still = not flow.any() and np.array_equal(motion, np.eye(3))
        self.shown = visible_at(other.hidden.view(np.uint8) * np.uint8(255) if still else other.covered, places)
        self.both = self.shown & ~region.hidden
        self.miss, self.count = np.inf, 0
        if self.both.any():
            places = np.flatnonzero(self.both)
            places = places[:: 1 + len(places) // SAMPLED]
            target, rgb = region.target.reshape(-1, 3)[places], self.rgb.reshape(-1, 3)[places]
            gain, bias = exposure(target, rgb)
            self.rgb = self.rgb * gain + bias
            self.miss = float(np.minimum(np.abs(target - rgb * gain - bias), 40).mean())
            self.count = int(self.both.sum())

    def better(self, than: _Sample) -> bool:
        return self.count >= max(LEAST_RING, 0.5 * than.count) and self.miss < 0.97 * than.miss


def exposure(target: np.ndarray, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gain and bias (3,) that bring values (N, 3) to others, without those that do not fit, with a gain near 1."""
    gain, bias = np.ones(3, np.float32), np.median(target - rgb, axis=0)
    for _ in range(2):
        miss = np.abs(rgb * gain + bias - target) @ np.ones(3, np.float32) / 3
        good = miss <= max(4.0, 2 * float(np.median(miss)))
        x, y = rgb[good], target[good]
        x_mean, y_mean = x.mean(0), y.mean(0)
        covariance, variance = ((x - x_mean) * (y - y_mean)).mean(0), ((x - x_mean) ** 2).mean(0)
        gain = np.clip((covariance + 200) / (variance + 200), 0.25, 4.0)
        bias = y_mean - gain * x_mean
    small = np.abs(gain - 1).max() < 0.02 and np.abs(bias + (gain - 1) * 128).max() < 0.7
    return (np.ones(3, np.float32), np.zeros(3, np.float32)) if small else (gain, bias)


def _light(step: np.ndarray, both: np.ndarray, side: int) -> np.ndarray:
    """Slow differences of brightness around the hole, continued into it: float32 (h, w, 3) of a step of that shape."""
    weight = (both & (np.abs(step).max(-1) < 25)).astype(np.float32)
    height, width = both.shape
    size = (max(2, width // 4), max(2, height // 4))
    mass = cv2.resize(step * weight[..., None], size, interpolation=cv2.INTER_AREA)
    share = cv2.resize(weight, size, interpolation=cv2.INTER_AREA)
    sigma = max(1.0, side / 60)
    mass, share = cv2.GaussianBlur(mass, (0, 0), sigma), cv2.GaussianBlur(share, (0, 0), sigma)
    coarse = spread(mass / np.maximum(share, 1e-3)[..., None], np.minimum(1, 2 * share))
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def completed_flow(region: Region, sample: _Sample) -> np.ndarray:
    """Flow float32 (h, w, 2) from the region to a sample, measured where both are seen and continued into the rest.

    It is smooth, so that in large regions a smaller picture is enough.
    """
    height, width = region.size
    share = min(1.0, FLOW_MOST / max(height, width))
    size = (round(width * share), round(height * share))

    def small(picture: np.ndarray) -> np.ndarray:
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if share < 1 else picture

    grey = small(cv2.cvtColor(np.clip(sample.rgb, 0, 255).astype(np.uint8), cv2.COLOR_RGB2GRAY))
    hidden, shown = (small(part.view(np.uint8) * np.uint8(255)) > 0 for part in (region.hidden, ~sample.shown))
    shown = ~shown
    known, both = ~hidden | shown, ~hidden & shown
    base = np.where(hidden, grey, small(region.grey))
    smooth = spread(base[..., None].astype(np.float32), known.astype(np.float32))[..., 0]
    base = np.where(known, base, smooth).astype(np.uint8)
    other = np.where(shown, grey, base)
    flow = np.zeros((*base.shape, 2), np.float32)  # to start from
    flow = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM).calc(base, other, flow)
    rows, columns = np.mgrid[: size[1], : size[0]].astype(np.float32)
    moved = _read(other, np.stack([columns, rows], -1) + flow, cv2.INTER_LINEAR)
    good = both & (cv2.absdiff(moved, base) < FLOW_MISS)
    good = cv2.erode(good.view(np.uint8), np.ones((3, 3), np.uint8), borderValue=1)
    if good.sum() < LEAST_RING:
        return np.zeros((height, width, 2), np.float32)
    flow = cv2.GaussianBlur(spread(flow, good.astype(np.float32)), (0, 0), 1.5)
    return cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR) / np.float32(share) if share < 1 else flow
