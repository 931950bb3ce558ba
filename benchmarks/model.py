"""Speed and memory of pre-training and sampling, beside transformers' VideoMAEForPreTraining, in one run.

    python benchmarks/model.py train --sizes small base --out benchmarks/results/model-train.json
    python benchmarks/model.py train --sizes base --types bfloat16 --compile --out model-compiled.json
    python benchmarks/model.py memory --sizes small base --out benchmarks/results/model-memory.json
    python benchmarks/model.py sample --out benchmarks/results/model-sample.json

Training: forward and backward of 16 x 224 x 224 clips, 90 % masked, random data, no optimizer. The arms take turns, and
each turn is followed by a matrix product of the same type (2048^3), so that "of peak" compares like with like on a busy
machine. In bf16 our arms use the kernels that the training engine swaps in; `--plain` adds each without them.
`--compile` adds every arm once more under torch.compile; the time of compiling is kept apart. Peak memory
comes from a fresh process an arm. Sampling: one step with the encoding kept and with the encoder run again, and whole
chains, in CPU time: give it one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffmae_video.compat  # noqa: F401

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffmae_video.config import ModelSettings
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.kernels import use_cpu_bf16
from diffmae_video.models.presets import PRESETS

GRID = (8, 14, 14)
DECODERS = {"small": (192, 3), "base": (384, 6)}  # VideoMAE's own, 4 blocks
ARMS = ("transformers VideoMAE", "mae, joint", "diffmae, cross_self", "diffmae, cross, loss_tokens 0.5")
VARIANTS = ("", "compiled", "plain")
"""As the training engine runs it; under torch.compile; without the kernels for bf16 on CPUs."""


def settings(size: Any, arm: str) -> ModelSettings:
    """Ours for an arm: an equal joint decoder for `mae`, the default video decoder for `diffmae`."""
    width, heads = DECODERS[size]
    if arm == "mae, joint":
        changes: dict[str, Any] = {"objective": "mae", "decoder": "joint", "timestep": "none", "target": "norm_pixel"}
        return ModelSettings(preset=size, decoder_width=width, decoder_heads=heads, decoder_depth=4, **changes)
    if arm == "diffmae, cross_self":
        return ModelSettings(preset=size)
    return ModelSettings(preset=size, decoder="cross", loss_tokens=0.5)


def make_step(size: str, arm: str, batch: int, dtype: torch.dtype, variant: str = "") -> Callable[[], None]:
    """A function that does one forward and backward on fixed random clips; `variant` is one of VARIANTS."""
    compiled = variant == "compiled"
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(batch, 3, 16, 224, 224, generator=generator)
    mask = make_mask("tube", 0.9, GRID, range(batch))  # theirs needs equal counts: both see 160 tokens
    if arm == ARMS[0]:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining

        preset, (width, heads) = PRESETS[size], DECODERS[size]
        options: dict[str, Any] = {"attn_implementation": "sdpa"}  # not among the declared arguments
        config = VideoMAEConfig(
            hidden_size=preset.width,
            num_hidden_layers=preset.depth,
            num_attention_heads=preset.heads,
            intermediate_size=4 * preset.width,
            decoder_hidden_size=width,
            decoder_num_attention_heads=heads,
            decoder_num_hidden_layers=4,
            decoder_intermediate_size=4 * width,
            use_mean_pooling=False,
            **options,
        )
        peer, theirs = VideoMAEForPreTraining(config).train(), clips.transpose(1, 2).contiguous()
        parameters = list(peer.parameters())
        if compiled:
            peer.compile()

        def loss() -> torch.Tensor:
            return peer(theirs, bool_masked_pos=mask.grid).loss
    else:
        model = DiffMAE(settings(size, arm)).train()
        if dtype == torch.bfloat16 and variant != "plain":
            use_cpu_bf16(model)
        parameters = list(model.parameters())
        if compiled:
            model.compile()

        def loss() -> torch.Tensor:  # drawing noise is part of our step
            return model(clips, mask, model.draw(range(batch), mask)).loss

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def probe(dtype: torch.dtype) -> float:
    """GFLOP/s of a 2048^3 matrix product now."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    torch.mm(a, b)
    begin = time.perf_counter()
    for _ in range(4):
        torch.mm(a, b)
    return 4 * 2 * 2048**3 / (time.perf_counter() - begin) / 1e9


def flops(size: str, arm: str, batch: int) -> float:
    """Floating-point operations of a step, attention counted as its plain matrix products, nothing computed twice."""
    step = make_step(size, arm, batch, torch.float32)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        step()
    return counter.get_total_flops()


