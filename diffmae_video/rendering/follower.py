"""One object from a frame to the next: where it is carried by its motion, and where its edge is.

A dense optical flow is measured there and back (Kroeger et al. 2016, "Fast optical flow using dense inverse search").
The flow of the object's inside and that of what surrounds it are both continued over the edge, and each pixel goes to
the one that explains it better, together with its colour; so nothing of a background that stays behind is dragged
along. The edge is then found again within a narrow band (Rother et al. 2004, "GrabCut"). Where that misses parts of an
object that moves against the scene, such as swinging legs, or drags the scene along, what moves decides (see `moving`).
"""

from __future__ import annotations

import cv2
import numpy as np

from diffmae_video.rendering.motion import View, ellipse, look_up, neighbour_motion, spread

SIDE = 512
"""Longer side of the frames in which an object is followed; larger ones are made smaller, masks larger again."""
BAND, LEAST_BAND, MOST_BAND = 0.07, 2, 9
"""Width on either side in which the edge is looked for: share of the root of the area, and limits in pixels."""
ROOM = 3
"""Bands around the object from which colours of what surrounds it are taken."""
AGREE = 0.75
"""Overlap (intersection over union) of carried and refined mask below which the carried one stays."""
RETURNS = 0.35
"""Share of the object whose flow must lead back to where it came from."""
JUMP = 1.6
"""Largest change of the area between neighbouring frames."""
ALIKE = 0.35
"""Overlap of colour histograms with the marked frame's from which on it is the same object."""
PRIOR, MOTION, COLOUR = 1.0, 1.0, 1.0
"""Weights of where the object was, how it moves, and its colours."""
MISS = 8.0
"""Difference of grey levels between two motions that counts in full."""
SMOOTH = 1.2
"""Pixels over which evidence is smoothed."""
LEAST_AREA = 12
"""Pixels below which an object has gone."""
SUSPECT = 0.6
"""Share of the picture whose flow leads back below which a cut is looked for."""
GONE = 0.5
"""Share of an object at the picture's edge that may be the scene; where it is more, the object has left."""
LEFT = "it leaves the picture or becomes too small"
CUT = "the clip cuts to another shot"
SCENE = 1.5
"""Weight of whether a pixel moves against the scene, where the object does."""
REACH = 0.6
"""Share of the root of the area by which a part of an object that moves against the scene may get ahead of the rest."""
AHEAD, BEHIND = 0.05, 0.1
"""Shares of an object that must be missed, or be part of the scene, for it to be found by what moves."""
MOVES = 0.45
"""Share of the object, less that of its surroundings, that must move against the scene for this to count."""
STILL = 0.15
"""Share of what stands out in a box by its colours that may belong to the scene where something moves in the box."""
BOX_SHARE = (0.08, 0.93)
"""Share of a box that an object found in it may have; otherwise all of the box is the object."""


