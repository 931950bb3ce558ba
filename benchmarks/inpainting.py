"""Inpainting, measured: what a window costs, memory of long clips, longer strides, the edges of small holes.

    python benchmarks/inpainting.py time --run RUN --data SHARDS          # or --preset base --size 224 --device cuda
    python benchmarks/inpainting.py memory [--minutes 1 10]
    python benchmarks/inpainting.py stride --run RUN CLIP ...
    python benchmarks/inpainting.py edges --run RUN CLIP ...              # colours at the edge of small holes

RUN is a pre-training run (benchmarks/sampling.py makes some, and measures steps and samplers), SHARDS what
`diffmae shard` wrote. Each prints a table and writes benchmarks/results/inpainting-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import diffmae_video.compat  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from diffmae_video.config import DiffusionSettings, ModelSettings, RenderSettings, read_settings, with_overrides
from diffmae_video.data.stream import build_stream
from diffmae_video.evaluation.image_metrics import psnr, psnr_of
from diffmae_video.evaluation.inpainting import to_frames
from diffmae_video.masking import Mask, make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import denormalize_pixels, normalize_pixels
from diffmae_video.models.weights import load_model

MASKS = ("random:0.75", "tube:0.75", "center")
RESULTS = Path(__file__).parent / "results"


def load_diffmae(run: Path) -> DiffMAE:
    """The model of a pre-training run."""
    model = load_model(run)
    assert isinstance(model, DiffMAE)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in ("time", "stride", "edges"):
        stage = stages.add_parser(name)
        stage.add_argument("--run", type=Path)
        stage.add_argument("--data")
        stage.add_argument("--device", default="cpu")
        stage.add_argument("--steps", type=int, default=RenderSettings().steps)
    for name in ("stride", "edges"):
        stages.choices[name].add_argument("clips", type=Path, nargs="+")
    window = stages.choices["time"]
    window.add_argument("--preset", default="nano")
    window.add_argument("--size", type=int, default=48)
    window.add_argument("--patch", type=int, default=16)
    window.add_argument("--bf16", action="store_true")
    window.add_argument("--repeats", type=int, default=5)
    memory = stages.add_parser("memory")
    memory.add_argument("--minutes", type=float, nargs="+", default=[1, 10])
    memory.add_argument("--size", type=int, nargs=2, default=[320, 240])
    memory.add_argument("--fps", type=int, default=10)
    options = parser.parse_args()
    measure = {"time": window_time, "memory": memory_of_length, "stride": strides, "edges": edges}
    rows = measure[options.stage](options)
    facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    given = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(options).items()}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"inpainting-{options.stage}.json"
    for name in ("run", "data", "clips"):  # where they lie is nobody's business
        if isinstance(given.get(name), str):
            given.pop(name)
    file.write_text(json.dumps({"options": given, **facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


# --- clips and samples ------------------------------------------------------------------------------------------------


def validation_clips(options: argparse.Namespace, count: int) -> Tensor:
    """Clips of the validation split, evenly spread: uint8 (B, T, C, H, W)."""
    settings = with_overrides(
        read_settings(options.run / "config.toml"), data={"path": options.data, "sources": [], "workers": 0}
    )
    stream = build_stream(settings, split=settings.data.eval_split, batch_size=8, training=False)
    clips = torch.cat([batch.clips for batch in stream])
    stream.close()
    return clips[np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int)]


def filled(model: DiffMAE, clips: Tensor, mask: Mask, sampler: str, count: int, **more: Any) -> np.ndarray:
    """One sample of each clip, uint8 (B, T, H, W, 3)."""
    norm, device = model.settings.pixel_norm, next(model.parameters()).device
    with torch.inference_mode():
        made = model.sample(
            normalize_pixels(clips.to(device), norm),
            mask.to(device),
            sampler=sampler,
            steps=count,
            **{"seeds": range(len(clips)), **more},
        )
    return to_frames(denormalize_pixels(made, norm))


# --- what a window costs ---------------------------------------------------------------------------------------------


def window_time(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A window at the default steps, encoded once, beside 1000 DDPM steps that encode at each of them.

    The two run in turns. Without a run the model has random weights, the slow side is timed on 20 of its steps, and
    there is no quality to compare.
    """
    defaults = RenderSettings()
    if options.run:
        model, clips = load_diffmae(options.run).eval(), validation_clips(options, 1)
    else:
        size = (options.size, options.size)
        torch.manual_seed(0)
        model = DiffMAE(
            ModelSettings(preset=options.preset, size=size, patch=options.patch), DiffusionSettings()
        ).eval()
        clips = torch.randint(0, 256, (1, 16, 3, *size), dtype=torch.uint8)
    model.to(options.device)
    mask = make_mask("random", 0.75, model.encoder.shape, [0]).to(options.device)
    hidden = mask.pixels(model.tubelet, model.patch).cpu().numpy()
    source = to_frames(clips)
    slow_steps = 1000 if options.run else 20

    def fast() -> np.ndarray:
        return filled(model, clips, mask, defaults.sampler, options.steps, eta=defaults.eta)

    def slow() -> np.ndarray:
        encode_always, encode = model.denoise, model.encode
        x = normalize_pixels(clips.to(options.device), model.settings.pixel_norm)
        model.denoise = lambda noisy, timestep, encoding: encode_always(noisy, timestep, encode(x, mask))
        try:
            return filled(model, clips, mask, "ddpm", slow_steps)
        finally:
            del model.denoise

    times: dict[str, list[float]] = {"fast": [], "slow": []}
    with torch.autocast(options.device, torch.bfloat16, options.bf16):
        fast()  # warm up
        for _ in range(options.repeats if not options.run else 2):
            for name, work in (("fast", fast), ("slow", slow)):
                begun = time.perf_counter()
                made = work()
                if options.device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - begun)
                times[f"psnr {name}"] = [psnr(source, made, hidden)]
    quick = statistics.median(times["fast"])
    full = statistics.median(times["slow"]) * 1000 / slow_steps
    row = {
        "frames": model.settings.frames,
        "size": f"{model.settings.size[1]}x{model.settings.size[0]}",
        "sampler": defaults.sampler,
        "steps": options.steps,
        "seconds": quick,
        "seconds_1000_steps_encoding_each": full,
        "times_faster": full / quick,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None,
    }
    if options.run:
        row |= {"psnr": times["psnr fast"][0], "psnr_1000": times["psnr slow"][0]}
    return [row]


