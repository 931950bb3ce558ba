"""The training engine: what several processes, the loop, the data and memory cost.

    python benchmarks/training.py processes [--rounds 3]   two processes of one thread beside one process of two
    python benchmarks/training.py overhead                 time of a step outside forward, backward, optimizer, data
    python benchmarks/training.py rss [--steps 5000]       resident memory of the run and its worker over many steps
    python benchmarks/training.py data                     the stream alone, the model alone, and both together
    python benchmarks/training.py memory                   the peak that --dry-run predicts beside a real step's

Each prints Markdown, and with `--json FILE` adds its figures to a file under its name. Data are embedded clips, written
to a temporary folder. `rss` and `memory` read /proc, so they need Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from diffmae_video.config import Settings, load_settings
from diffmae_video.data.synthetic import write_demo_data
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.pipelines.plan import measure
from diffmae_video.pipelines.shard import ShardJob, shard
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.loop import train
from diffmae_video.training.pretraining import PretrainTask
from diffmae_video.training.run import Run, claim, run_identity
from diffmae_video.training.streams import open_stream

COMMAND = [sys.executable, "-c", "from diffmae_video.cli.app import main; main()"]
PLAIN = ("train.picture_every=0", "data.eval_split=none")  # validation then reads the training split, once at the end
MIB = 2**20


def make_shards(folder: Path, clips: int = 256) -> Path:
    """Shards of embedded clips (64x64, 16 frames)."""
    write_demo_data(folder / "clips", train=clips, val=16, size=64, frames=16, workers=1)
    shard(ShardJob(folder / "clips", folder / "shards", workers=1))
    return folder / "shards"


def pretrain(
    shards: Path, out: Path, recipe: str, overrides: list[str], *options: str, threads: int | None = None
) -> subprocess.Popen[bytes]:
    """Start `diffmae pretrain` in a process of its own; without `threads` it takes its share of the cores."""
    words = ["pretrain", "--data", str(shards), "--out", str(out), "--recipe", recipe, "--device", "cpu", *options]
    for text in (*PLAIN, *overrides):
        words += ["--set", text]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    environment["DIFFMAE_WORKSPACE"] = str(out.parent)
    return subprocess.Popen([*COMMAND, *words], env=environment, stdout=subprocess.DEVNULL)


def lines_of(out: Path, column: str, after: int = 0) -> list[float]:
    """A column of metrics.jsonl from the steps behind `after`."""
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[column] for line in lines if column in line and line["step"] > after]


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that must succeed."""
    if process.wait() != 0:
        raise SystemExit(f"the run failed with code {process.returncode}")


