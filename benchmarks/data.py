"""Measure the data engine: decoding, reading, sharding, encoding settings, and flatness over many clips.

    python benchmarks/data.py decode CLIPS...   # ms a clip: shards and originals, against PyAV, OpenCV, torchcodec
    python benchmarks/data.py read CLIPS...     # samples without decoding, against cat and webdataset
    python benchmarks/data.py shard FOLDER      # clips/s, against the ffmpeg command doing the same
    python benchmarks/data.py encode CLIPS...   # bytes, PSNR and decode time of encoding settings
    python benchmarks/data.py soak CLIPS...     # memory and descriptors over 20,000 clips
    python benchmarks/data.py order             # shuffling against a full shuffle

Times are CPU time of one process; the methods of one table take turns, so that noise of the machine hits them alike.
torchcodec needs a CUDA-built torch beside it: make a virtual environment for it and give its --torchcodec-python.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import av
import numpy as np
import psutil
import torch

from diffmae_video.data.decode import Video, VideoReader
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.shards import ShardReader, TarShard
from diffmae_video.data.transcode import TranscodeOptions, transcode
from diffmae_video.errors import DataError

torch.set_num_threads(1)
FRAMES, STRIDE, SIDE = 16, 4, 224
_FILES = ("shard", "original")
_TORCHCODEC = """
import json, sys, time, statistics
import torch; torch.set_num_threads(1)
from torchcodec.decoders import VideoDecoder
for line in sys.stdin:
    job = json.loads(line); data = open(job["path"], "rb").read(); times = {}
    for mode in ("exact", "approximate"):
        begun = time.process_time()
        decoder = VideoDecoder(data, num_ffmpeg_threads=1, seek_mode=mode)
        frames = decoder.get_frames_at(job["indices"]).data[:, :, :224, :224].contiguous()
        times[mode] = 1e3 * (time.process_time() - begun)
    print(json.dumps(times), flush=True)
"""


def numbers(frames: int, draw: random.Random) -> list[int]:
    """Frames of one clip from a random start; the same draws for every method."""
    start = draw.randint(0, max(0, frames - (FRAMES - 1) * STRIDE - 1))
    return [min(start + i * STRIDE, frames - 1) for i in range(FRAMES)]


def crop(data: bytes) -> tuple[int, int, int, int]:
    """The largest centred square up to 224 pixels."""
    with Video(data) as video:
        width, height = video.codec.width, video.codec.height
    side = min(SIDE, width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def ours(data: bytes, indices: list[list[int]], box: tuple[int, int, int, int]) -> float:
    """CPU milliseconds of one clip."""
    begun = time.process_time()
    with Video(data, known=True) as video:
        video.clips(indices, [box] * len(indices), (SIDE, SIDE))
    return 1e3 * (time.process_time() - begun) / len(indices)


def naive(data: bytes, wanted: list[int]) -> float:
    """Decode everything, keep what is wanted."""
    begun = time.process_time()
    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].thread_type = "NONE"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.stack([frames[number] for number in wanted])[:, :SIDE, :SIDE].copy()
    return 1e3 * (time.process_time() - begun)


def bare(data: bytes, wanted: list[int]) -> float:
    """The bound: decode the packets that the wanted frames need, convert nothing."""
    with Video(data) as video:
        video.info  # noqa: B018 reads the index or the packets
        begun = time.process_time()
        for _ in video.frames_at(sorted(set(wanted))):
            pass
        return 1e3 * (time.process_time() - begun)


def opencv(path: str, wanted: list[int]) -> float:
    """Seek to the first frame, grab all, retrieve what is wanted."""
    import cv2

    cv2.setNumThreads(1)
    begun = time.process_time()
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    capture.set(cv2.CAP_PROP_POS_FRAMES, wanted[0])
    needed = set(wanted)
    for number in range(wanted[0], wanted[-1] + 1):
        capture.grab()
        if number in needed:
            cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
    capture.release()
    return 1e3 * (time.process_time() - begun)


def decode(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Median milliseconds a clip, by file and method."""
    torchcodec: Any = None
    if arguments.torchcodec_python:
        command = [arguments.torchcodec_python, "-c", _TORCHCODEC]
        torchcodec = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in arguments.paths:
            original = Path(path).read_bytes()
            shard, _, meta = transcode(original, TranscodeOptions())
            stored = Path(folder, "shard.mp4")
            stored.write_bytes(shard)
            frames = min(meta["frames"], sum(1 for _ in VideoReader(original)))
            boxes, draw = (crop(original), crop(shard)), random.Random(0)
            times: dict[str, list[float]] = {}

            def note(name: str, value: float, times: dict[str, list[float]] = times) -> None:
                times.setdefault(name, []).append(value)

            for _ in range(arguments.rounds):
                four = [numbers(frames, draw) for _ in range(4)]
                one = four[0]
                note("shard, 1 clip", ours(shard, [one], boxes[1]))
                note("shard, 4 clips", ours(shard, four, boxes[1]))
                note("shard, bound", bare(shard, one))
                note("shard, bound of 4", bare(shard, [one for clip in four for one in clip]) / 4)
                note("shard, opencv", opencv(str(stored), one))
                note("original", ours(original, [one], boxes[0]))
                note("original, bound", bare(original, one))
                note("original, opencv", opencv(path, one))
                note("original, naive", naive(original, one))
                if torchcodec:
                    for name, file in (("shard, torchcodec", str(stored)), ("original, torchcodec", path)):
                        torchcodec.stdin.write(json.dumps({"path": file, "indices": one}) + "\n")
                        torchcodec.stdin.flush()
                        for mode, spent in json.loads(torchcodec.stdout.readline()).items():
                            note(f"{name} {mode}", spent)
            row = {name: statistics.median(values) for name, values in times.items()}
            rows.append({"file": Path(path).name} | row | (ratios(row) if torchcodec else {}))
    if torchcodec:
        torchcodec.stdin.close()
        torchcodec.wait()
    return rows