# --- memory of long clips --------------------------------------------------------------------------------------------


def memory_of_length(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of `diffmae render-inpaint` on clips of several lengths, each in a process of its own."""
    width, height = options.size
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder) / "model")
        for minutes in options.minutes:
            count = round(minutes * 60 * options.fps)
            clip = Path(folder) / "clip.mp4"
            write_clip(clip, count, height, width, options.fps)
            command = [
                *(sys.executable, "-c", "from diffmae_video.cli.app import main; main()", "render-inpaint", str(clip)),
                *("--checkpoint", str(model), "--mask", "box:40%,40%,20%,20%", "--steps", "2", "--stride", "1"),
                *("--device", "cpu", "--out", f"{folder}/out-{minutes}"),
            ]
            begun = time.perf_counter()
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
            usage = wait_for(process)
            rows.append(
                {
                    "minutes": minutes,
                    "frames": count,
                    "size": f"{width}x{height}",
                    "peak_gib": usage.ru_maxrss / 2**20,
                    "seconds": time.perf_counter() - begun,
                    "windows": json.loads(Path(f"{folder}/out-{minutes}/result.json").read_text())["windows"],
                }
            )
    return rows


def wait_for(process: subprocess.Popen[bytes]) -> resource.struct_rusage:
    """Resources that one child used. Raises RuntimeError where it failed."""
    import os

    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the render ended with status {status}")
    return usage


def small_model(folder: Path) -> Path:
    """A nano model with random weights, saved."""
    from diffmae_video.models.weights import save_model

    torch.manual_seed(0)
    model = DiffMAE(ModelSettings(preset="nano", size=(48, 48), patch=8, decoder_width=128), DiffusionSettings())
    save_model(model, folder, {"kind": "diffmae"})
    return folder


def write_clip(path: Path, count: int, height: int, width: int, fps: int) -> None:
    """A disc that circles over a still pattern."""
    from diffmae_video.rendering.writers import VideoWriter

    rows, columns = np.mgrid[:height, :width]
    still = np.stack([columns * 255 / width, rows * 255 / height, (rows + columns) % 64 * 4], -1).astype(np.uint8)
    writer = VideoWriter(path, (height, width), Fraction(1, fps), Fraction(fps), crf=23)
    for n in range(count):
        frame = still.copy()
        angle = n / fps
        y, x = height / 2 + height / 3 * np.sin(angle), width / 2 + width / 3 * np.cos(angle)
        frame[(rows - y) ** 2 + (columns - x) ** 2 < (height / 8) ** 2] = (240, 80, 40)
        writer.write(frame, n)
    writer.close()


# --- longer strides --------------------------------------------------------------------------------------------------


def strides(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A box that crosses the frame hides a background which other frames show: PSNR of what is painted, by stride.

    The box takes the whole clip to cross half of the frame, so that a short window never sees some of what it hides.
    """
    from diffmae_video.rendering.inpaint import Inpainter
    from diffmae_video.rendering.source import VideoSource

    model = load_diffmae(options.run).eval().to(options.device)
    errors: dict[int, list[float]] = {}
    for path in options.clips:
        source = VideoSource(path)
        frames = [frame.rgb for frame in source]
        source.close()
        for stride in (1, 2, 3):
            if len(frames) < stride * model.settings.frames:
                continue
            settings = RenderSettings(steps=options.steps, window="whole")
            inpainter = Inpainter(model, settings, stride=stride, seed=0)
            error = pixels = 0.0
            for frame in inpainter.stream(crossing_box(frames)):
                difference = frame.result().astype(float) - frame.source
                error += float((difference[frame.hidden] ** 2).sum())
                pixels += 3 * int(frame.hidden.sum())
            errors.setdefault(stride, []).append(error / pixels)
    return [
        {"stride": stride, "clips": len(values), "psnr_hidden": psnr_of(float(np.mean(values)))}
        for stride, values in errors.items()
    ]


def crossing_box(frames: list[np.ndarray]) -> Iterable[Any]:
    """The frames of a clip, with a quarter-wide box that moves from the left quarter to the right one."""
    from diffmae_video.rendering.frames import Frame

    height, width = frames[0].shape[:2]
    for number, rgb in enumerate(frames):
        left = round(width * (0.125 + 0.5 * number / max(1, len(frames) - 1)))
        hidden = np.zeros((height, width), dtype=bool)
        hidden[height // 4 : height * 3 // 4, left : left + width // 4] = True
        yield Frame(number, rgb, hidden)


# --- the edge of small holes -----------------------------------------------------------------------------------------


def edges(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Boxes that lie across the patches, by what is done about their edges: PSNR of the hidden pixels, and the step
    from the last visible pixel to the first painted one, beside that of the source (0 to 255)."""
    from diffmae_video.rendering.frames import Frame
    from diffmae_video.rendering.inpaint import Inpainter
    from diffmae_video.rendering.source import VideoSource

    model = load_diffmae(options.run).eval().to(options.device)
    rows = []
    for share in (0.1, 0.2, 0.4):
        places = np.random.default_rng(0)  # the same boxes for every size of them
        boxes = []
        for path in options.clips:
            source = VideoSource(path)
            frames = [frame.rgb for frame in islice(source, 2 * model.settings.frames)]
            source.close()
            height, width = frames[0].shape[:2]
            side = round(min(height, width) * share)
            top, left = (int(places.integers(side // 2, n - side * 3 // 2)) for n in (height, width))
            boxes.append((frames, slice(top, top + side), slice(left, left + side)))
        for blend in (False, True):
            errors, steps_, natural = [], [], []
            for frames, ys, xs in boxes:
                hidden = np.zeros(frames[0].shape[:2], dtype=bool)
                hidden[ys, xs] = True
                settings = RenderSettings(steps=options.steps, blend=blend)
                inpainter = Inpainter(model, settings, stride=2, seed=0)
                for frame in inpainter.stream(Frame(n, rgb, hidden) for n, rgb in enumerate(frames)):
                    difference = frame.result().astype(float) - frame.source
                    errors.append(float((difference[hidden] ** 2).mean()))
                    steps_.append(step_at(frame.result(), ys, xs))
                    natural.append(step_at(frame.source, ys, xs))
            rows.append(
                {
                    "side of the box": f"{share:.0%}",
                    "blend": blend,
                    "psnr_hidden": psnr_of(float(np.mean(errors))),
                    "step at the edge": float(np.mean(steps_)),
                    "in the source": float(np.mean(natural)),
                    "clips": len(boxes),
                }
            )
    return rows


def step_at(rgb: np.ndarray, ys: slice, xs: slice) -> float:
    """Mean absolute difference across the four edges of a box."""
    image = rgb.astype(float)
    across = [image[y, xs] - image[y - 1, xs] for y in (ys.start, ys.stop)]
    across += [image[ys, x] - image[ys, x - 1] for x in (xs.start, xs.stop)]
    return float(np.mean([np.abs(one).mean() for one in across]))


if __name__ == "__main__":
    main()
