"""Check shards against their manifest: files, sums, counts, members, and, on request, every frame."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field

from diffmae_video.data.manifest import Manifest, ShardInfo
from diffmae_video.data.media import MEDIA_SUFFIXES
from diffmae_video.data.remote import is_remote, join, list_files
from diffmae_video.data.shards import ShardReader
from diffmae_video.data.transcode import TranscodeOptions
from diffmae_video.data.workers import Worker
from diffmae_video.errors import DataError, StorageError
from diffmae_video.files import sha256_of
from diffmae_video.pipelines.console import progress


@dataclass(frozen=True)
class VerifyResult:
    """How much was checked, and each problem as one line that names shard and sample."""

    path: str
    shards: int
    samples: int
    problems: list[str] = field(default_factory=list)


def verify(path: str, *, decode: bool = False) -> VerifyResult:
    """Check every shard and sample of a folder (or URL) of shards.

    Args:
        decode: also decode every sample, in a worker process.

    Raises:
        DataError: there is no readable manifest at all.
    """
    manifest = Manifest.load(path)
    problems: list[str] = []
    reader = ShardReader(manifest)
    worker = Worker() if decode else None
    try:
        whole = _check_files(manifest, reader, problems)
        with progress(sum(manifest.splits.values()), "verify", "samples") as line:
            for split, count in manifest.splits.items():
                table = manifest.samples(split)
                for index in range(count):
                    if whole.get(int(table.shard[index])) is not None:
                        _check_sample(manifest, reader, split, index, worker, problems)
                    line.update(1, problems=len(problems))
        counted = dict.fromkeys(whole, 0)
        for split in manifest.splits:
            for shard in manifest.samples(split).shard.tolist():
                counted[shard] = counted.get(shard, 0) + 1
        for number, info in enumerate(manifest.shards):
            if counted.get(number, 0) != info.samples:
                problems.append(
                    f"{info.name}: the table has {counted.get(number, 0)} samples, the manifest {info.samples}"
                )
        for number, fine in whole.items():
            name = manifest.shards[number].name
            if fine is False and not any(problem.startswith(f"{name}/") for problem in problems):
                problems.append(f"{name}: the checksum differs, in a header or between samples")
    finally:
        reader.close()
        if worker:
            worker.close()
    return VerifyResult(path, len(manifest.shards), sum(manifest.splits.values()), problems)


def _check_files(manifest: Manifest, reader: ShardReader, problems: list[str]) -> dict[int, bool | None]:
    """For each shard: True whole, False checksum differs, None cannot be read."""
    whole: dict[int, bool | None] = {}
    known = {info.name for info in manifest.shards}
    if is_remote(manifest.root):
        present = {found.rpartition("/")[2] for found in list_files(manifest.root)}
    else:
        present = set(os.listdir(manifest.root))
    problems += [f"{name}: not in the manifest" for name in sorted(present - known) if name.endswith(".tar")]
    with progress(len(manifest.shards), "checksums", "shards") as line:
        for number, info in enumerate(manifest.shards):
            whole[number] = _check_file(number, info, manifest, reader, problems)
            line.update(1, problems=len(problems))
    return whole


def _check_file(
    number: int, info: ShardInfo, manifest: Manifest, reader: ShardReader, problems: list[str]
) -> bool | None:
    """Whether a shard has its size and checksum; None where it cannot be read."""
    try:
        path = reader.cache.fetch(number) if reader.cache else join(manifest.root, info.name)
        size = os.path.getsize(path)
        if size != info.bytes:
            problems.append(f"{info.name}: {size} bytes, the manifest says {info.bytes}")
            return None if size < info.bytes else False
        return sha256_of(path) == info.sha256
    except FileNotFoundError:
        problems.append(f"{info.name}: missing")
    except StorageError:
        raise
    except (OSError, DataError) as error:
        problems.append(f"{info.name}: {error}")
    return None


def _check_sample(
    manifest: Manifest, reader: ShardReader, split: str, index: int, worker: Worker | None, problems: list[str]
) -> None:
    table = manifest.samples(split)
    where = f"{manifest.shards[int(table.shard[index])].name}/{table.key(index)}"
    try:
        sample = reader.read(split, index)
        text = b""
        if table.meta_offset[index] >= 0:
            text = reader._pread(int(table.shard[index]), int(table.meta_size[index]), int(table.meta_offset[index]))
    except StorageError:
        raise
    except DataError as error:
        problems.append(f"{where}: {error}")
        return
    if zlib.crc32(text, zlib.crc32(sample.data)) != int(table.crc[index]):
        problems.append(f"{where}: the checksum differs")
        return
    if sample.suffix not in MEDIA_SUFFIXES["video"] + MEDIA_SUFFIXES["image"]:
        problems.append(f"{where}: no media member of a known kind")
    if not -1 <= sample.label < max(len(manifest.classes), 1):
        problems.append(f"{where}: label {sample.label} is outside the {len(manifest.classes)} classes")
    if worker is not None:
        kind = "image" if sample.suffix in MEDIA_SUFFIXES["image"] else "video"
        outcome = worker.run(where, TranscodeOptions(kind=kind, copy=True), data=sample.data)
        frames = int(table.frames[index])
        if outcome.kind:
            problems.append(f"{where}: {outcome.error}")
        elif frames and outcome.meta["frames"] != frames:
            problems.append(f"{where}: {outcome.meta['frames']} frames decode, {frames} are declared")