class Follower:
    """Follows one object from a marked frame, frame by frame in one direction.

    Args:
        rgb: the marked frame, uint8 (H, W, 3).
        hidden: the object in it, bool (H, W).
        moving: what moves against the scene in it, see `moving.Scene`: float32 (H, W).

    Attributes:
        lost: why it was lost, in words; None while it is followed.
    """

    def __init__(self, rgb: np.ndarray, hidden: np.ndarray, moving: np.ndarray) -> None:
        self.rgb, self.hidden, self.moving = rgb, hidden, moving
        self.lost: str | None = None
        self.flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        if max(hidden.shape) <= SIDE // 2:
            self.flow.setFinestScale(0)
        self.colours, self.around = histogram(rgb, hidden), histogram(rgb, _ring(hidden))

    def step(self, rgb: np.ndarray, moving: np.ndarray) -> np.ndarray:
        """The object in the next frame: bool (H, W), empty once it is lost.

        Args:
            rgb: the frame, uint8 (H, W, 3).
            moving: what moves against the scene in it, float32 (H, W).
        """
        nothing = np.zeros_like(self.hidden)
        if self.lost or not self.hidden.any():
            return nothing
        before, after = (cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in (self.rgb, rgb))
        still = np.zeros((*after.shape, 2), np.float32)
        back = self.flow.calc(after, before, still.copy())  # where each pixel was, (H, W, 2)
        there = self.flow.calc(before, after, still)
        returns = np.linalg.norm(back + look_up(there, back), axis=2) < 1 + 0.05 * np.linalg.norm(back, axis=2)
        found, lost = self._find(rgb, back, returns, np.zeros_like(moving))
        if lost != CUT and _moves(self.moving, self.hidden):
            also, why = self._find(rgb, back, returns | (moving > 0), moving)
            if not why and (lost or _differs(found, also, moving)):
                found, lost = also, None
        if not lost and at_edge(found) and _still(moving, found) > GONE > _still(self.moving, self.hidden):
            lost = LEFT
        self.lost = lost
        if lost:
            return nothing
        self.rgb, self.hidden, self.moving = rgb, found, moving
        return found

    def _find(
        self, rgb: np.ndarray, back: np.ndarray, returns: np.ndarray, moving: np.ndarray
    ) -> tuple[np.ndarray, str | None]:
        """The object in a new frame bool (H, W), and why it is lost; see `_weigh`."""
        inside = self._weigh(rgb, back, returns, moving)
        lost = self._missing(rgb, inside, returns)
        if lost:
            return inside, lost
        found = inside if moving.any() else refine(rgb, inside)
        return found, self._changed(rgb, found)

    def _missing(self, rgb: np.ndarray, inside: np.ndarray, returns: np.ndarray) -> str | None:
        """Why the object cannot have been carried to where it seems to be."""
        if returns.mean() < SUSPECT and neighbour_motion(View(0, self.rgb, self.hidden), View(1, rgb, inside)) is None:
            return CUT
        if inside.sum() < LEAST_AREA:
            return LEFT
        if returns[inside].mean() < RETURNS:
            return "it is covered or moves too fast"
        return None

    def _changed(self, rgb: np.ndarray, refined: np.ndarray) -> str | None:
        """Why what was found is not the object."""
        change = refined.sum() / max(1, self.hidden.sum())
        if not 1 / JUMP < change < JUMP and not at_edge(refined):
            return "its size jumps"
        if overlap(self.colours, histogram(rgb, refined)) < ALIKE:
            return "its colours are no longer those that were marked"
        return None

    def _weigh(self, rgb: np.ndarray, back: np.ndarray, returns: np.ndarray, moving: np.ndarray) -> np.ndarray:
        """Which pixels of a new frame are the object's: bool (H, W).

        Motion and colours of the object's inside and of what surrounds it are held against each other, and whether
        other frames show the scene there.

        Args:
            rgb: the new frame, uint8 (H, W, 3).
            back: where each of its pixels was, float32 (H, W, 2).
            returns: bool (H, W), where the flow back and forth meets.
            moving: what moves against the scene, float32 (H, W); 0 where that says nothing.
        """
        soft = self.hidden.astype(np.float32)
        carried = look_up(soft, back) > 0.5
        if carried.sum() < LEAST_AREA:
            return carried
        disc = _disc(carried)
        grown = cv2.dilate(carried.view(np.uint8), disc) > 0
        reach = disc
        if moving.any():
            reach = ellipse(int(REACH * np.sqrt(carried.sum())))
        box = _box(grown, 2 * len(disc) + len(reach) // 2)
        core = (cv2.erode(carried.view(np.uint8), disc, borderValue=1) > 0) & returns
        if core.sum() < LEAST_AREA:
            core = carried & returns
        core = _of_one_motion(core, back)
        if not core.any():
            return carried
        back, top, left = back[box], box[0].start, box[1].start
        own = spread(back, core[box].astype(np.float32))
        other = spread(back, (returns & ~grown)[box].astype(np.float32))
        new, old = rgb[box].astype(np.float32), self.rgb.astype(np.float32)
        misses = []
        for flow in (own, other):
            miss = np.abs(look_up(old, flow, top, left) - new).mean(2)
            misses.append(cv2.GaussianBlur(miss, (0, 0), 1.0))
        motion = ((misses[1] - misses[0]) / MISS).clip(-1, 1)
        colour = _ratio(rgb[box], self.colours, 0.5 * (self.around + histogram(rgb, _ring(carried))))
        before = 2 * look_up(soft, own, top, left) - 1
        scene = moving[box]
        # what looks like the object and like the scene may be either
        scene = np.where(scene > 0, scene, scene * (1 - np.maximum(colour, 0)))
        # what joins the object from farther away has its colours
        scene = np.where((scene > 0) & ~grown[box], scene * (1 + 2 * colour).clip(0, 1), scene)
        weighed = PRIOR * before + MOTION * motion + COLOUR * colour + SCENE * scene
        evidence = cv2.GaussianBlur(weighed, (0, 0), SMOOTH)
        result = np.zeros_like(carried)
        result[box] = evidence > 0
        result &= cv2.dilate(grown.view(np.uint8), reach) > 0
        return _touching(result, carried) if moving.any() else result


def refine(rgb: np.ndarray, carried: np.ndarray) -> np.ndarray:
    """Find the edge of an object again, near where it is carried to.

    Args:
        rgb: uint8 (H, W, 3).
        carried: bool (H, W).

    Returns:
        bool (H, W); `carried` itself where colours do not tell the object from what surrounds it.
    """
    disc = _disc(carried)
    grown = cv2.dilate(carried.view(np.uint8), disc)
    box = _box(grown > 0, ROOM * len(disc) // 2)
    inner = cv2.erode(carried.view(np.uint8), disc, borderValue=1)[box] > 0
    part, outer = carried[box], grown[box] == 0
    if not inner.any() or not outer.any():
        return carried
    labels = np.where(part, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[inner], labels[outer] = cv2.GC_FGD, cv2.GC_BGD
    found = _grab_cut(rgb[box], labels, 1)
    found = cv2.medianBlur(found.astype(np.uint8), 5) > 0
    if (found & part).sum() < AGREE * (found | part).sum():
        return carried
    result = np.zeros_like(carried)
    result[box] = found
    return result


def object_in_box(rgb: np.ndarray, hidden: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """The object that a box was drawn around.

    Args:
        rgb: uint8 (H, W, 3).
        hidden: the box, bool (H, W).
        moving: what moves against the scene, float32 (H, W).

    Returns:
        bool (H, W) inside the box; the box itself where nothing stands out in it.
    """
    rows, columns = _box(hidden, 0)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    box = _box(hidden, max(8, min(height, width) // 2))
    part = hidden[box]
    if part.all() or min(height, width) < 8:
        return hidden
    labels = np.where(part, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    found = _grab_cut(rgb[box], labels.copy(), 5) & part
    moves = (moving[box] > 0) & part
    stands_out = moves.sum() > BOX_SHARE[0] * part.sum() and _moves(moving, hidden & (moving > 0))
    if stands_out and _of_scene(found, moves, moving[box]):
        labels[part & (moving[box] < 0)] = cv2.GC_PR_BGD
        labels[cv2.erode(moves.view(np.uint8), np.ones((5, 5), np.uint8), borderValue=1) > 0] = cv2.GC_FGD
        near = part & (cv2.dilate(moves.view(np.uint8), _disc(moves)) > 0)
        labels[~near] = cv2.GC_BGD
        found = _grab_cut(rgb[box], labels, 5) & near
    found = cv2.medianBlur(found.astype(np.uint8), 5)
    count, pieces, stats, _ = cv2.connectedComponentsWithStats(found, connectivity=8)
    least = (0.01 if stands_out else 0.1) * stats[1:, cv2.CC_STAT_AREA].max(initial=0)
    kept = [n for n in range(1, count) if stats[n, cv2.CC_STAT_AREA] > least]
    found = np.isin(pieces, kept)
    if not BOX_SHARE[0] < found.sum() / hidden.sum() < BOX_SHARE[1]:
        return hidden
    result = np.zeros_like(hidden)
    result[box] = found
    return result


def _of_scene(found: np.ndarray, moves: np.ndarray, moving: np.ndarray) -> bool:
    """Whether what stands out by its colours is partly the scene, or misses most of what moves; (h, w) each."""
    both = (found & moves).sum()
    return both < 0.5 * moves.sum() or (both > 0.5 * found.sum() and _still(moving, found) > STILL)


def _still(moving: np.ndarray, hidden: np.ndarray) -> float:
    """Share of a part bool (H, W) of a frame that is surely the scene."""
    return float((moving[hidden] < -0.5).sum()) / max(1, int(hidden.sum()))


def histogram(rgb: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """How often colours occur in a part bool (H, W) of a frame uint8 (H, W, 3): float32 (8, 16, 16), sum 1."""
    colours = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[hidden].reshape(-1, 1, 3)
    counts = cv2.calcHist([colours], [0, 1, 2], None, [8, 16, 16], [0, 256, 0, 256, 0, 256])
    for axis in range(3):
        counts = counts + 0.5 * (_shifted(counts, 1, axis) + _shifted(counts, -1, axis))
    return counts / max(1e-6, float(counts.sum()))


def overlap(one: np.ndarray, two: np.ndarray) -> float:
    """Bhattacharyya coefficient of two histograms, from 0 to 1."""
    return float(np.sqrt(one * two).sum())


def _differs(found: np.ndarray, also: np.ndarray, moving: np.ndarray) -> bool:
    """Whether a mask misses parts that another shows, or holds parts of the scene that the other does not.

    Args:
        found: bool (H, W).
        also: the other, bool (H, W).
        moving: what moves against the scene, float32 (H, W).
    """
    ahead = also & (cv2.dilate(found.view(np.uint8), _disc(found)) == 0)
    behind = found & ~also & (moving < -0.5)
    return ahead.sum() > AHEAD * found.sum() or behind.sum() > BEHIND * found.sum()


def _touching(found: np.ndarray, carried: np.ndarray) -> np.ndarray:
    """Those pieces of a mask bool (H, W) that touch another, small gaps closed."""
    closed = cv2.morphologyEx(found.view(np.uint8), cv2.MORPH_CLOSE, _disc(carried))
    count, pieces = cv2.connectedComponents(closed, connectivity=8)
    met = np.bincount(pieces[carried], minlength=count) > 0
    met[0] = False
    return met[pieces.astype(np.intp)]


def _of_one_motion(core: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Those pixels of a part bool (H, W) that share its common motion (affine), and are no background."""
    y, x = np.nonzero(core)
    if len(y) < 30:
        return core
    pick = np.linspace(0, len(y) - 1, min(len(y), 400)).astype(int)
    now = np.stack([x, y], 1).astype(np.float32)
    was = now + back[y, x]
    cv2.setRNGSeed(0)
    affine, _ = cv2.estimateAffine2D(now[pick], was[pick], method=cv2.RANSAC, ransacReprojThreshold=1.0)
    if affine is None:
        return core
    miss = np.linalg.norm(now @ affine[:, :2].T + affine[:, 2] - was, axis=1)
    kept = miss < 1.5 + 0.1 * np.linalg.norm(back[y, x], axis=1)
    if kept.mean() < 0.3:
        return core
    result = np.zeros_like(core)
    result[y[kept], x[kept]] = True
    return result


def _moves(moving: np.ndarray, hidden: np.ndarray) -> bool:
    """Whether a part bool (H, W) of a frame moves against the scene, and what surrounds it does not."""
    ring = _ring(hidden)
    if not hidden.any() or not ring.any():
        return False
    return bool((moving[hidden] > 0).mean() - (moving[ring] > 0).mean() > MOVES)


def _ring(hidden: np.ndarray) -> np.ndarray:
    """What surrounds a mask: bool (H, W)."""
    disc = _disc(hidden)
    inner = cv2.dilate(hidden.view(np.uint8), np.ones((3, 3), np.uint8))
    outer = cv2.dilate(hidden.view(np.uint8), disc, iterations=ROOM)
    return (outer > 0) & (inner == 0)


def _ratio(rgb: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """How far colours speak for the inside, float32 (h, w) from -1 to 1; uint8 (h, w, 3) and two histograms."""
    lab = np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB), dtype=np.int64)
    index = lab[..., 0] // 32 * 256 + lab[..., 1] // 16 * 16 + lab[..., 2] // 16
    ratio = (np.log((inside.ravel() + 1e-3) / (outside.ravel() + 1e-3)) / 3).clip(-1, 1).astype(np.float32)
    return ratio[index]


def _shifted(values: np.ndarray, by: int, axis: int) -> np.ndarray:
    moved = np.roll(values, by, axis)
    index = [slice(None)] * values.ndim
    index[axis] = slice(0, 1) if by > 0 else slice(-1, None)
    moved[tuple(index)] = 0
    return moved


def _disc(hidden: np.ndarray) -> np.ndarray:
    """The band around the edge of a mask, as a structuring element."""
    return ellipse(int(np.clip(BAND * np.sqrt(hidden.sum()), LEAST_BAND, MOST_BAND)))


def _box(hidden: np.ndarray, room: int) -> tuple[slice, slice]:
    """Rows and columns of a mask that is not empty, and `room` pixels around them."""
    rows, columns = (np.flatnonzero(hidden.any(axis)) for axis in (1, 0))
    return (
        slice(max(0, int(rows[0]) - room), min(hidden.shape[0], int(rows[-1]) + room + 1)),
        slice(max(0, int(columns[0]) - room), min(hidden.shape[1], int(columns[-1]) + room + 1)),
    )


def _grab_cut(rgb: np.ndarray, labels: np.ndarray, rounds: int) -> np.ndarray:
    cv2.setRNGSeed(0)  # of its first clustering
    none = np.zeros((1, 65), np.float64)
    cv2.grabCut(np.ascontiguousarray(rgb), labels, (0, 0, 1, 1), none, none.copy(), rounds, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def at_edge(hidden: np.ndarray) -> bool:
    """Whether a mask bool (H, W) touches the edge of the picture."""
    return bool(hidden[[0, -1]].any() or hidden[:, [0, -1]].any())
