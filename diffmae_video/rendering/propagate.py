"""What other frames show of a hidden place is taken from there, at full resolution.

For each hole of a frame, those frames of the same shot are chosen that show most of it and whose surroundings of the
hole match best. Each is aligned by the view's motion (homographies between neighbours, composed; see `motion`) and by
a flow that is measured around the hole and continued into it, and its light is brought to that of the frame. How well
the surroundings then match says, place by place, how far it is believed (see `candidates`). Here the values are mixed.
What no frame shows, or none credibly, stays unfilled.

After classical methods of removal: Granados et al. 2012 ("Background inpainting for videos with dynamic objects and a
free-moving camera": homographies), Huang et al. 2016 ("Temporally coherent completion of dynamic video": flow that is
continued into the hole), Perez et al. 2003 ("Poisson image editing": differences at the edge continued into it).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from diffmae_video.rendering.candidates import CAP, HAZARD, NOISE, Candidate, Region, align, soonest, survey
from diffmae_video.rendering.motion import View, neighbour_motion, one_thread, sane
from diffmae_video.rendering.paste import membrane

MAJORITY, MINORITY = 0.6, 0.3
"""Share of the trust that must agree before others are left out, and share of its support that those lack."""
SHARPNESS = 3.0
"""Values are weighted by the inverse of their expected error to this power."""
DOUBTFUL = 10.0**2
"""Expected error at which the confidence is a half."""
SEAMLESS = 0.5
"""Confidence below which the edge of a hole is smoothed, wholly below half of it."""
BYTES = 7
"""Bytes that a frame of the window takes for each pixel: its colours, greys, masks, and the picture that is written."""
MARGIN, LEAST_MARGIN, MOST_MARGIN = 0.4, 16, 64
"""Room around a hole: share of its longer side, and limits in pixels."""


@dataclass(frozen=True)
class PropagateSettings:
    """How far and how often other frames are looked at."""

    window: int = 30
    """Frames before and after the one that is filled; twice as many and one are held. Fewer where `memory` is less."""
    memory: int = 1 << 30
    """Bytes of the frames that are held: 1 GiB holds 30 before and after of 1920 x 1080 pixels, 8 of 3840 x 2160."""
    candidates: int = 12
    """Frames that are aligned for each hole; time rises with them."""
    least: float = 0.1
    """Confidence from which on a place counts as seen."""

    def reach(self, height: int, width: int) -> int:
        """Frames of this size before and after the one that is filled that are held: `window`, or as many as `memory`
        has room for, but 2 at least."""
        held = self.memory // (BYTES * height * width)
        return min(self.window, max(2, (held - 1) // 2))


Seen = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""(number, rgb uint8 (H, W, 3), seen bool (H, W), confidence float32 (H, W))."""


