"""Speed of the stages on this machine: alone, and with a busy neighbour.

    python benchmarks/machines.py --variant default --variant spin0:GOMP_SPINCOUNT=0 --out machines.json

Each variant is a process of its own with those environment variables (`NAME[:VARIABLE=VALUE,...]`), which imports
PyTorch once and runs the commands of the stages when asked. Variants and conditions take turns, round by round; the
table shows medians. The neighbour is one process that never sleeps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STAGES = ("pretrain", "finetune", "eval", "render")
PRETRAIN = ["--recipe", "demo", "--set", "train.steps=120", "--set", "train.log_every=20"]
QUICK = ["--set", "train.picture_every=0", "--resume", "never"]
FINETUNE = ["--recipe", "demo", "--set", "train.steps=100", "--set", "train.log_every=20"]


def serve() -> None:
    """Child: read a stage's name a line, write its speed a line."""
    from diffmae_video.cli.app import app

    counter = 0
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def call(*arguments: str) -> float:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            app([*arguments], standalone_mode=False)
        return time.perf_counter() - start

    def rate(folder: str) -> float:
        lines = [json.loads(text) for text in Path(folder, "metrics.jsonl").read_text().splitlines()]
        return statistics.median([line["clips_per_s"] for line in lines if "clips_per_s" in line][1:])

    for line in sys.stdin:
        stage, counter = line.strip(), counter + 1
        out = f"{os.getpid()}-{stage}-{counter}"
        if stage == "pretrain":
            call("pretrain", "--video", "--data", "shards", "--out", out, *PRETRAIN, *QUICK)
            speed = rate(out)
        elif stage == "finetune":
            call(
                *("finetune", "--task", "demo", "--data", "shards", "--init", "model", "--out", out), *FINETUNE, *QUICK
            )
            speed = rate(out)
        elif stage == "eval":
            speed = 160 / call("eval", "--task", "demo", "--data", "shards", "--checkpoint", "classifier", "--out", out)
        else:
            arguments = ("--checkpoint", "model", "--steps", "100", "--seed", "1", "--out", out)
            speed = 100 / call("render-inpaint", "clip.mp4", *arguments)
        answers.write(json.dumps(speed) + "\n")
        answers.flush()


def prepare(folder: Path) -> None:
    """Clips, shards, a model and a classifier that have seen a few steps."""
    run = [sys.executable, "-c", "from diffmae_video.cli.app import main; main()"]
    few = ["--set", "train.steps=2"]
    for arguments in (
        ["demo-data", "clips", "--train", "400", "--val", "160"],
        ["shard", "clips", "shards"],
        ["pretrain", "--video", "--data", "shards", "--out", "model", *PRETRAIN, *QUICK, *few],
        *[["finetune", "--task", "demo", "--data", "shards", "--init", "model", "--out", "classifier", *FINETUNE]],
    ):
        extra = few if arguments[0] == "finetune" else []
        done = subprocess.run([*run, *arguments, *extra], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    clip = min(path for path in (folder / "clips").rglob("*") if path.suffix in (".mp4", ".mkv", ".avi"))
    shutil.copy(clip, folder / "clip.mp4")


def spin() -> None:
    """The neighbour."""
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--variant", action="append", default=None)
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep clips, shards and models there")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "clip.mp4").exists():
            prepare(folder)
        found = measure(folder, options.variant or ["default"], options.stage or STAGES, options.rounds)
    report(found)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "rounds": options.rounds, "speeds": found}, indent=1))


def measure(folder: Path, variants: list[str], stages: Any, rounds: int) -> dict[str, Any]:
    """variant -> stage -> condition -> speeds, one a round."""
    children = {}
    for variant in variants:
        name, _, settings = variant.partition(":")
        environment = {**os.environ, **dict(part.split("=", 1) for part in settings.split(",") if part)}
        environment["DIFFMAE_WORKSPACE"] = str(folder)
        children[name] = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(name: str, stage: str) -> float:
        child = children[name]
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{stage}\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    speeds: dict[str, Any] = {name: {s: {"alone": [], "shared": []} for s in stages} for name in children}
    for name in children:  # imports, caches
        for stage in stages:
            ask(name, stage)
    for _ in range(rounds):
        for condition in ("alone", "shared"):
            neighbour = multiprocessing.Process(target=spin, daemon=True) if condition == "shared" else None
            if neighbour:
                neighbour.start()
            for stage in stages:
                for name in children:
                    speeds[name][stage][condition].append(ask(name, stage))
            if neighbour:
                neighbour.kill()
                neighbour.join()
    for child in children.values():
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
    return speeds


def report(found: dict[str, Any]) -> None:
    """Medians, and the share of the speed that is left beside a neighbour."""
    print(f"{'variant':14}{'stage':10}{'alone':>9}{'shared':>9}{'share':>7}")
    for name, stages in found.items():
        for stage, speeds in stages.items():
            alone, shared = (statistics.median(speeds[condition]) for condition in ("alone", "shared"))
            print(f"{name:14}{stage:10}{alone:9.1f}{shared:9.1f}{shared / alone:7.2f}")


def machine() -> dict[str, Any]:
    """What this ran on."""
    import torch

    from diffmae_video.training.hardware import choose_precision, core_count

    precision, why = choose_precision(torch.device("cpu"))
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": core_count(),
        "torch": torch.__version__,
        "precision": f"{precision} ({why})",
    }


if __name__ == "__main__":
    main()