def processes(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Clips a second of one process with all cores as threads, and of a process a core, interleaved."""
    shards, cores = make_shards(folder, 64), len(os.sched_getaffinity(0))
    sizes = [f"train.steps={options.steps or 10}", "train.batch_size=16", "train.log_every=1", "data.workers=0"]
    model = ["model.size=[96, 96]", "train.checkpoint_every=1000"]
    rates: dict[int, list[float]] = {1: [], cores: []}
    for round_ in range(options.rounds):
        for count in rates:
            out = folder / f"run-{round_}-{count}"
            finish(pretrain(shards, out, "video-tiny", sizes + model, "--nproc", str(count)))
            rates[count].append(statistics.median(lines_of(out, "clips_per_s", after=2)))
    one, many = (statistics.median(found) for found in rates.values())
    print(f"| processes x threads | clips/s, {options.rounds} rounds | median |\n|---|---|---|")
    for count, found in rates.items():
        listed = ", ".join(f"{rate:.2f}" for rate in found)
        print(f"| {count} x {cores // count} | {listed} | {statistics.median(found):.2f} |")
    print(f"\nratio {many / one:.3f} (goal 0.95)")
    return {"model": "video-tiny 16x96x96, batch 16", "clips_per_s": rates, "ratio": round(many / one, 4)}


def overhead(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Share of the time that is neither model nor data, with the demo's nano model; saves and logs as in any run."""
    shards, steps = make_shards(folder), options.steps or 600
    out = folder / "run"
    finish(pretrain(shards, out, "demo", [f"train.steps={steps}", "train.checkpoint_every=200"]))
    columns = ("overhead", "other_s", "data_wait", "clips_per_s")
    found = {name: statistics.mean(lines_of(out, name, after=50)) for name in columns}
    print("| overhead | s of saving, a line | waiting for data | clips/s |\n|---|---|---|---|")
    print("| {overhead:.2%} | {other_s:.3f} | {data_wait:.2%} | {clips_per_s:.1f} |".format(**found))
    return {"model": "demo (nano, batch 16)", "steps": steps, **{name: round(v, 5) for name, v in found.items()}}


def rss(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Resident memory of a run and of its data worker, sampled while it trains, checkpoints and logs."""
    shards, steps, out = make_shards(folder, 64), options.steps or 5000, folder / "run"
    small = ["model.size=[16, 16]", "model.frames=4", "train.batch_size=8", "data.workers=1", "train.log_every=10"]
    often = [f"train.steps={steps}", "train.checkpoint_every=250", "train.picture_every=500", "train.ema=0.99"]
    process = pretrain(shards, out, "smoke", small + often, threads=1)
    samples: list[tuple[int, float, float]] = []  # step, MiB of the run, MiB of its workers
    while process.poll() is None:
        time.sleep(0.5)
        try:
            step = (lines_of(out, "step") or [0])[-1]
            main = psutil.Process(process.pid)
            workers = sum(child.memory_info().rss for child in main.children(recursive=True))
            samples.append((int(step), main.memory_info().rss / MIB, workers / MIB))
        except (OSError, ValueError, psutil.Error):
            continue
    finish(process)
    warm = [sample for sample in samples if sample[0] >= steps // 5]  # buffers have their sizes by then
    third = max(1, len(warm) // 3)
    result: dict[str, Any] = {"steps": steps, "samples": len(warm)}
    print("| process | MiB, first third after warm-up | last third | growth |\n|---|---|---|---|")
    for column, name in ((1, "training"), (2, "workers")):
        first, last = (statistics.median(s[column] for s in part) for part in (warm[:third], warm[-third:]))
        result[name] = {"first_mib": round(first, 1), "last_mib": round(last, 1)}
        print(f"| {name} | {first:.1f} | {last:.1f} | {last - first:+.1f} |")
    return result


class Repeated:
    """A stream that gives its first batch for ever: the model alone."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.samples_per_epoch = stream, stream.samples_per_epoch

    def __iter__(self) -> Iterator[Any]:
        batch = next(iter(self.stream))
        while True:
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None:
        self.stream.close()


def data(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Clips a second of the stream, of the model, and of training, by number of workers."""
    shards, steps, rows = options.shards or make_shards(folder), options.steps or 30, []
    sizes = ["model.size=[64, 64]"] if options.shards is None else []
    torch.set_num_threads(1)  # the other core decodes
    for number in (0, 1, 2):
        fixed = [f"train.steps={steps}", "train.batch_size=16", "train.log_every=5", f"data.workers={number}", *PLAIN]
        settings = load_settings(options.recipe, "pretrain", [*fixed, *sizes, *options.set, f"data.path={shards}"])
        alone = _stream_rate(settings, steps)
        model, _ = _train_rate(settings, folder / f"model-{number}", repeated=True)
        both, wait = _train_rate(settings, folder / f"both-{number}")
        rows.append({"workers": number, "stream": alone, "model": model, "training": both, "data_wait": wait})
    print("| workers | stream alone, clips/s | model alone | training | waiting for data |\n|---|---|---|---|---|")
    for row in rows:
        rates = " | ".join(f"{row[name]:.1f}" for name in ("stream", "model", "training"))
        print(f"| {row['workers']} | {rates} | {row['data_wait']:.1%} |")
    return {
        "recipe": options.recipe,
        "set": options.set,
        "shards": options.shards.name if options.shards else "embedded",
        "rows": rows,
    }


def _stream_rate(settings: Settings, batches: int) -> float:
    stream = open_stream(settings, 0, 1)
    iterator = iter(stream)
    for _ in range(5):  # workers are up, their queues are full
        next(iterator)
    begun = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - begun
    stream.close()
    return batches * settings.train.batch_size / seconds


class RepeatedTask(PretrainTask):
    """Pre-training on one batch again and again: what is left is the model."""

    def open_stream(self, rank: int, world: int) -> Any:
        return Repeated(super().open_stream(rank, world))


def _train_rate(settings: Settings, out: Path, repeated: bool = False) -> tuple[float, float]:
    kind = RepeatedTask if repeated else PretrainTask
    task = kind(DiffMAE(settings.model, settings.diffusion), settings, None, Distributed(), {})
    identity = run_identity(settings, "pretrain", "")
    with claim(out, identity):
        train(task, settings, Run(out, identity))
    rate, wait = (statistics.median(lines_of(out, name, after=5)) for name in ("clips_per_s", "data_wait"))
    return rate, wait


def memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Predicted and resident peak of real training steps, each in a process of its own."""
    cases = [
        ("video-tiny", 4, []),
        ("video-tiny", 16, []),
        ("video-tiny", 8, ["train.precision=fp32"]),
        ("video-tiny", 8, ["train.grad_checkpointing=true"]),
        ("image-tiny", 32, []),
        ("videomae-small", 4, []),
        ("video-base", 2, []),
    ]
    print("| recipe | clips | | predicted, MiB | resident, MiB | predicted / resident |\n|---|---|---|---|---|---|")
    rows = []
    for recipe, clips, overrides in cases:
        predicted = measure(load_settings(recipe, "pretrain", overrides), clips).memory() / MIB
        words = [sys.executable, __file__, "step", "--recipe", recipe, "--clips", str(clips), "--set", *overrides]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        real = json.loads(done.stdout.splitlines()[-1])["resident_mib"]
        rows.append(
            {"recipe": recipe, "clips": clips, "set": overrides, "predicted_mib": predicted, "resident_mib": real}
        )
        print(
            f"| {recipe} | {clips} | {', '.join(overrides)} | {predicted:.0f} | {real:.0f} | {predicted / real:.2f} |"
        )
    return {"rows": rows}


def step(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Three real steps here: how far resident memory rose above that of a warm process with a tiny model."""
    from diffmae_video.masking import make_mask
    from diffmae_video.models.patches import grid_shape
    from diffmae_video.training.optim import build_optimizer

    def run(settings: Settings, clips: int, steps: int) -> None:
        model = DiffMAE(settings.model, settings.diffusion).train()
        if settings.train.grad_checkpointing:
            model.set_grad_checkpointing(settings.train.grad_checkpointing)
        optimizer, seeds = build_optimizer(model, settings.train), list(range(clips))
        frames, size = settings.model.frames, settings.model.size
        mask = make_mask(
            settings.mask.kind, settings.mask.ratio, grid_shape(frames, *size, model.tubelet, model.patch), seeds
        )
        for _ in range(steps):
            draw = model.draw(seeds, mask)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.train.precision == "bf16"):
                loss = model(torch.randn(clips, 3, frames, *size), mask, draw).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    torch.set_num_threads(1)
    run(load_settings("smoke", "pretrain", options.set), 2, 1)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run(load_settings(options.recipe, "pretrain", options.set), options.clips, 3)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    result = {"resident_mib": (int(status["VmHWM"].split()[0]) * 1024 - before) / MIB}
    print(json.dumps(result))
    return result


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = {function.__name__: function for function in (processes, overhead, rss, data, memory, step)}
    parser.add_argument("what", choices=arms)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--shards", type=Path, help="of `data`, instead of embedded clips")
    parser.add_argument("--recipe", default="video-tiny", help="of `data` and `step`")
    parser.add_argument("--clips", type=int, default=4, help="of `step`")
    parser.add_argument("--set", nargs="*", default=[], help="of `data` and `step`: settings")
    parser.add_argument("--json", type=Path, help="file that receives the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["DIFFMAE_WORKSPACE"] = name
        result = arms[options.what](options, Path(name))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({"what": options.what, "machine": machine, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