def ratios(row: dict[str, float]) -> dict[str, float]:
    """How many times cheaper than torchcodec, in the better of its two modes."""
    shard, original = (min(row[f"{of}, torchcodec {mode}"] for mode in ("exact", "approximate")) for of in _FILES)
    return {
        "x original, 1 clip": original / row["shard, 1 clip"],
        "x original, 4 clips": original / row["shard, 4 clips"],
        "x same shard": shard / row["shard, 1 clip"],
        "x --copy": original / row["original"],
        "bound, 1 clip": original / row["shard, bound"],
        "bound, 4 clips": original / row["shard, bound of 4"],
        "bound, --copy": original / row["original, bound"],
    }


def read(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Microseconds of CPU a sample: reading without decoding."""
    import webdataset

    from diffmae_video.pipelines.index import index

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        videos = [Path(path).read_bytes() for path in arguments.paths]
        small = [os.urandom(5000) for _ in range(5000)]
        for name, payload, suffix in (("video", videos * max(1, 400 // len(videos)), "mp4"), ("5 KB", small, "jpg")):
            place = Path(folder, name.replace(" ", ""))
            place.mkdir()
            tar_path = place / "train-0.tar"
            with open(tar_path, "wb") as file:
                tar = TarShard(file)
                for number, data in enumerate(payload):
                    tar.add(f"s{number}", suffix, data, {"label": 0})
                tar.close()
            index(str(place))
            manifest = Manifest.load(place)
            order = np.random.default_rng(0).permutation(len(payload)).tolist()

            def cat(path: Path = tar_path) -> None:
                with open(path, "rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass

            def ours(order: list[int], manifest: Manifest = manifest) -> None:
                with ShardReader(manifest) as reader:
                    for number in order:
                        reader.read("train", number, meta=False)

            def wds(path: Path = tar_path) -> None:
                samples: Any = webdataset.compat.WebDataset(str(path), shardshuffle=False).shuffle(1000)
                for _ in samples:
                    pass

            row: dict[str, Any] = {"samples": name}
            methods = {
                "cat": cat,
                "ours, in order": lambda ours=ours, order=sorted(order): ours(order),
                "ours, shuffled": lambda ours=ours, order=order: ours(order),
                "webdataset, shuffled": wds,
            }
            spent: dict[str, list[float]] = {method: [] for method in methods}
            for _ in range(arguments.rounds):
                for method, action in methods.items():
                    spent[method].append(cpu(action) * 1e6 / len(payload))
            row |= {method: statistics.median(values) for method, values in spent.items()}
            row["cat / ours"] = row["cat"] / row["ours, in order"]
            row["webdataset / ours"] = row["webdataset, shuffled"] / row["ours, shuffled"]
            rows.append(row)
    return rows


def cpu(action: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    begun = time.process_time()
    action()
    return time.process_time() - begun


def shard(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Clips a second over all cores: `diffmae shard` and the ffmpeg command with the same settings, in turns."""
    from diffmae_video.pipelines.shard import ShardJob
    from diffmae_video.pipelines.shard import shard as make

    files = sorted(path for path in Path(arguments.paths[0]).rglob("*.mp4"))
    found: dict[str, list[float]] = {"diffmae clips/s": [], "ffmpeg clips/s": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            result = make(ShardJob(arguments.paths[0], Path(folder, "out")))
            found["diffmae clips/s"].append(result.written / (time.perf_counter() - begun))
            begun = time.perf_counter()
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                list(
                    pool.map(
                        lambda pair: ffmpeg(arguments.ffmpeg, pair[1], Path(folder, f"{pair[0]}.mp4")), enumerate(files)
                    )
                )
            found["ffmpeg clips/s"].append(len(files) / (time.perf_counter() - begun))
    row: dict[str, Any] = {"clips": len(files)} | {name: statistics.median(values) for name, values in found.items()}
    pairs = zip(*found.values(), strict=True)
    return [row | {"diffmae / ffmpeg": statistics.median(ours / theirs for ours, theirs in pairs)}]


def ffmpeg(program: str, source: Path, target: Path) -> None:
    """The transcode of `TranscodeOptions()` as a command."""
    options = TranscodeOptions()
    side = options.short_side
    scale = f"scale='if(gt(iw,ih),-2,min({side},iw))':'if(gt(iw,ih),min({side},ih),-2)'"
    command = [program, "-v", "error", "-threads", "1", "-i", str(source), "-an", "-vf", scale, "-c:v", "libx264"]
    command += [
        "-preset",
        options.preset,
        "-crf",
        str(options.crf),
        "-g",
        str(options.gop),
        "-bf",
        str(options.b_frames),
    ]
    command += ["-keyint_min", str(options.gop), "-sc_threshold", "0", "-tune", options.tune]
    command += ["-x264-params", f"b-adapt=0:b-pyramid=none:{options.x264}", "-threads", "1", "-pix_fmt", "yuv420p"]
    subprocess.run([*command, "-y", str(target)], stdin=subprocess.DEVNULL, check=True)


def encode(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Bytes, PSNR and decode time of encoding settings."""
    base, rows = TranscodeOptions(), []
    changes = [
        {},
        {"x264": ""},
        {"x264": "mbtree=0:rc-lookahead=0"},
        {"b_frames": 0},
        {"b_frames": 1},
        {"gop": 12},
        {"gop": 32},
        {"preset": "fast"},
        {"tune": ""},
    ]
    changes += [{"preset": "ultrafast", "b_frames": 0}, {"crf": 26}, {"short_side": 128}]
    for change in changes:
        options, figures = replace(base, **change), []
        for path in arguments.paths:
            original = Path(path).read_bytes()
            begun = time.process_time()
            data, _, meta = transcode(original, options)
            seconds = time.process_time() - begun
            draw, box = random.Random(0), crop(data)
            clips = [[numbers(meta["frames"], draw) for _ in range(4)] for _ in range(arguments.rounds)]
            once = statistics.median(ours(data, four[:1], box) for four in clips)
            often = statistics.median(ours(data, four, box) for four in clips)
            figures.append((len(data) / 1024, psnr(original, data), seconds, once, often))
        names = ("KiB", "PSNR dB", "encode s", "ms, 1 clip", "ms, 4 clips")
        told = ", ".join(f"{name}={value}" for name, value in change.items()) or "defaults"
        rows.append({"settings": told} | dict(zip(names, np.mean(figures, 0).tolist(), strict=True)))
    return rows


def psnr(original: bytes, encoded: bytes) -> float:
    """Of every 7th frame (a stride that meets all kinds of frames) against the original scaled by area."""
    import cv2

    errors = []
    for number, (before, after) in enumerate(zip(VideoReader(original), VideoReader(encoded), strict=False)):
        if number % 7 == 0:
            height, width = after[0].shape[:2]
            scaled = cv2.resize(before[0], (width, height), interpolation=cv2.INTER_AREA)
            errors.append(np.mean((scaled.astype(np.float64) - after[0]) ** 2))
    return float(10 * np.log10(255**2 / np.mean(errors)))


def soak(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Resident memory and open descriptors while many clips are decoded; every hundredth file is damaged."""
    stored = [transcode(Path(path).read_bytes(), TranscodeOptions(short_side=96)) for path in arguments.paths]
    process, draw, rows, failed = psutil.Process(), random.Random(0), [], 0
    for number in range(arguments.clips + 1):
        data, _, meta = stored[number % len(stored)]
        if number % 100 == 99:
            spoiled = bytearray(data)
            for place in draw.sample(range(len(data)), 40):
                spoiled[place] = draw.randrange(256)
            data = bytes(spoiled[: draw.randrange(len(data))] if number % 200 == 99 else spoiled)
        try:
            with Video(data, known=number % 2 == 0) as video:
                video.clips([numbers(meta["frames"], draw)], [(0, 0, 96, 96)], (64, 64))
        except (DataError, ValueError):
            failed += 1
        if number % (arguments.clips // 10) == 0:
            memory = process.memory_info().rss / 2**20
            rows.append({"clips": number, "refused": failed, "MiB": memory, "files": process.num_fds()})
    return rows


def order(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Class mix of batches of 256 and travel of samples against a full shuffle; 240,000 samples, 400 classes."""
    from diffmae_video.data.order import epoch_order

    samples, classes, batch, draw = 240_000, 400, 256, np.random.default_rng(0)
    shards, rows = np.arange(samples) // 512, []
    layouts = {"as diffmae shard deals": draw.permutation(np.arange(samples) % classes)}
    layouts["sorted by class"] = np.sort(np.arange(samples) % classes)

    def mix(places: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        batches = labels[places[: samples // batch * batch]].reshape(-1, batch)
        counts = np.stack([np.bincount(one, minlength=classes) for one in batches])
        return float((counts > 0).sum(1).mean()), float(counts.var())

    for name, labels in layouts.items():
        full = mix(draw.permutation(samples), labels)
        for block in (1, 4, 16, 64, len(shards)):
            places = epoch_order(shards, 0, 0, block)
            distinct, variance = mix(places, labels)
            row = {"classes in shards": name, "shuffle_block": block, "classes in a batch": distinct, "full": full[0]}
            travel = np.abs(np.argsort(places) - np.arange(samples)).mean() / samples
            rows.append(row | {"variance / full": variance / full[1], "travel (1/3 is full)": float(travel)})
    return rows


def main() -> None:
    """Parse, measure, print a table, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "read", "shard", "encode", "soak", "order"))
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--ffmpeg", default="ffmpeg", help="path of an ffmpeg with libx264")
    parser.add_argument("--torchcodec-python", help="python of an environment with torchcodec")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args()
    measures = {"decode": decode, "read": read, "shard": shard, "encode": encode, "soak": soak, "order": order}
    rows = measures[arguments.what](arguments)
    names = list(rows[0])
    print(" | ".join(names))
    for row in rows:
        print(" | ".join(f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in names))
    if arguments.out:
        files = [Path(path).name for path in arguments.paths]
        command = f"benchmarks/data.py {arguments.what} --rounds {arguments.rounds} {' '.join(files)}"
        arguments.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