class Propagator:
    """Fills holes of a video from its other frames, as they come.

    The same frames give the same bits on any number of threads. Neither the hidden pixels of a frame nor anything
    across a cut is read, and pixels outside the holes stay as they are.
    """

    def __init__(self, settings: PropagateSettings | None = None) -> None:
        self.settings = settings or PropagateSettings()

    def stream(
        self,
        frames: Iterable[tuple[int, np.ndarray, np.ndarray]],
        wanted: Callable[[int], bool] = lambda _: True,
    ) -> Iterator[Seen]:
        """Fill frames and yield each, in order, once `window` frames after it were read, or fewer (`memory`).

        Args:
            frames: (number, rgb uint8 (H, W, 3), hidden bool (H, W)), all of one size; kept while they are in the
                window, and not written to.
            wanted: whether a frame, by its number, is filled; others pass unfilled.

        Yields:
            (number, rgb, seen, confidence): a copy of the frame in which hidden pixels that another frame shows are
            filled; where that is (never outside what is hidden); and how far it can be believed, from 0 (not seen) to
            1. Hidden pixels that are not seen are as they came.
        """
        source = iter(frames)
        window: deque[View] = deque()
        links: deque[_Link] = deque()  # from the frame before
        position, ended = 0, False  # of the frame that is filled next
        reached = self.settings.window
        while True:
            while not ended and len(window) <= position + reached:
                item = next(source, None)
                if item is None:
                    ended = True
                    break
                view = View(*item)
                del item
                reached = self.settings.reach(*view.hidden.shape)
                links.append(_Link(window[-1] if window else None, view))
                window.append(view)
            if position == len(window):
                return
            with one_thread():
                answer = self._fill(list(window), list(links), position, wanted(window[position].number))
            if position == reached:
                window.popleft()
                links.popleft()
            else:
                position += 1
            yield answer

    def _fill(self, window: list[View], links: list[_Link], position: int, wanted: bool) -> Seen:
        """Fill one frame of a window, where wanted; `links` holds the motion from each one's predecessor."""
        view = window[position]
        result = view.rgb.copy()
        seen = np.zeros(view.hidden.shape, dtype=bool)
        confidence = np.zeros(view.hidden.shape, dtype=np.float32)
        if wanted and view.hidden.any() and not view.hidden.all():
            others = reach(window, links, position)
            for box in boxes(view.hidden):
                region = Region(view, box)
                chosen = survey(region, others, self.settings.candidates)
                chosen += soonest(region, others, chosen, self.settings.candidates // 2)
                aligned = (align(region, *others[n]) for n in chosen)
                found = [one for one in aligned if one is not None]
                if not found:
                    continue
                filled, sure = combine(found, region.hidden)
                filled = close_seams(filled, sure, region)
                known = (sure >= self.settings.least) & (sure > 0)
                np.copyto(result[box], (filled + 0.5).clip(0, 255).astype(np.uint8), where=known[..., None])
                np.copyto(confidence[box], sure, where=known)
                seen[box] |= known
        return view.number, result, seen, confidence


class _Link:
    """The motion from a frame to the next, found once it is asked for: where nothing is hidden it never is."""

    def __init__(self, before: View | None, after: View) -> None:
        self.before, self.after = before, after

    @cached_property
    def motion(self) -> np.ndarray | None:
        """Homography float64 (3, 3); None at a cut."""
        return None if self.before is None else neighbour_motion(self.before, self.after)


def reach(window: Sequence[View], links: Sequence[_Link], position: int) -> list[tuple[View, np.ndarray]]:
    """Frames of the same shot, and where the points of the frame at `position` lie in them: homographies (3, 3).

    Nearest first; neither a cut nor a view that no longer shares anything is passed.
    """
    view, found = window[position], []
    for step in (-1, 1):
        motion, at = np.eye(3), position
        while 0 <= at + step < len(window):
            link = links[at if step < 0 else at + 1].motion
            if link is None:
                break
            motion = (np.linalg.inv(link) if step < 0 else link) @ motion
            motion = motion / motion[2, 2]
            at += step
            if not sane(motion, view.hidden.shape):
                break
            found.append((window[at], motion))
    return sorted(found, key=lambda one: abs(one[0].number - view.number))


def boxes(hidden: np.ndarray) -> list[tuple[slice, slice]]:
    """Rectangles (rows, columns) around the connected holes of a mask bool (H, W), with room for what surrounds them;
    those that meet are one."""
    height, width = hidden.shape
    count, _, stats, _ = cv2.connectedComponentsWithStats(hidden.view(np.uint8), connectivity=8)
    found: list[list[int]] = []
    for left, top, w, h, _ in stats[1:count].tolist():
        room = int(np.clip(MARGIN * max(w, h), LEAST_MARGIN, MOST_MARGIN))
        new = [left - room, top - room, left + w + room, top + h + room]
        while meets := [
            old for old in found if new[0] < old[2] and old[0] < new[2] and new[1] < old[3] and old[1] < new[3]
        ]:
            for old in meets:
                found.remove(old)
                new = [min(new[0], old[0]), min(new[1], old[1]), max(new[2], old[2]), max(new[3], old[3])]
        found.append(new)
    return [
        (slice(max(0, top), min(height, bottom)), slice(max(0, left), min(width, right)))
        for left, top, right, bottom in found
    ]


def combine(found: Sequence[Candidate], hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mix what frames show of a hole bool (h, w) by how far each can be believed at each place.

    Where most of those that match well agree, others (something that passes) are left out. The rest is weighted by the
    expected error: that of the surroundings, and more for frames further away. The confidence falls with the expected
    error of the mixture and with how much the frames disagree; its constants are a fit to real clips.

    Returns:
        float32 (h, w, 3), and the confidence float32 (h, w), 0 where no frame shows the place.
    """
    at = np.nonzero(hidden)
    thirds = np.full(3, 1 / 3, np.float32)  # mean over the channels
    shown = np.stack([one.shown[at] for one in found])  # (K, P) with P hidden pixels
    match = np.stack([one.error[at] for one in found]) + NOISE  # (K, P)
    smooth = np.stack([one.smooth[at] for one in found])  # (K, P, 3)

    trust = np.where(shown, match**-1.5, 0)
    support = trust.copy()
    for i in range(len(found)):
        for j in range(i):
            apart = (smooth[i] - smooth[j]) ** 2 @ thirds
            alike = np.exp(apart / (-6 * (match[i] + match[j])))
            support[i] += trust[j] * alike
            support[j] += trust[i] * alike
    support /= np.maximum(trust.sum(0), 1e-12)
    most = support.max(0)
    passing = (most > MAJORITY) & (support < MINORITY * most)

    distance = np.array([one.distance for one in found], np.float32)
    expected = match + HAZARD * distance[:, None]  # (K, P)
    weight = _shares(np.where(shown & ~passing, (expected / expected.min(0)) ** -SHARPNESS, 0))
    filled, confidence = np.zeros((*hidden.shape, 3), np.float32), np.zeros(hidden.shape, np.float32)
    filled[at] = sum(part[:, None] * one.rgb[at] for part, one in zip(weight, found, strict=True))

    middle = (weight[..., None] * smooth).sum(0)
    differ = np.minimum((smooth - middle) ** 2 @ thirds, CAP)
    dissent = (_shares(np.where(shown, 1 / expected, 0)) * differ).sum(0)
    error = 0.275 * (weight * expected).sum(0) ** 0.7 * (dissent + NOISE) ** 0.49
    confidence[at] = np.where(shown.any(0), 1 / (1 + error / DOUBTFUL), 0)
    return filled, confidence


def close_seams(filled: np.ndarray, sure: np.ndarray, region: Region) -> np.ndarray:
    """Spread the step at the edge of a filled hole over it (Perez et al. 2003), where the confidence is low.

    Elsewhere the step is the picture's own: on real clips, taking it away there costs 0.3 to 11 dB.

    Args:
        filled: float32 (h, w, 3).
        sure: confidence float32 (h, w).

    Returns:
        float32 (h, w, 3).
    """
    hidden = region.hidden
    doubt = cv2.GaussianBlur(np.where(sure > 0, (SEAMLESS - sure) / SEAMLESS * 2, 0).clip(0, 1), (0, 0), 1.5)
    if not doubt[hidden].any():
        return filled
    distance, labels = cv2.distanceTransformWithLabels(
        hidden.view(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    rim = (sure > 0) & (distance < 1.5)  # hidden pixels that touch a visible one
    if not rim.any():
        return filled
    outside = np.flatnonzero(~hidden)
    label = np.asarray(labels, dtype=np.int64)
    nearest = np.zeros(label.max() + 1, dtype=np.int64)  # the visible pixel that a label stands for
    nearest[label.ravel()[outside]] = outside
    step = filled - region.target.reshape(-1, 3)[nearest[label]]
    return filled - membrane(step, rim) * doubt[..., None]


def _shares(weight: np.ndarray) -> np.ndarray:
    """Weights (K, P) that add up to 1 over K, where there are any."""
    return weight / np.maximum(weight.sum(0), 1e-12)
