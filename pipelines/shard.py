"""Turn a folder of clips or images into shards: atomic, idempotent, resumable, on one machine or many.

Inputs are dealt to shards before any work starts, each shard is one job, and a job's bytes depend on its inputs and
options alone. So any number of workers, a kill at any moment and a rerun, or a Dask cluster all make the same files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffmae_video._version import __version__
from diffmae_video.data.datasets import DatasetInfo, dataset_info
from diffmae_video.data.layouts import Item, Listing, list_samples
from diffmae_video.data.remote import filesystem, is_remote, join, read_file, write_file
from diffmae_video.data.shards import MANIFEST, Manifest, ShardInfo, write_manifest
from diffmae_video.data.transcode import TranscodeOptions, options_from_json, options_to_json
from diffmae_video.data.workers import POOL
from diffmae_video.errors import DataError, UsageError
from diffmae_video.pipelines.console import progress, say, table
from diffmae_video.pipelines.shard_folder import REJECTED, compare
from diffmae_video.pipelines.shard_job import STOP, Job, parts_of, run_job
from diffmae_video.pipelines.workspace import Workspace

LAYOUT_DATASETS = {"ssv2": "ssv2", "ucf101": "ucf101", "hmdb51": "hmdb51", "imagenet": "imagenet", "kinetics": "k400"}


@dataclass(frozen=True)
class ShardResult:
    """What a run of `shard` found and wrote; found = written + rejected."""

    path: str
    dataset: str
    found: int
    written: int
    rejected: dict[str, int]
    """Rejected inputs by reason."""
    splits: dict[str, int]
    classes: list[str]
    bytes: int
    seconds: float
    done_before: int
    """Shards that were there already."""
    unchanged: bool = False
    """Everything was there already."""


def shard(
    source: str | Path,
    out: str | Path,
    *,
    dataset: str | None = None,
    layout: str | None = None,
    options: TranscodeOptions | None = None,
    fold: int = 1,
    samples_per_shard: int | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    dask: str | None = None,
    clip_seconds: float = 300.0,
    clip_memory: int = 6 << 30,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ShardResult:
    """Write shards of everything below `source` into `out`.

    Args:
        source: folder, URL, or a CSV/TSV table (see data/layouts.py).
        out: new or unfinished folder, or URL.
        dataset: name or TOML file of the data set; guessed from the layout without it.
        layout: key of LAYOUTS; the data set's own or a guess without it.
        options: how inputs become samples.
        fold: official split of UCF101 and HMDB51.
        samples_per_shard: without it 16 shards a split, of 16 to 512 samples (8 times that for images).
        workers: processes on this machine; all cores by default.
        executor: any concurrent.futures executor instead of the default pool; it is not shut down.
        dask: address of a Dask scheduler; workers must see the same source and destination.
        clip_seconds, clip_memory: limits of one input: wall clock, and bytes of address space.
        overwrite: replace shards made from other input or with other options.
        dry_run: list and count, make nothing.

    Raises:
        DataError: nothing was found, or nothing at all could be written, or the disk is full.
        UsageError: `out` holds the result of other input or options, or the options exclude each other.
    """
    begun = time.monotonic()
    source, out = _absolute(str(source)), _absolute(str(out))
    options = options or TranscodeOptions()
    if options.copy and (options.trim or options.fps):
        raise UsageError("--copy keeps the bytes of a file, --trim and --fps change them; give one or the other.")
    info = dataset_info(dataset) if dataset and _is_known(dataset) else None
    listing = list_samples(source, layout or (info.layout if info else "auto"), options.kind, fold)
    name = info.name if info else dataset or _guess_dataset(listing, source)
    listing_digest = _digest(listing)
    jobs = _deal(listing, source, out, options, samples_per_shard, clip_seconds, clip_memory)
    found = len(listing.items) + len(listing.rejected)
    say(f"Found {found} inputs in {source} (layout {listing.layout}, {len(listing.classes)} classes).")
    if dry_run:
        splits = dict(Counter(item.split for item in listing.items))
        return ShardResult(out, name, found, 0, {}, splits, listing.classes, 0, 0.0, 0)

    record = {
        "version": __version__,
        "source": source,
        "layout": listing.layout,
        "options": options_to_json(options),
        "samples_per_shard": [len(job.items) for job in jobs[:1]],
        "inputs": found,
        "input_bytes": sum(item.size for item in listing.items),
        "digest": listing_digest,
        "jobs": hashlib.sha256("".join(job.name + job.digest for job in jobs).encode()).hexdigest(),
    }
    finished = compare(out, record, overwrite)
    if finished:
        say(f"Nothing to do: {out} was made from this input with these options.")
        return replace(_result(finished, out, begun, len(jobs)), unchanged=True)
    write_file(join(parts_of(out), "run.json"), json.dumps(record, indent=1).encode())

    pool, own = _executor(executor, dask, workers)
    reports: dict[str, dict[str, Any]] = {}
    try:
        futures = {pool.submit(run_job, job): job for job in jobs}
        with progress(len(listing.items), "shard", "clips" if options.kind == "video" else "images") as line:
            bad = 0
            for future in as_completed(futures):
                report = future.result()
                reports[futures[future].name] = report
                bad += len(report["rejected"])
                line.update(len(futures[future].items), rejected=bad + len(listing.rejected))
    except (BrokenProcessPool, CancelledError) as error:
        raise DataError(f"A worker of the executor died ({error}); run again, finished shards are kept.") from error
    except BaseException:
        STOP.set()  # threads leave after their present clip
        POOL.kill()
        raise
    finally:
        if own:
            if isinstance(pool, ThreadPoolExecutor):
                pool.shutdown(wait=True, cancel_futures=True)
            else:  # Dask's executor cancels what is left by itself
                pool.shutdown(wait=False)
                pool._client.close()
            POOL.close()
        STOP.clear()
    return _finish(out, name, info, listing, jobs, reports, record, begun)


def _absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path.removeprefix("file://"))


def _is_known(dataset: str) -> bool:
    from diffmae_video.data.datasets import dataset_names

    return dataset in dataset_names() or dataset.endswith(".toml") or os.sep in dataset


def _guess_dataset(listing: Listing, source: str) -> str:
    from diffmae_video.data.synthetic import CLASSES

    if set(listing.classes) == set(CLASSES):
        return "demo"
    known = LAYOUT_DATASETS.get(listing.layout)
    if known:
        return known
    name = source.rstrip("/").rpartition("/")[2]
    return name.rsplit(".", 1)[0] or "clips"


def _digest(listing: Listing) -> str:
    rows = [asdict(item) for item in listing.items] + [asdict(one) for one in listing.rejected]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _deal(
    listing: Listing,
    source: str,
    out: str,
    options: TranscodeOptions,
    per_shard: int | None,
    seconds: float,
    memory: int,
) -> list[Job]:
    label = {name: number for number, name in enumerate(listing.classes)}
    splits: dict[str, list[Item]] = {}
    for item in listing.items:
        splits.setdefault(item.split, []).append(item)
    if source.lower().endswith((".csv", ".tsv")):
        source = source.rpartition("/")[0]
    wire, jobs = options_to_json(options), []
    for split, items in splits.items():
        most = 512 * (8 if options.kind == "image" else 1)
        size = per_shard or max(16, min(most, -(-len(items) // 16)))
        for number, start in enumerate(range(0, len(items), size)):
            rows = tuple(
                (one.path, one.key, label.get(one.label, -1), one.label, one.start, one.end, one.size)
                for one in items[start : start + size]
            )
            jobs.append(Job(f"{split}-{number:06d}.tar", split, source, out, rows, wire, seconds, memory))
    return jobs


def _executor(executor: Executor | None, dask: str | None, workers: int | None) -> tuple[Executor, bool]:
    if executor is not None:
        return executor, False
    if dask:
        try:
            from distributed import Client
        except ImportError as error:
            raise UsageError("--dask needs the package distributed: pip install 'diffmae-video[dask]'.") from error
        try:
            return Client(dask, timeout="10s", set_as_default=False).get_executor(retries=3), True
        except OSError as error:
            raise UsageError(f"--dask {dask}: no scheduler answers there ({error}); check the address.") from error
    count = workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers or os.cpu_count()
    return ThreadPoolExecutor(count or 1, thread_name_prefix="shard"), True  # each thread drives a process of its own


def _finish(
    out: str,
    name: str,
    info: DatasetInfo | None,
    listing: Listing,
    jobs: Sequence[Job],
    reports: dict[str, dict[str, Any]],
    record: dict[str, Any],
    begun: float,
) -> ShardResult:
    rejected = [asdict(one) for one in listing.rejected]
    shards = []
    for job in jobs:
        report = reports[job.name]
        rejected += [{"path": one["path"], "split": job.split, **one} for one in report["rejected"]]
        if report["info"]:
            shards.append((ShardInfo(**report["info"]), report["rows"]))
    rejected.sort(key=lambda one: (one["split"], one["path"]))
    lines = "".join(json.dumps(one, ensure_ascii=False, sort_keys=True) + "\n" for one in rejected)
    write_file(join(out, REJECTED), lines.encode())
    reasons = dict(sorted(Counter(one["reason"] for one in rejected).items()))
    written = sum(len(rows) for _, rows in shards)
    if not written:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise DataError(
            f"None of {len(rejected)} inputs became a sample ({told}); {join(out, REJECTED)} says why of each."
        )
    facts = record | {"counts": {"found": record["inputs"], "written": written, "rejected": reasons}}
    write_manifest(
        out,
        dataset=name,
        kind=options_from_json(record["options"]).kind,
        classes=listing.classes,
        shards=shards,
        facts=facts,
        directional=info.directional if info else None,
    )
    if is_remote(out):
        files, inner = filesystem(parts_of(out))
        with contextlib.suppress(FileNotFoundError):
            files.rm(inner, recursive=True)
    else:
        shutil.rmtree(parts_of(out), ignore_errors=True)
    skipped = sum(reports[job.name]["skipped"] for job in jobs)
    return _result(json.loads(read_file(join(out, MANIFEST))), out, begun, skipped)


def _result(body: dict[str, Any], out: str, begun: float, done_before: int) -> ShardResult:
    counts = body["facts"]["counts"]
    return ShardResult(
        path=out,
        dataset=body["dataset"],
        found=counts["found"],
        written=counts["written"],
        rejected=counts["rejected"],
        splits=body["splits"],
        classes=body["classes"],
        bytes=sum(one["bytes"] for one in body["shards"]),
        seconds=time.monotonic() - begun,
        done_before=done_before,
    )


def shard_and_record(source: str | Path, out: str | Path, **arguments: Any) -> ShardResult:
    """`shard`, then tell the workspace and the user."""
    result = shard(source, out, **arguments)
    if arguments.get("dry_run"):
        table("Plan", ["split", "inputs"], [[split, count] for split, count in result.splits.items()])
        return result
    Workspace.here().record("shards", str(out), dataset=result.dataset, media=Manifest.load(str(out)).kind)
    print_result(result, str(out))
    return result


def print_result(result: ShardResult, out: str) -> None:
    """One table and one sentence."""
    if result.unchanged:
        return
    rows = [["found", result.found], ["written", result.written]]
    rows += [[f"rejected: {reason}", count] for reason, count in result.rejected.items()]
    table(f"{out} ({result.dataset})", ["", "inputs"], rows)
    splits = ", ".join(f"{split} {count}" for split, count in result.splits.items())
    lost = sum(result.rejected.values())
    why = f" {lost} inputs were rejected, {os.path.join(out, REJECTED)} says why." if lost else ""
    size = f"{result.bytes / 2**20:.1f} MiB"
    say(f"Wrote {result.written} samples ({splits}; {size}) in {result.seconds:.1f} s.{why}")
