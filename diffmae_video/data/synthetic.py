"""The embedded data set: short H.264 clips of a textured object that moves over a drifting textured background.

The class is how the object moves: four directions, two rotations, zoom in and zoom out. No single frame tells it: the
object's place is uniform on a torus (it leaves on one side and enters on the other), its angle is uniform, and its
texture is a Shepard scale (a loop of octaves that fade in and out), so that every frame of every class is drawn from
one distribution. The background drifts in a random direction of its own, which says nothing about the class.

Each clip is a pure function of (seed, split, index, look): any number of clips, no two alike, the same bytes each time.
The files stand in Kinetics layout (`train/`, `val/`, `annotations/SPLIT.csv`, `ID_START_END.mp4`), so that everything
that reads Kinetics reads them.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import av
import cv2
import numpy as np

from diffmae_video.errors import UsageError
from diffmae_video.processes import safe_path

MOTIONS: dict[str, tuple[float, float, float, float]] = {
    "moving down": (0, 1, 0, 0),
    "moving left": (-1, 0, 0, 0),
    "moving right": (1, 0, 0, 0),
    "moving up": (0, -1, 0, 0),
    "turning clockwise": (0, 0, 1, 0),
    "turning counterclockwise": (0, 0, -1, 0),
    "zooming in": (0, 0, 0, 1),
    "zooming out": (0, 0, 0, -1),
}
"""Class name -> sign of (x, y, angle, zoom); x to the right, y down, angle clockwise as seen, zoom = growing."""

CLASSES: tuple[str, ...] = tuple(sorted(MOTIONS))
"""Class names in label order (alphabetical)."""

_TILE = 64  # pixels of one period of a texture
_OCTAVES = 3  # of the Shepard scale
_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split", "is_cc")


@dataclass(frozen=True)
class Look:
    """How clips look, hence how hard they are. Lengths are in pixels of a 32-pixel frame and grow with the frame."""

    brightness: tuple[float, float] = (50.0, 70.0)
    """Darkest and brightest background, 0..255."""
    contrast: float = 100.0
    """How much the object differs from the background, 0..255: brighter on dark ones, darker on bright ones."""
    object_texture: float = 8.0
    """Standard deviation of the object's texture, 0..255."""
    pattern: float = 35.0
    """Amplitude of the spokes and of the rings on the object, 0..255: large marks that turn and grow with it."""
    background_texture: float = 8.0
    """Standard deviation of the background's texture, 0..255."""
    object_grain: float = 8.0
    """Size of the features of the object's texture, pixels."""
    background_grain: tuple[float, float] = (3.0, 8.0)
    """Smallest and largest size of the features of the background, pixels."""
    colour: float = 0.2
    """0: textures are grey, 1: their channels are independent."""
    radius: tuple[float, float] = (0.32, 0.42)
    """Smallest and largest radius of the object, as a share of the frame."""
    speed: float = 1.5
    """Pixels a frame of the four directions."""
    turn: float = 12.0
    """Degrees a frame of the two rotations."""
    zoom: float = 1.08
    """Growth a frame of the two zooms."""
    drift: float = 0.25
    """Largest speed of the background, pixels a frame."""


@dataclass(frozen=True)
class DemoData:
    """What `write_demo_data` wrote."""

    directory: Path
    counts: dict[str, int]
    """Clips of each split."""
    bytes: int
    """Size of all files."""


def motion_clip(
    label: int,
    *,
    seed: int,
    split: str = "train",
    index: int = 0,
    frames: int = 20,
    size: int = 32,
    look: Look | None = None,
) -> np.ndarray:
    """Draw one clip.

    Args:
        label: index into `CLASSES`.
        seed: seed of the data set.
        split: name of the split; splits share no clip.
        index: number of the clip in its split.
        frames: frames T.
        size: height and width, pixels.
        look: appearance; the demo's by default.

    Returns:
        uint8 (T, size, size, 3), RGB.
    """
    return motion_clip_and_mask(label, seed=seed, split=split, index=index, frames=frames, size=size, look=look)[0]


