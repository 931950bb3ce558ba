"""Turn a folder of clips or images into shards: atomic, idempotent, resumable, on one machine or many.

Inputs are dealt to shards before any work starts, each shard is one job, and a job's bytes depend on its inputs and
options alone. So any number of workers, a kill at any moment and a rerun, or a Dask cluster all make the same files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from diffmae_video._version import __version__
from diffmae_video.data.datasets import DatasetInfo, dataset_info
from diffmae_video.data.holdout import hold_out
from diffmae_video.data.layouts import Item, Listing, list_samples
from diffmae_video.data.manifest import MANIFEST, ShardInfo, write_manifest
from diffmae_video.data.media import DEFAULT_LIMITS, Limits
from diffmae_video.data.remote import is_remote, join, read_file, write_file
from diffmae_video.data.transcode import TranscodeOptions, options_to_json
from diffmae_video.data.workers import POOL
from diffmae_video.errors import DataError, Stopped, StorageError, UsageError
from diffmae_video.files import printable
from diffmae_video.pipelines.console import progress, say, table
from diffmae_video.pipelines.shard_folder import REJECTED, compare, forget, hold
from diffmae_video.pipelines.shard_job import ENCODING, STOP, TarJob, parts_of, run_job
from diffmae_video.pipelines.shard_names import guess_dataset, is_known, odd_classes
from diffmae_video.pipelines.workspace import Workspace


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
    kind: str = "video"
    unchanged: bool = False
    """Everything was there already."""


@dataclass(frozen=True)
class ShardJob:
    """What a user asked `shard` for.

    Attributes:
        source: folder, URL, or a CSV/TSV table (see data/layouts.py).
        out: new or unfinished folder, or URL.
        options: how inputs become samples.
        kind: `video`, `image`, or `auto`: the data set's own; images where the source has images and no videos.
        dataset: name or TOML file of the data set; guessed from the layout without it.
        layout: how the source is arranged; the data set's own or a guess without it.
        fold: official split of UCF101 and HMDB51.
        val_fraction: of the source videos held out as `val` where the source names no split (see data/holdout.py).
        samples_per_shard: without it 16 shards a split, of 16 to 512 samples (8 times that for images).
        workers: processes on this machine; all cores by default.
        dask: address of a Dask scheduler; workers must see the same source and destination.
        timeout, memory: limits of one input: wall clock in seconds, and bytes of address space.
        overwrite: replace shards made from other input or with other options.
        dry_run: list and count, make nothing.
    """

    source: str | Path
    out: str | Path
    options: TranscodeOptions = field(default_factory=TranscodeOptions)
    kind: str = "auto"
    dataset: str | None = None
    layout: str | None = None
    fold: int = 1
    val_fraction: float = 0.1
    samples_per_shard: int | None = None
    workers: int | None = None
    dask: str | None = None
    timeout: float = 300.0
    memory: int = 6 << 30
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", _absolute(str(self.source)))
        object.__setattr__(self, "out", _absolute(str(self.out)))
        if self.options.copy and (self.options.trim or self.options.fps):
            raise UsageError("--copy keeps the bytes of a file, --trim and --fps change them; give one or the other.")
        if self.dask and self.workers:
            raise UsageError("--workers is for this machine, with --dask the scheduler knows its own; leave one out.")


def shard(job: ShardJob, executor: Executor | None = None) -> ShardResult:
    """Write shards of everything below `job.source` into `job.out`.

    Args:
        job: what goes where, and how.
        executor: any concurrent.futures executor instead of the default pool; it is not shut down.

    Raises:
        DataError: nothing was found, or nothing at all could be written, or the disk is full.
        StorageError: a disk or server does not answer; finished shards are kept.
        UsageError: `out` holds the result of other input or options, or another process writes there.
        Stopped: SIGTERM came; finished shards are kept.
    """
    begun = time.monotonic()
    source, out = str(job.source), str(job.out)
    info = dataset_info(job.dataset) if job.dataset and is_known(job.dataset) else None
    kind = info.kind if info and job.kind == "auto" else job.kind
    listing = list_samples(source, job.layout or (info.layout if info else "auto"), kind, job.fold)
    listed = listing
    listing = hold_out(listed, job.val_fraction)
    options = replace(job.options, kind=listing.kind)
    _refuse_unused(job, options, listing is not listed, listing)
    job = replace(job, options=options)
    tars = _deal(listing, job)
    found = len(listing.items) + len(listing.rejected)
    for note in (*listing.notes, *odd_classes(listing)):
        say(f"Note: {note}")
    several = len({(item.path, item.label) for item in listing.items}) - len({item.path for item in listing.items})
    if several > 0 and not options.trim:
        say("Note: some videos have spans with different labels: give --trim to cut the spans out.")
    say(f"Found {found} inputs in {source} (layout {listing.layout}, {len(listing.classes)} classes).")
    if job.layout is None and job.dataset is None and listing.layout == "folders" and listing is not listed:
        say("Note: each folder is taken for a class; if they are no classes, give --layout flat.")
    name = info.name if info else job.dataset or guess_dataset(listing, source)
    if info and (difference := info.difference(len(listing.classes))):
        say(f"Note: --dataset {job.dataset}: {difference}.")
    plan = _Plan(out, name, info, listing, tars)
    if job.dry_run:
        splits = dict(Counter(item.split for item in listing.items))
        return ShardResult(out, plan.name, found, 0, {}, splits, listing.classes, 0, 0.0, 0)
    record = {
        "version": __version__,
        "encoding": ENCODING,
        "source": source,
        "layout": listing.layout,
        "options": options_to_json(options),
        "samples_per_shard": [len(tar.items) for tar in tars[:1]],
        "inputs": found,
        "input_bytes": sum(item.size for item in listing.items),
        "digest": _digest(listing),
        "jobs": hashlib.sha256("".join(tar.name + tar.digest for tar in tars).encode()).hexdigest(),
    }
    with hold(out), _sigterm_stops():
        finished = compare(out, record, job.overwrite)
        if finished:
            say(f"Nothing to do: {out} was made from this input with these options.")
            return replace(_result(finished, out, begun, len(tars)), unchanged=True)
        write_file(join(parts_of(out), "run.json"), json.dumps(record, indent=1).encode())
        reports = _write_tars(plan, job, executor)
        _finish(plan, reports, record)
        skipped = sum(report["skipped"] for report in reports.values())
        return _result(json.loads(read_file(join(out, MANIFEST))), out, begun, skipped)


@dataclass(frozen=True)
class _Plan:
    """What will be written, before any work starts."""

    out: str
    name: str
    info: DatasetInfo | None
    listing: Listing
    tars: list[TarJob]


def _write_tars(plan: _Plan, job: ShardJob, executor: Executor | None) -> dict[str, dict[str, Any]]:
    """Make every tar that is not there yet; returns the report of each by its name."""
    pool, end = _pool(executor, job)
    reports: dict[str, dict[str, Any]] = {}
    try:
        futures = {pool.submit(run_job, tar): tar for tar in plan.tars}
        unit = "clips" if job.options.kind == "video" else "images"
        with progress(len(plan.listing.items), "shard", unit) as line:
            bad = len(plan.listing.rejected)
            for future in as_completed(futures):
                report = reports[futures[future].name] = future.result()
                bad += len(report["rejected"])
                line.update(len(futures[future].items), **({"rejected": bad} if bad else {}))
    except (BrokenProcessPool, CancelledError) as error:
        raise StorageError(f"A worker of the executor died ({error}); run again, finished shards are kept.") from error
    except BaseException:
        STOP.set()  # threads leave after their present clip
        POOL.kill()
        raise
    finally:
        end()
        STOP.clear()
    return reports


def parse_limits(texts: Sequence[str]) -> Limits:
    """Bounds on inputs from texts like `frames=5000000`; see `Limits`.

    Raises:
        UsageError: no such bound, or no number.
    """
    known = {field.name: field.type for field in fields(Limits)}
    given: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            given[name] = float(value) if known[name] == "float" else int(float(value))
        except (KeyError, ValueError, OverflowError):
            raise UsageError(f"--limit {text}: write NAME=NUMBER with one of {', '.join(known)}.") from None
    return replace(DEFAULT_LIMITS, **given)


def _pool(executor: Executor | None, job: ShardJob) -> tuple[Executor, Callable[[], object]]:
    """Who does the work, and what ends it."""
    if executor is not None:
        return executor, lambda: None
    if job.dask:
        try:
            from distributed import Client
        except ImportError as error:
            raise UsageError("--dask needs the package distributed: pip install 'diffmae-video[dask]'.") from error
        try:
            client = Client(job.dask, timeout="10s", set_as_default=False)
        except OSError as error:
            raise UsageError(f"--dask {job.dask}: no scheduler answers there ({error}); check the address.") from error
        return client.get_executor(retries=3), client.close  # closing cancels what is left
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ThreadPoolExecutor(job.workers or cores or 1, thread_name_prefix="shard")  # each drives a process of its own

    def end() -> None:
        pool.shutdown(wait=True, cancel_futures=True)
        POOL.close()

    return pool, end


@contextlib.contextmanager
def _sigterm_stops() -> Iterator[None]:
    """SIGTERM ends the block with one sentence, as Ctrl-C does; only the main thread hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped("Stopped by SIGTERM; run the same command again, finished shards are kept.")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path.removeprefix("file://"))


