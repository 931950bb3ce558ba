"""Seconds of one inpainting window: default steps with one encoding beside 1000 steps that encode at each step.

    python benchmarks/inpainting.py --preset tiny --frames 16 --size 112 --device cpu

Writes a line of JSON to stdout and appends it to benchmarks/results/inpainting.jsonl. The naive side is timed on
`--naive-steps` of its steps and scaled to 1000, since each step costs the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from diffmae_video.config import DiffusionSettings, ModelSettings
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import grid_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--naive-steps", type=int, default=20)
    parser.add_argument("--mask", type=float, default=0.75)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    settings = ModelSettings(preset=options.preset, frames=options.frames, size=(options.size, options.size))
    torch.manual_seed(0)
    model = DiffMAE(settings, DiffusionSettings()).eval().to(options.device)
    shape = grid_shape(settings.frames, *settings.size, settings.tubelet, settings.patch)
    mask = make_mask("random", options.mask, shape, [0]).to(options.device)
    clips = torch.rand(1, 3, settings.frames, *settings.size, device=options.device) * 2 - 1

    def naive() -> None:
        for step in range(options.naive_steps):
            encoding = model.encode(clips, mask)
            noisy = torch.randn(1, mask.masked.shape[1], model.patch_values, device=clips.device)
            model.denoise(noisy, torch.full((1,), 999 - step, device=clips.device), encoding)

    with torch.inference_mode(), torch.autocast(torch.device(options.device).type, torch.bfloat16, options.bf16):
        fast = _seconds(lambda: model.sample(clips, mask, seeds=[0], steps=options.steps), options.device)
        slow = _seconds(naive, options.device) / options.naive_steps * 1000
    row = {
        **vars(options),
        "seconds": round(fast, 4),
        "seconds_1000_steps_encoding_each": round(slow, 3),
        "times_faster": round(slow / fast, 1),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    results = Path(__file__).parent / "results" / "inpainting.jsonl"
    results.parent.mkdir(exist_ok=True)
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


def _seconds(work, device: str) -> float:  # type: ignore[no-untyped-def]
    """Median of three runs after a warm-up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


if __name__ == "__main__":
    main()