def motion_clip_and_mask(
    label: int,
    *,
    seed: int,
    split: str = "train",
    index: int = 0,
    frames: int = 20,
    size: int = 32,
    look: Look | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one clip, and where its object is; the arguments are those of `motion_clip`.

    Returns:
        uint8 (T, size, size, 3), RGB, and bool (T, size, size), True on pixels of which the object covers half or more.
    """
    look = look or Look()
    split_number = int.from_bytes(hashlib.sha256(split.encode()).digest()[:4], "little")
    rng = np.random.default_rng([seed, split_number, index])
    unit = size / 32
    # One fixed order of draws, the same for every class: the class changes the motion and nothing else.
    background = _texture(rng, rng.uniform(*look.background_grain), look.colour)
    octaves = [_texture(rng, look.object_grain, look.colour) for _ in range(_OCTAVES)]
    brightness = rng.uniform(*look.brightness)
    base = brightness + rng.normal(0, 10, 3)
    towards = 1.0 if brightness < 128 else -1.0  # so that neither the object nor its marks are clipped
    offset = look.contrast * towards * rng.uniform(0.7, 1.3) + rng.normal(0, 10, 3)
    place, angle, octave = rng.uniform(0, size, 2), rng.uniform(0, 2 * math.pi), rng.uniform(0, _OCTAVES)
    pace = rng.uniform(0.75, 1.25)
    heading, drift, start = rng.uniform(0, 2 * math.pi), look.drift * rng.uniform(0, 1), rng.uniform(0, _TILE, 2)
    radius, roundness = size * rng.uniform(*look.radius), rng.uniform(0.75, 1.0)
    move_x, move_y, turn, zoom = (pace * sign for sign in MOTIONS[CLASSES[label]])

    spokes, ring_width = rng.integers(1, 3, endpoint=True), rng.uniform(1.8, 2.4)  # whole turns, octaves

    single = np.float32  # float32 throughout: twice as fast, and far finer than a grey level
    frame = np.arange(frames, dtype=single)[:, None, None]  # (T, 1, 1)
    grid_y, grid_x = np.meshgrid(np.arange(size, dtype=single), np.arange(size, dtype=single), indexing="ij")
    # Background: a plain drift.
    at_x = grid_x / single(unit) + single(start[0]) + single(drift * math.cos(heading)) * frame  # (T, H, W)
    at_y = grid_y / single(unit) + single(start[1]) + single(drift * math.sin(heading)) * frame
    scene = base.astype(single) + single(look.background_texture) * _sample(background, at_x, at_y)  # (T, H, W, 3)
    # Object: pixel coordinates in its own frame; the torus makes every place equally likely in every frame.
    half, speed = single(size / 2), look.speed * unit
    rel_x = (grid_x - single(place[0]) - single(move_x * speed) * frame + half) % single(size) - half
    rel_y = (grid_y - single(place[1]) - single(move_y * speed) * frame + half) % single(size) - half
    theta = single(angle) + single(math.radians(look.turn) * turn) * frame
    own_x = np.cos(theta) * rel_x + np.sin(theta) * rel_y
    own_y = np.cos(theta) * rel_y - np.sin(theta) * rel_x
    inside = np.clip(single(radius) - np.hypot(own_x, own_y / single(roundness)) + single(0.5), 0, 1)[..., None]
    grown = single(octave) + single(math.log2(look.zoom) * zoom) * frame  # (T, 1, 1) octaves, modulo _OCTAVES
    skin, power = np.zeros_like(scene), np.zeros((frames, 1, 1, 1), single)
    for k, tile in enumerate(octaves):
        log_scale = (grown + single(k)) % single(_OCTAVES) - single(_OCTAVES / 2)
        weight = np.cos(single(math.pi / _OCTAVES) * log_scale)[..., None] ** 2  # 0 where the octave wraps around
        shrink = single(2.0) ** -log_scale / single(unit)
        skin += weight * _sample(tile, own_x * shrink, own_y * shrink)
        power += weight**2
    skin *= single(look.object_texture) / np.sqrt(power)
    # Spokes and rings: waves in angle and in log radius, so that turning and zooming only shift their phase.
    distance = np.log2(np.hypot(own_x, own_y) + single(0.5 * unit))
    rings = np.cos(single(2 * math.pi / ring_width) * (distance - grown))
    marks = np.cos(single(spokes) * np.arctan2(own_y, own_x)) + rings
    skin += (base + offset).astype(single) + single(look.pattern) * marks[..., None]
    return np.clip(np.rint(scene + (skin - scene) * inside), 0, 255).astype(np.uint8), inside[..., 0] >= 0.5


@dataclass(frozen=True)
class RemovalClip:
    """A ball that crosses the view of a moving camera."""

    rgb: np.ndarray
    """uint8 (T, H, W, 3), with the ball."""
    truth: np.ndarray
    """uint8 (T, H, W, 3), without it."""
    hidden: np.ndarray
    """bool (T, H, W), the ball and a little more."""


def removal_clip(*, seed: int, frames: int = 40, height: int = 144, width: int = 192) -> RemovalClip:
    """Draw a clip from which something is to be removed, with what is behind it.

    A wall of coloured tiles is seen by a camera that pans and turns a little; a ball rolls over it the other way.

    Args:
        seed: of the wall and of the ball.
        frames: frames T.
        height, width: pixels.
    """
    rng = np.random.default_rng(seed)
    wall = np.full((2 * height, 2 * width, 3), rng.uniform(90, 160, 3), np.float32)
    for _ in range(240):
        place, tile = rng.uniform(0, (2 * width, 2 * height)), rng.uniform(4, height / 5, 2)
        corners = cv2.boxPoints((place.tolist(), tile.tolist(), float(rng.uniform(0, 90))))
        cv2.fillConvexPoly(wall, np.rint(corners).astype(np.int32), rng.uniform(30, 225, 3).tolist(), cv2.LINE_AA)
    wall += cv2.GaussianBlur(rng.normal(0, 24, wall.shape).astype(np.float32), (0, 0), 1.0)
    radius, colour = 0.16 * height, rng.uniform(0, 255, 3)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    truth, rgb = np.zeros((2, frames, height, width, 3), np.uint8)
    hidden = np.zeros((frames, height, width), dtype=bool)
    for n, share in enumerate(np.linspace(0, 1, frames)):
        centre = (width * (0.75 + 0.5 * share), height * (1 + 0.1 * np.sin(5 * share)))
        view = cv2.getRotationMatrix2D(centre, 4 * np.sin(4 * share), 1.0)
        view[:, 2] += np.array([width, height]) / 2 - centre
        truth[n] = cv2.warpAffine(wall, view, (width, height)).clip(0, 255).astype(np.uint8)
        x, y = width * (0.85 - 0.7 * share) - columns, height * (0.6 - 0.15 * np.sin(9 * share)) - rows
        distance, spokes = np.hypot(x, y), np.sign(np.sin(3 * (np.arctan2(y, x) + 9 * share)))
        ball = (colour + 40 * spokes[..., None]) * (1 - 0.4 * distance[..., None] / radius)
        inside = np.clip(radius - distance + 0.5, 0, 1)[..., None]
        rgb[n] = np.clip(truth[n] + (ball - truth[n]) * inside, 0, 255).astype(np.uint8)
        hidden[n] = distance < radius + 3
    return RemovalClip(rgb, truth, hidden)


def encode_mp4(frames: np.ndarray, fps: int) -> bytes:
    """Encode uint8 (T, H, W, 3) RGB as an H.264 MP4 file (yuv420p, one thread: the same bytes each time).

    Raises:
        ValueError: height or width is odd.
    """
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"H.264 with 4:2:0 colour needs even height and width, not {frames.shape[1:3]}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "ultrafast", "crf": "14"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_demo_data(
    directory: Path,
    *,
    train: int = 4000,
    val: int = 800,
    size: int = 32,
    frames: int = 20,
    fps: int = 10,
    seed: int = 0,
    workers: int | None = None,
    look: Look | None = None,
    progress: Callable[[int], None] | None = None,
) -> DemoData:
    """Write the data set into a new folder; it appears there whole or not at all.

    Args:
        directory: folder to make; an empty one is accepted.
        train: clips in `train/`; classes take turns, so they are balanced.
        val: clips in `val/`.
        size: height and width of the clips, pixels, even, at least 16.
        frames: frames of each clip.
        fps: frame rate.
        seed: seed of every draw.
        workers: processes; all cores by default, 1 works in this process.
        look: appearance; the demo's by default.
        progress: called with the number of clips just written.

    Raises:
        UsageError: the folder holds something, or a number is out of range.
    """
    if size < 16 or size % 2:
        raise UsageError(f"--size {size}: H.264 needs an even number of pixels, 16 or more; try --size 32.")
    if train < 1 or val < 0 or frames < 2 or fps < 1:
        raise UsageError(
            "The demo data needs --train 1, --val 0, --frames 2 and --fps 1 at least; raise the lower one."
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} already holds something; name a new folder or remove it.")
    look, counts = look or Look(), {"train": train, "val": val}
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        total = 0
        with _pool(workers) as submit:
            for split, count in counts.items():
                (temporary / split).mkdir(parents=True)
                ranges = [range(first, min(first + 50, count)) for first in range(0, count, 50)]
                jobs = [
                    submit(_write_clips, temporary / split, split, part, size, frames, fps, seed, look)
                    for part in ranges
                ]
                for part, job in zip(ranges, jobs, strict=True):
                    total += job.result()
                    if progress:
                        progress(len(part))
                total += _write_annotations(temporary / "annotations", split, count, frames, fps, seed)
        if directory.exists():
            directory.rmdir()
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return DemoData(directory, counts, total)


def clip_label(index: int) -> int:
    """Label of the clip with this number: classes take turns."""
    return index % len(CLASSES)


def clip_name(seed: int, split: str, index: int, frames: int, fps: int) -> tuple[str, int, int]:
    """(id of 11 characters, start, end in seconds) of a clip, made up but shaped like Kinetics' own."""
    digest = hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest()
    start = int.from_bytes(digest[16:18], "little") % 600
    return base64.urlsafe_b64encode(digest[:9]).decode()[:11], start, start + math.ceil(frames / fps)


def _texture(rng: np.random.Generator, grain: float, colour: float) -> np.ndarray:
    """Seamless noise, float32 (_TILE, _TILE, 3), mean 0, standard deviation 1, features `grain` pixels wide."""
    noise = (1 - colour) * rng.standard_normal((_TILE, _TILE, 1), np.float32) + colour * rng.standard_normal(
        (_TILE, _TILE, 3), np.float32
    )
    border = _TILE // 2
    noise = cv2.copyMakeBorder(noise, border, border, border, border, cv2.BORDER_WRAP)
    noise = cv2.GaussianBlur(noise, (0, 0), grain / 2)[border:-border, border:-border]
    return (noise - noise.mean((0, 1))) / (noise.std() + 1e-6)


def _sample(tile: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear look-up of a seamless texture at x, y (T, H, W), pixels -> float32 (T, H, W, 3), in one call."""
    flat = x.shape[0] * x.shape[1], x.shape[2]
    map_x, map_y = (np.remainder(v, np.float32(_TILE)).reshape(flat) for v in (x, y))
    return cv2.remap(tile, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP).reshape(*x.shape, 3)


def _write_clips(
    folder: Path, split: str, indices: Sequence[int], size: int, frames: int, fps: int, seed: int, look: Look
) -> int:
    written = 0
    for index in indices:
        clip = motion_clip(clip_label(index), seed=seed, split=split, index=index, frames=frames, size=size, look=look)
        name, start, end = clip_name(seed, split, index, frames, fps)
        written += (folder / f"{name}_{start:06d}_{end:06d}.mp4").write_bytes(encode_mp4(clip, fps))
    return written


def _write_annotations(folder: Path, split: str, count: int, frames: int, fps: int, seed: int) -> int:
    folder.mkdir(exist_ok=True)
    path = folder / f"{split}.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(_COLUMNS)
        for index in range(count):
            rows.writerow([CLASSES[clip_label(index)], *clip_name(seed, split, index, frames, fps), split, 1])
    return path.stat().st_size


@contextmanager
def _pool(workers: int | None) -> Iterator[Callable[..., Future]]:
    """A `submit` over fresh processes (a fork would inherit the locks of a threaded parent), or over none."""
    workers = workers or os.cpu_count() or 1
    if workers > 1:
        with safe_path(), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield pool.submit
        return

    def here(function: Callable[..., int], *arguments: object) -> Future:
        done: Future = Future()
        done.set_result(function(*arguments))
        return done

    yield here