def _refuse_unused(job: ShardJob, options: TranscodeOptions, held_out: bool, listing: Listing) -> None:
    """An option that this source or another option leaves without effect is an error, not a surprise.

    Raises:
        UsageError: names it.
    """
    names = ["crf", "preset", "gop", "b_frames", "tune", "x264"]  # how a video is encoded
    reason, unused = "--copy keeps the bytes of a file", [*names, "short_side"]
    if options.kind == "image":
        unused = [*names, "fps", "trim", "min_frames", *(["short_side"] if options.copy else [])]
        reason = "the source holds images"
    if options.kind == "image" or options.copy:
        default = TranscodeOptions()
        for name in unused:
            if getattr(options, name) != getattr(default, name):
                raise UsageError(f"--{name.replace('_', '-')}: {reason}; leave it out.")
    if job.fold != 1 and listing.layout not in ("ucf101", "hmdb51", "lists"):
        raise UsageError(f"--fold {job.fold}: the layout {listing.layout} has no numbered folds; leave it out.")
    if job.val_fraction not in (0.0, ShardJob.val_fraction) and not held_out:
        raise UsageError(
            f"--val-fraction {job.val_fraction:g}: the source names its splits itself, or is too small to be divided; "
            "leave it out."
        )


def _digest(listing: Listing) -> str:
    rows = [asdict(item) for item in listing.items] + [asdict(one) for one in listing.rejected]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _deal(listing: Listing, job: ShardJob) -> list[TarJob]:
    label = {name: number for number, name in enumerate(listing.classes)}
    splits: dict[str, list[Item]] = {}
    for item in listing.items:
        splits.setdefault(item.split, []).append(item)
    source, wire, tars = str(job.source), options_to_json(job.options), []
    if source.lower().endswith((".csv", ".tsv")):
        source = source.rpartition("/")[0]
    for split, items in splits.items():
        most = 512 * (8 if job.options.kind == "image" else 1)
        size = job.samples_per_shard or max(16, min(most, -(-len(items) // 16)))
        for number, start in enumerate(range(0, len(items), size)):
            rows = tuple(
                (one.path, one.key, label.get(one.label or "", -1), one.label, one.start, one.end, one.size)
                for one in items[start : start + size]
            )
            name = f"{split}-{number:06d}.tar"
            tars.append(TarJob(name, split, source, str(job.out), rows, wire, job.timeout, job.memory))
    return tars


def _finish(plan: _Plan, reports: dict[str, dict[str, Any]], record: dict[str, Any]) -> None:
    """Write rejected.jsonl, the table and the manifest, and forget what only an unfinished run needs."""
    rejected = [asdict(one) | {"path": printable(one.path)} for one in plan.listing.rejected]
    shards: list[tuple[ShardInfo, list[dict[str, Any]]]] = []
    for tar in plan.tars:
        report = reports[tar.name]
        rejected += [{"path": one["path"], "split": tar.split, **one} for one in report["rejected"]]
        if report["info"]:
            shards.append((ShardInfo(**report["info"]), report["rows"]))
    rejected.sort(key=lambda one: (one["split"], one["path"]))
    lines = "".join(json.dumps(one, ensure_ascii=False, sort_keys=True) + "\n" for one in rejected)
    write_file(join(plan.out, REJECTED), lines.encode("utf-8", "backslashreplace"))
    reasons = dict(sorted(Counter(one["reason"] for one in rejected).items()))
    written = sum(len(rows) for _, rows in shards)
    if not written:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise DataError(
            f"None of {len(rejected)} inputs became a sample ({told}); {join(plan.out, REJECTED)} says why of each."
        )
    write_manifest(
        plan.out,
        dataset=plan.name,
        kind=record["options"]["kind"],
        classes=plan.listing.classes,
        shards=shards,
        facts=record | {"counts": {"found": record["inputs"], "written": written, "rejected": reasons}},
        directional=plan.info.directional if plan.info else None,
    )
    forget(plan.out)
    if fields := sum(report.get("interlaced", 0) for report in reports.values()):
        say(
            f"Note: {fields} clips are interlaced and stay so; ffmpeg's filter bwdif before `shard` makes whole frames."
        )
    for note in _twins(shards):
        say(f"Note: {note}")


def _twins(shards: list[tuple[ShardInfo, list[dict[str, Any]]]]) -> list[str]:
    """What to say of clips that are the same to the bit under two names."""
    found: dict[str, list[tuple[str, int, str]]] = {}
    for info, rows in shards:
        for row in rows:
            found.setdefault(row["media"], []).append((info.split, row["label"], row["key"]))
    leaks = [places for places in found.values() if len({split for split, _, _ in places}) > 1]
    torn = [places for places in found.values() if len({label for _, label, _ in places if label >= 0}) > 1]
    notes = []
    if leaks:
        notes.append(f"{len(leaks)} clips stand in more than one split, e.g. {leaks[0][0][2]}: remove them from one.")
    if torn:
        notes.append(f"{len(torn)} clips stand there under two labels, e.g. {torn[0][0][2]}: one of them is wrong.")
    return notes


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
        kind=body["kind"],
    )


def shard_and_record(job: ShardJob) -> ShardResult:
    """`shard`, then tell the workspace and the user."""
    result = shard(job)
    if job.dry_run:
        table("Plan", ["split", "inputs"], [[split, count] for split, count in result.splits.items()])
        return result
    Workspace.here().record("shards", result.path, dataset=result.dataset, media=result.kind)
    print_result(result, result.path)
    return result


def print_result(result: ShardResult, out: str) -> None:
    """One table, one sentence, and what comes next."""
    media = "--image" if result.kind == "image" else "--video"
    labels = f"; the name of its labels is --task {shlex.quote(result.dataset)}" if result.classes else ""
    ahead = f"Next: diffmae pretrain {media}{labels}."
    if result.unchanged:
        say(ahead)
        return
    rows = [["found", result.found], ["written", result.written]]
    rows += [[f"rejected: {reason}", count] for reason, count in result.rejected.items()]
    table(f"{out} ({result.dataset})", ["", "inputs"], rows)
    splits = ", ".join(f"{split} {count}" for split, count in result.splits.items())
    lost = sum(result.rejected.values())
    why = f" {lost} inputs were rejected, {os.path.join(out, REJECTED)} says why." if lost else ""
    size = f"{result.bytes / 2**20:.1f} MiB"
    say(f"Wrote {result.written} samples ({splits}; {size}) in {result.seconds:.1f} s.{why}")
    say(ahead)
