"""Shards: plain WebDataset tars, written sample by sample and read by offset.

A sample is the members `KEY.mp4` (or `.jpg`, ...) and `KEY.json`, adjacent in a ustar archive; manifest.py says where.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from typing import Any

from diffmae_video.data.cache import ShardCache
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.media import DEFAULT_LIMITS, access_error
from diffmae_video.data.remote import is_remote, join
from diffmae_video.errors import DataError

_MTIME = 0


@dataclass(frozen=True)
class Sample:
    """One sample as stored: `data` are the bytes of the media member, `meta` the parsed JSON member ({} if none)."""

    key: str
    data: bytes
    suffix: str
    label: int
    meta: dict[str, Any]


class TarShard:
    """Build one shard in memory or in a file: ustar members, fixed time and owner, no PAX headers."""

    def __init__(self, stream: Any):
        from webdataset.writer import TarWriter

        self.stream = stream
        self.tar = TarWriter(
            stream, mtime=_MTIME, user="diffmae", group="diffmae", encoder=False, format="USTAR_FORMAT"
        )
        self.rows: list[dict[str, Any]] = []

    def add(self, key: str, suffix: str, data: bytes, meta: dict[str, Any]) -> None:
        """Append a sample; `meta` becomes the JSON member and fills the row of the table."""
        if "." in key or "/" in key or not key:
            raise ValueError(f"key {key!r} must be a plain name without dots")
        text = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace")
        start = self.tar.tarstream.offset
        self.tar.write({"__key__": key, suffix: data, "json": text})
        members = sorted([(suffix, len(data)), ("json", len(text))])  # TarWriter sorts the suffixes
        at, places = start, {}
        for name, size in members:
            places[name] = (at + 512, size)
            at += 512 + (size + 511) // 512 * 512
        if at != self.tar.tarstream.offset:
            raise ValueError(f"member names of {key!r} do not fit a ustar header")
        row = {name: meta.get(name, 0) for name in ("frames", "fps", "width", "height")}
        self.rows.append(
            row
            | {
                "key": key,
                "suffix": suffix,
                "label": meta.get("label", -1),
                "offset": places[suffix][0],
                "size": places[suffix][1],
                "meta_offset": places["json"][0],
                "meta_size": places["json"][1],
                "crc": zlib.crc32(text, zlib.crc32(data)),
            }
        )

    def close(self) -> None:
        """Write the end of the archive."""
        self.tar.close()


class ShardReader:
    """Read samples by index: one `pread` a member. Remote shards come through the local cache.

    Args:
        manifest: what to read.
        cache_dir, cache_gib: where whole remote shards are kept, and how much of them.
    """

    def __init__(self, manifest: Manifest, cache_dir: str | None = None, cache_gib: float = 50.0):
        self.manifest = manifest
        self.cache = None
        if is_remote(manifest.root):
            self.cache = ShardCache(manifest, cache_dir, cache_gib)
        self._files: dict[int, int] = {}

    def read(self, split: str, index: int, meta: bool = True) -> Sample:
        """Bytes and facts of one sample.

        Raises:
            DataError: the shard is missing, cut, or the sample is larger than allowed.
        """
        table = self.manifest.samples(split)
        shard = int(table.shard[index])
        size = int(table.size[index])
        if size > DEFAULT_LIMITS.bytes:
            raise DataError(f"Sample {table.key(index)} claims {size} bytes, above the limit; leave its shard out.")
        data = self._pread(shard, size, int(table.offset[index]))
        facts: dict[str, Any] = {}
        if meta and table.meta_offset[index] >= 0 and table.meta_size[index] <= 1 << 20:
            try:
                facts = json.loads(self._pread(shard, int(table.meta_size[index]), int(table.meta_offset[index])))
            except (ValueError, RecursionError):
                raise DataError(
                    f"Sample {table.key(index)} of {self.manifest.shards[shard].name} has damaged JSON; "
                    "run `diffmae verify`."
                ) from None
        suffix = self.manifest.suffixes[int(table.suffix[index])]
        return Sample(table.key(index), data, suffix, int(table.label[index]), facts if isinstance(facts, dict) else {})

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        name = self.manifest.shards[shard].name
        if offset < 0 or offset + size > self.manifest.shards[shard].bytes:
            raise DataError(f"Shard {name} ends before the sample at {offset}; run `diffmae verify`.")
        try:
            if shard not in self._files:
                if len(self._files) >= 64:
                    os.close(self._files.pop(next(iter(self._files))))
                path = self.cache.fetch(shard) if self.cache else join(self.manifest.root, name)
                self._files[shard] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            data = _read_at(self._files[shard], size, offset)
        except OSError as error:
            raise access_error(f"Shard {name}", error) from error
        if len(data) != size:
            raise DataError(f"Shard {name} ends early, a sample at {offset} is cut; run `diffmae verify`.")
        return data

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # another process opens its own


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    if not hasattr(os, "pread"):  # Windows
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more  # one call reads at most 2 GiB
    return data
