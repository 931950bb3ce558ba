"""How well a mask follows its object: mean overlap with the truth, on real clips with objects whose masks are known.

    python benchmarks/follow.py CLIPS [CLIPS ...] --out results/follow.json

An object of irregular shape is cut out of the middle of one clip and laid over another: it moves along a curve, turns,
grows and shrinks by a quarter, and its outline bends. It is marked in one frame, by its mask and by a box around it.
J is the intersection over union of found and true mask, averaged over the other frames; where the object is said to be
lost, 0. Files are paired in a random order of their names; the same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path

import cv2
import numpy as np

from diffmae_video.files import write_atomic
from diffmae_video.rendering.follow import follow_object
from diffmae_video.rendering.follower import SIDE, object_in_box
from diffmae_video.rendering.frame_store import shrunk
from diffmae_video.rendering.moving import Scene
from diffmae_video.rendering.source import VideoSource

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm")


def read(path: Path, frames: int) -> list[np.ndarray]:
    """The first frames of a clip, uint8 (H, W, 3), the longer side at most SIDE."""
    return [shrunk(frame.rgb, SIDE) for frame in itertools.islice(VideoSource(path), frames)]


def compose(skin: np.ndarray, places: list[np.ndarray], seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Move an object over frames.

    Args:
        skin: the frame uint8 (H, W, 3) it is cut out of.
        places: the frames it moves over.

    Returns:
        Frames, and masks bool (H, W).
    """
    draw = np.random.default_rng(seed)
    height, width = places[0].shape[:2]
    radius = min(height, width) * draw.uniform(0.13, 0.22)
    angle = np.linspace(0, 2 * np.pi, 361)
    outline = 1 + sum(draw.normal(0, 0.12) * np.cos(k * angle + draw.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
    side = int(4 * radius)
    larger = max(1.0, side / min(skin.shape[:2]))
    skin = cv2.resize(skin, None, fx=larger, fy=larger)
    top, left = (skin.shape[0] - side) // 2, (skin.shape[1] - side) // 2
    skin = skin[top : top + side, left : left + side]
    phase, speed = draw.uniform(0, 2 * np.pi), draw.uniform(0.3, 1.0)
    start = np.array([width, height]) * draw.uniform(0.35, 0.65, 2)
    frames, masks = [], []
    for number, place in enumerate(places):
        turn = 2 * np.pi * number / 60
        curve = np.sin([1.3 * turn + phase, 0.9 * turn + 2 * phase])
        x, y = start + speed * curve * (0.22 * width, 0.18 * height)
        scale, tilt = 1 + 0.25 * np.sin(turn + phase), 0.6 * np.sin(0.8 * turn + phase)
        bent = radius * scale * outline * (1 + 0.06 * np.sin(3 * angle + 2 * turn))
        points = np.stack([x + bent * np.cos(angle + tilt), y + bent * np.sin(angle + tilt)], 1)
        linear = scale * np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
        shift = np.array([x, y]) - linear @ np.array([side / 2, side / 2])
        affine = np.column_stack([linear, shift])
        thing = cv2.warpAffine(skin, affine, (width, height), borderMode=cv2.BORDER_REFLECT)
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
        opacity = cv2.GaussianBlur(mask, (0, 0), 0.7)[..., None] / 255.0
        frames.append((place * (1 - opacity) + thing * opacity + 0.5).astype(np.uint8))
        masks.append(mask > 127)
    return frames, masks


def overlap(one: np.ndarray, two: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((one & two).sum() / max(1, (one | two).sum()))


def box_around(mask: np.ndarray) -> np.ndarray:
    """The rectangle around a mask, as a mask."""
    box = np.zeros_like(mask)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return box


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", type=Path, help="Clips, or folders of clips.")
    parser.add_argument("--pairs", type=int, default=20, help="How many objects.")
    parser.add_argument("--frames", type=int, default=60, help="Longest clip.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/follow.json"))
    asked = parser.parse_args()
    files = sorted(p for top in asked.clips for p in ([top] if top.is_file() else top.rglob("*")))
    files = [p for p in files if p.suffix.lower() in SUFFIXES]
    random.Random(asked.seed).shuffle(files)
    rows = []
    for pair in range(min(asked.pairs, len(files))):
        skin, place = files[pair], files[(pair + len(files) // 2) % len(files)]
        frames, masks = compose(read(skin, 1)[0], read(place, asked.frames), asked.seed + pair)
        key = len(frames) // 3
        moving = Scene(frames).moving(key, masks[key].shape)
        found_in_box = object_in_box(frames[key], box_around(masks[key]), moving)
        row = {"object": skin.name, "clip": place.name, "frames": len(frames), "box": overlap(found_in_box, masks[key])}
        for way, mark in (("mask", masks[key]), ("box", found_in_box)):
            started = time.process_time()
            found = follow_object(frames, {key: mark})
            row[f"J {way}"] = float(np.mean([overlap(found(n), masks[n]) for n in range(len(frames)) if n != key]))
            row[f"lost {way}"] = len(found.notes)
            row[f"ms {way}"] = 1000 * (time.process_time() - started) / (len(frames) - 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
    names = [name for name, value in rows[0].items() if not isinstance(value, str)]
    mean = {name: float(np.mean([row[name] for row in rows])) for name in names}
    middle = {name: float(np.median([row[name] for row in rows])) for name in ("J mask", "J box")}
    print(json.dumps({"mean": mean, "median": middle}))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(asked.out, json.dumps({"mean": mean, "median": middle, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
