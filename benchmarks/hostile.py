"""What becomes of hostile files in the stages that read media: shard, pretrain and render-inpaint.

    python benchmarks/hostile.py FOLDER --out results.json

Every file of FOLDER goes through `diffmae shard` (all at once), into a tar as it is, past all checks of `shard`, so
that its bytes reach the training stream (each alone, then all in one `diffmae pretrain`), and through `diffmae
render-inpaint` (one call each). Told are outcome, seconds and growth of the peak memory, and what was left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

from diffmae_video.cli.app import run
from diffmae_video.config import Settings, with_overrides
from diffmae_video.data.shards import TarShard
from diffmae_video.data.stream import build_stream
from diffmae_video.data.synthetic import write_demo_data
from diffmae_video.errors import DataError
from diffmae_video.pipelines.index import index

CHILD = "_DIFFMAE_BENCHMARK_CHILD"
KINDS = {".avi": "avi", ".mkv": "mkv", ".webm": "webm", ".mov": "mov"}


def measured(action: Callable[[], str]) -> dict[str, object]:
    """Outcome, seconds, and MiB by which the peak of this process grew."""
    peak, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    outcome = action()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return {"outcome": outcome, "seconds": round(time.perf_counter() - begun, 2), "MiB": round(grown / 1024)}


def pack(folder: Path, files: list[Path]) -> str:
    """A foreign tar that holds the files as they are, indexed."""
    folder.mkdir()
    with open(folder / "train-000000.tar", "wb") as file:
        tar = TarShard(file)
        for number, path in enumerate(files):
            tar.add(f"s{number:03d}", KINDS.get(path.suffix, "mp4"), path.read_bytes() or b"\0", {"label": 0})
        tar.close()
    index(str(folder))
    return str(folder)


def read_one(shards: str) -> str:
    """One training batch of a tar with one sample."""
    settings = with_overrides(
        Settings(),
        data={"path": shards, "workers": 0, "max_bad_fraction": 1.0},
        model={"frames": 8, "size": (32, 32)},
    )
    try:
        with build_stream(settings, split="train", batch_size=1, training=True) as stream:
            next(iter(stream))
    except DataError:
        return "refused"
    return "read"


def call(*arguments: str) -> tuple[int, str]:
    """Exit code of a command, and its last line."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = run(list(arguments))
    lines = [line for line in text.getvalue().splitlines() if line.strip()]
    return code, lines[-1] if lines else ""


def main() -> None:
    """Run the three stages and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if CHILD not in os.environ:  # a process of its own, so that what it leaves behind can be seen once it is gone
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {CHILD: "1", "TMPDIR": folder}
            done = subprocess.run([sys.executable, *sys.argv], env=environment, timeout=900, check=True)
            print("left in the temporary folder after exit:", os.listdir(folder), "exit code:", done.returncode)
        return
    source, target = arguments.folder.resolve(), arguments.out and arguments.out.resolve()
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and path.name != "README.md"]
    table: dict[str, dict[str, Any]] = {str(path.relative_to(source)): {} for path in files}
    before = psutil.Process().num_fds()
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        whole = measured(lambda: str(call("shard", str(source), "sharded", "--layout", "flat")))
        rejected = [json.loads(line) for line in Path("sharded/rejected.jsonl").read_text().splitlines()]
        reasons = {one["path"]: one["reason"] for one in rejected}
        for name, row in table.items():
            row["shard"] = reasons.get(name, "written")
        for number, (name, row) in enumerate(table.items()):
            shards = pack(Path(f"one{number}"), [source / name])
            row["stream"] = measured(lambda shards=shards: read_one(shards))

        write_demo_data(Path("good"), train=32, val=8)
        good = sorted(Path("good").rglob("*.mp4"))
        pack(Path("mixed"), [*files, *good])
        settings = ["--set", "data.max_bad_fraction=1.0", "--set", "data.workers=1", "--set", "train.steps=15"]
        recipe = ("--recipe", "smoke", "--data", "mixed", "--out", "run")
        training = measured(lambda: str(call("pretrain", *recipe, *settings)))
        place = ("--checkpoint", "run", "--out", "filled", "--steps", "1", "--window", "whole")
        for name, row in table.items():
            shutil.rmtree("filled", ignore_errors=True)
            row["render"] = measured(lambda name=name: str(call("render-inpaint", str(source / name), *place)[0]))
        left = [str(path) for path in Path(".").rglob("*.tmp")]
        children = [" ".join(child.cmdline()[-2:]) for child in psutil.Process().children(recursive=True)]
        os.chdir("/")
    summary = {
        "files": len(files),
        "shard": whole | {"by reason": dict(Counter(str(row["shard"]) for row in table.values()))},
        "stream": dict(Counter(str(row["stream"]["outcome"]) for row in table.values())),
        "pretrain": training,
        "render": dict(Counter(str(row["render"]["outcome"]) for row in table.values())),
        "slowest": {stage: max(row[stage]["seconds"] for row in table.values()) for stage in ("stream", "render")},
        "largest MiB": {stage: max(row[stage]["MiB"] for row in table.values()) for stage in ("stream", "render")},
        "left behind": left,
        "children": children,
        "descriptors": psutil.Process().num_fds() - before,
    }
    print(json.dumps(summary, indent=1))
    if target:
        body = {"command": "benchmarks/hostile.py hostile", "summary": summary, "files": table}
        target.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