def train(
    sizes: list[str], types: list[str], batch: int, rounds: int, arms: list[str], variants: list[str]
) -> list[dict[str, Any]]:
    """Interleaved timings of all arms."""
    rows = []
    for size in sizes:
        work = {arm: flops(size, arm, batch) for arm in arms}
        for name in types:
            dtype = getattr(torch, name)
            steps, first = {}, {}
            for arm, variant in itertools.product(arms, variants):
                if variant == "plain" and (arm == ARMS[0] or dtype != torch.bfloat16):
                    continue
                step = steps[arm, variant] = make_step(size, arm, batch, dtype, variant)
                begin = time.perf_counter()
                step()
                first[arm, variant] = time.perf_counter() - begin
            seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
            peaks: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
            for _ in range(rounds):
                for key, step in steps.items():
                    begin = time.perf_counter()
                    step()
                    seconds[key].append(time.perf_counter() - begin)
                    peaks[key].append(probe(dtype))
            medians = {key: statistics.median(values) for key, values in seconds.items()}
            for key, median in medians.items():
                arm, variant = key
                peer, peak = medians[ARMS[0], ""], statistics.median(peaks[key])
                row = {
                    "size": size,
                    "type": name,
                    "arm": arm,
                    "variant": variant,
                    "clips_per_second": round(batch / median, 3),
                    "against_transformers": round(peer / median, 3),
                    "gflop": round(work[arm] / 1e9, 1),
                    "of_matmul_peak": round(work[arm] / 1e9 / median / peak, 3),
                    "bound_against_transformers": round(peer * peak * 1e9 / work[arm], 2),
                    "seconds": [round(value, 3) for value in seconds[key]],
                }
                if variant == "compiled":
                    row["against_transformers_compiled"] = round(medians[ARMS[0], "compiled"] / median, 3)
                    row["seconds_of_first_step"] = round(first[key], 1)
                rows.append(row)
                print(rows[-1], flush=True)
            del steps
    return rows


def memory(sizes: list[str], types: list[str], batch: int) -> list[dict[str, Any]]:
    """Peak resident memory of two steps, each arm in a process of its own."""
    rows = []
    for size, name, arm in itertools.product(sizes, types, ARMS):
        command = [sys.executable, __file__, "peak", "--size", size, "--arm", arm, "--batch", str(batch)]
        done = subprocess.run([*command, "--types", name], check=True, capture_output=True, text=True)
        rows.append({"size": size, "type": name, "arm": arm, "peak_memory_mb": int(done.stdout.split()[-1])})
        print(rows[-1], flush=True)
    return rows


def sample(size: Any, pixels: int, chains: list[int]) -> list[dict[str, Any]]:
    """A sampling step with the encoding kept beside one that encodes again; chains of DDIM and of DDPM steps."""
    model = DiffMAE(ModelSettings(preset=size, size=(pixels, pixels))).eval()
    clips = torch.randn(1, 3, 16, pixels, pixels, generator=torch.Generator().manual_seed(0))
    rows = []
    for ratio in (0.9, 0.75, 0.5):
        mask = make_mask("random", ratio, model.encoder.shape, [0])
        noisy, when = torch.randn(1, mask.masked.shape[1], model.space.noised), torch.tensor([500])
        with torch.no_grad():
            encoding = model.encode(clips, mask)
            arms = {
                "kept": lambda n=noisy, w=when, e=encoding: model.denoise(n, w, e),
                "again": lambda n=noisy, w=when, m=mask: model.denoise(n, w, model.encode(clips, m)),
            }
            seconds = _medians(arms, 9)
        row = {"size": size, "pixels": pixels, "mask": ratio}
        row |= {f"step_ms_encoding_{name}": round(1e3 * value, 1) for name, value in seconds.items()}
        rows.append(row | {"ratio": round(seconds["again"] / seconds["kept"], 2)})
        print(rows[-1], flush=True)
    if chains:
        mask = make_mask("random", 0.9, model.encoder.shape, [0])
        for sampler, steps in zip(("ddim", "ddpm"), chains, strict=True):
            begin = time.process_time()
            model.sample(clips, mask, seeds=[0], sampler=sampler, steps=steps)
            taken = time.process_time() - begin
            row = {"size": size, "pixels": pixels, "sampler": sampler, "steps": steps, "cpu_seconds": round(taken, 2)}
            rows.append(row | {"cpu_seconds_a_step": round(taken / steps, 4)})
            print(rows[-1], flush=True)
    return rows


def _medians(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of functions that take turns, after one unmeasured turn."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            begin = time.process_time()
            arm()
            times[name].append(time.process_time() - begin)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "memory", "peak", "sample"])
    parser.add_argument("--sizes", nargs="+", default=["small", "base"], choices=list(DECODERS))
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--size", default="small", choices=list(PRESETS), help="of `peak` and `sample`")
    parser.add_argument("--arm", choices=ARMS, help="of `peak`: the memory of this process after two steps")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="of `train`, with the first")
    parser.add_argument("--compile", action="store_true", help="of `train`: each arm under torch.compile as well")
    parser.add_argument("--plain", action="store_true", help="of `train`: ours in bf16 without swapped kernels as well")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pixels", type=int, default=112, help="of `sample`")
    parser.add_argument("--chains", nargs="*", type=int, default=[50, 1000], help="of `sample`: DDIM and DDPM steps")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "peak":
        step = make_step(arguments.size, arguments.arm, arguments.batch, getattr(torch, arguments.types[0]))
        for _ in range(2):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    if arguments.what == "train":
        arms = [arm for arm in ARMS if arm in arguments.arms or arm == ARMS[0]]
        variants = ["", *["compiled"] * arguments.compile, *["plain"] * arguments.plain]
        rows = train(arguments.sizes, arguments.types, arguments.batch, arguments.rounds, arms, variants)
    elif arguments.what == "memory":
        rows = memory(arguments.sizes, arguments.types, arguments.batch)
    else:
        rows = sample(arguments.size, arguments.pixels, arguments.chains)
    if arguments.out:
        machine = {"processor": platform.processor() or platform.machine(), "threads": arguments.threads}
        report = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__, "machine": machine}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
