"""Pre-training and inpainting on a GPU, beside transformers' VideoMAEForPreTraining in the same run.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --small         # the same code in a minute, to see that it runs

Training reads 16 x 224 x 224 clips from shards on disk (`--data`, else embedded clips are made for it) through the
training loop, optimizer included, eager and compiled; the peer trains on one batch that lies on the device. "Of peak"
is of a matrix product of 8192^3 timed just before; our FLOPs are counted by torch, what is computed twice once.
Inpainting is one clip through `DiffMAE.sample` with the defaults of render-inpaint. The profile is of eager steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffmae_video.compat  # noqa: F401

import torch

from diffmae_video.config import load_settings
from diffmae_video.data.synthetic import write_demo_data
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.presets import resolve
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.pretrain import pretrain
from diffmae_video.pipelines.pretrain_plan import useful_flops
from diffmae_video.pipelines.shard import ShardJob, shard
from diffmae_video.training.hardware import autocast, choose_precision, describe_machine

RECIPES = {"video-base": 64, "video-large": 32, "videomae-base": 64}
"""Recipes, and clips in a step."""
SMALL = (
    *("model.size=[32, 32]", "model.frames=4", "model.width=32", "model.depth=2", "model.heads=2"),
    *("model.decoder_width=32", "model.decoder_heads=2", "model.decoder_depth=1"),
)


def peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a matrix product of random numbers, the best of 10."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(12)][2:]
    return 2 * size**3 / min(times)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of a call, the device's part included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def held(device: torch.device) -> float | None:
    """The most memory that tensors took since the last call, GiB; None where nobody counts."""
    if device.type != "cuda":
        return None
    value = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return value


def overrides(recipe: str, options: argparse.Namespace, precision: str) -> tuple[str, ...]:
    """What all arms of a recipe share."""
    return (
        *(SMALL if options.small else ()),
        f"train.batch_size={4 if options.small else options.batch or RECIPES[recipe]}",
        f"train.precision={precision}",
        f"data.workers={options.workers}",
        *("data.repeats=2", "data.stride=1", "data.eval_split=none"),
    )


def ours(recipe: str, compiled: bool, options: argparse.Namespace, shards: str, out: Path, precision: str) -> dict:
    """Clips a second, peak memory and data wait of a training, medians over the steps behind the first five."""
    job = Job(
        recipe=recipe,
        overrides=(
            *overrides(recipe, options, precision),
            f"train.steps={options.steps}",
            f"train.compile={str(compiled).lower()}",
            *("train.accumulate=1", "train.log_every=1", "train.checkpoint_every=100000", "train.picture_every=0"),
        ),
        data=shards,
        out=out,
        device=options.device,
    )
    result = pretrain(job)
    assert result.directory is not None
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "clips_per_s" in line and line["step"] > min(5, options.steps // 2)]
    median = {key: statistics.median(line[key] for line in lines) for key in ("clips_per_s", "data_wait")}
    return median | {"memory_gib": held(torch.device(options.device))}


def videomae(recipe: str, compiled: bool, options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """The same of transformers' VideoMAE of the same size: a batch on the device, fused AdamW, SDPA, 90% masked."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    settings = load_settings(recipe, "pretrain", overrides(recipe, options, precision))
    model, batch, device = settings.model, settings.train.batch_size, torch.device(options.device)
    width, depth, heads = resolve(model)
    decoder = (model.decoder_width, model.decoder_heads) if options.small else {768: (384, 6), 1024: (512, 8)}[width]
    peer: Any = VideoMAEConfig
    config = peer(
        image_size=model.size[0],
        patch_size=model.patch,
        num_frames=model.frames,
        tubelet_size=model.tubelet,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        decoder_hidden_size=decoder[0],
        decoder_num_attention_heads=decoder[1],
        decoder_num_hidden_layers=4,
        decoder_intermediate_size=4 * decoder[0],
        use_mean_pooling=False,
        attn_implementation="sdpa",
    )
    network: Any = VideoMAEForPreTraining(config)
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")
    clips = torch.randn(batch, model.frames, 3, *model.size, device=device)
    grid = (model.frames // model.tubelet, model.size[0] // model.patch, model.size[1] // model.patch)
    mask = make_mask("tube", 0.9, grid, range(batch)).grid.to(device)
    if compiled:
        network.compile()

    def step() -> None:
        with autocast(device, precision):
            loss = network(clips, bool_masked_pos=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = [seconds(step, device) for _ in range(options.steps)][min(5, options.steps // 2) :]
    return {"clips_per_s": batch / statistics.median(times), "data_wait": 0.0, "memory_gib": held(device)}


def inpainting(recipe: str, options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Seconds to fill 75% of one clip, and of one denoising step."""
    settings = load_settings(recipe, "render", overrides(recipe, options, precision))
    device, render = torch.device(options.device), settings.render
    model = DiffMAE(settings.model, settings.diffusion).to(device).eval()
    clip = torch.rand(1, 3, settings.model.frames, *settings.model.size, device=device)
    mask = make_mask("random", 0.75, model.encoder.shape, [0]).to(device)

    def fill(steps: int) -> None:
        with autocast(device, precision):
            chosen = {"sampler": render.sampler, "steps": steps, "borrow_statistics": model.target.borrows}
            model.sample(clip, mask, seeds=[0], **chosen)

    times = {steps: [seconds(lambda n=steps: fill(n), device) for _ in range(5)][2:] for steps in (1, render.steps)}
    found = {f"steps_{steps}_s": round(statistics.median(values), 4) for steps, values in times.items()}
    return {"recipe": recipe, "sampler": render.sampler, **found, "memory_gib": held(device)}


def profile(recipe: str, options: argparse.Namespace, precision: str) -> list[dict[str, Any]]:
    """What the time of a step goes to: the device's part by operator, most first."""
    settings = load_settings(recipe, "pretrain", overrides(recipe, options, precision))
    device, batch = torch.device(options.device), settings.train.batch_size
    model = DiffMAE(settings.model, settings.diffusion).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    clips = torch.rand(batch, 3, settings.model.frames, *settings.model.size, device=device)

    def step() -> None:
        with torch.profiler.record_function("masks and noise"):
            mask = make_mask(settings.mask.kind, settings.mask.ratio, model.encoder.shape, range(batch)).to(device)
            draw = model.draw(range(batch), mask)
        with torch.profiler.record_function("forward"), autocast(device, precision):
            loss = model(clips, mask, draw).loss
        with torch.profiler.record_function("backward"):
            loss.backward()
        with torch.profiler.record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(2):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(3):
            seconds(step, device)
    rows = []
    for event in recorded.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        rows.append(
            {
                "name": event.key,
                "calls": event.count / 3,
                "device_ms": round(own / 3000, 3),
                "host_ms": round(event.cpu_time_total / 3000, 3),
            }
        )
    held(device)
    stages = [row for row in rows if row["name"] in ("masks and noise", "forward", "backward", "optimizer")]
    rest = sorted((row for row in rows if row not in stages), key=lambda row: -row["device_ms"])
    return [*stages, *rest[:16]]


def make_shards(folder: Path, small: bool) -> Path:
    """Shards of embedded clips: 256 pixels a side, 32 frames (small: 32 pixels, 8 frames)."""
    count, size, frames = (16, 32, 8) if small else (128, 256, 32)
    write_demo_data(folder / "clips", train=count, val=2, size=size, frames=frames)
    shard(ShardJob(folder / "clips", folder / "shards"))
    return folder / "shards"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="models and clips of a few thousand values")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--data", help="shards of videos")
    parser.add_argument("--batch", type=int, help="clips in a step; 64 or 32 by default")
    parser.add_argument("--steps", type=int, help="of each arm; 30, or 4 with --small")
    parser.add_argument("--workers", type=int, help="that decode; 12, or 0 with --small")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    options.steps = options.steps or (4 if options.small else 30)
    options.workers = options.workers if options.workers is not None else 0 if options.small else 12
    device = torch.device(options.device)
    precision, why = choose_precision(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    rate = peak(device, dtype, 512 if options.small else 8192)
    found: dict[str, Any] = {
        "machine": describe_machine(device),
        "precision": f"{precision} ({why})",
        "matrix_product_tflops": round(rate / 1e12, 2),
        "training": [],
    }
    print(f"{found['machine']['device']}, torch {torch.__version__}, {precision}: {rate / 1e12:.1f} TFLOP/s\n")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DIFFMAE_WORKSPACE"] = folder
        shards = options.data or str(make_shards(Path(folder), options.small))
        for recipe in options.recipes:
            settings = load_settings(recipe, "pretrain", overrides(recipe, options, precision))
            flops = useful_flops(settings)
            for compiled in (False,) if options.eager else (False, True):
                out = Path(folder) / f"{recipe}-{compiled}"
                arms = {
                    "diffmae-video": ours(recipe, compiled, options, shards, out, precision),
                    "transformers VideoMAE": videomae(recipe, compiled, options, precision),
                }
                for arm, row in arms.items():
                    mfu = row["clips_per_s"] * flops / rate if arm == "diffmae-video" else None
                    line = {"recipe": recipe, "arm": arm, "compiled": compiled, **row, "of_peak": mfu}
                    line = {key: round(v, 4) if isinstance(v, float) else v for key, v in line.items()}
                    found["training"].append(line)
                    print(json.dumps(line), flush=True)
                    save(found, options.out)
        found["inpainting"] = [inpainting(recipe, options, precision) for recipe in options.recipes[:2]]
        found["profile"] = profile(options.recipes[0], options, precision)
    print("\n| recipe | who | compiled | clips/s | of peak | memory GiB | data wait |\n|---|---|---|---|---|---|---|")
    for row in found["training"]:
        share = "" if row["of_peak"] is None else f"{row['of_peak']:.1%}"
        print(
            f"| {row['recipe']} | {row['arm']} | {row['compiled']} | {row['clips_per_s']:.1f} | {share} | "
            f"{row['memory_gib'] or 0:.1f} | {row['data_wait']:.1%} |"
        )
    print()
    for row in found["inpainting"]:
        print(json.dumps(row))
    print("\n| step of three | calls | device ms | host ms |\n|---|---|---|---|")
    for row in found["profile"]:
        print(f"| {row['name'][:60]} | {row['calls']:.0f} | {row['device_ms']} | {row['host_ms']} |")
    save(found, options.out)


def save(found: dict[str, Any], out: Path | None) -> None:
    """Write what was measured so far."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
