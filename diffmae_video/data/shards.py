"""Shards: plain WebDataset tars, the manifest that describes them, and reading of single samples by offset.

A sample is the members `KEY.mp4` (or `.jpg`, ...) and `KEY.json`, adjacent in a ustar archive. `manifest.json` names
every shard with its size and sha256 and points to `samples.parquet`, a table with one row a sample, so that ten million
samples open in seconds and cost a reader a few bytes each.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffmae_video.data.media import DEFAULT_LIMITS
from diffmae_video.data.remote import is_remote, join, read_file, write_file
from diffmae_video.errors import DataError

MANIFEST = "manifest.json"
TABLE = "samples.parquet"
FORMAT_VERSION = 1
MEDIA_SUFFIXES = {"video": ("mp4", "webm", "mkv", "avi", "mov"), "image": ("jpg", "jpeg", "png", "webp", "bmp", "tif")}
"""Members that are ever decoded; every other suffix but `json` is ignored."""
_MTIME = 0


@dataclass(frozen=True)
class Sample:
    """One sample as stored: `data` are the bytes of the media member, `meta` the parsed JSON member ({} if none)."""

    key: str
    data: bytes
    suffix: str
    label: int
    meta: dict[str, Any]


@dataclass(frozen=True)
class ShardInfo:
    """One tar: name within the folder, split, size, checksum, number of samples."""

    name: str
    split: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class SampleTable:
    """Columns of the samples of one split, in stored order; all of length `len(table)`."""

    shard: np.ndarray  # int32, index into Manifest.shards
    offset: np.ndarray  # int64, bytes from the start of the tar to the media member's data
    size: np.ndarray  # int64
    meta_offset: np.ndarray  # int64, -1 without a JSON member
    meta_size: np.ndarray  # int32
    suffix: np.ndarray  # int8, index into Manifest.suffixes
    label: np.ndarray  # int32, -1 = none
    frames: np.ndarray  # int32, 0 = unknown
    fps: np.ndarray  # float32
    width: np.ndarray  # int32
    height: np.ndarray  # int32
    crc: np.ndarray  # uint32, CRC-32 of the media member followed by the JSON member
    keys: Any  # pyarrow string array (large): `key(i)` reads one

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, index: int) -> str:
        """Key of one sample."""
        return self.keys[int(index)].as_py()


_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "meta_offset": np.int64,
    "meta_size": np.int32,
    "suffix": np.int8,
    "label": np.int32,
    "frames": np.int32,
    "fps": np.float32,
    "width": np.int32,
    "height": np.int32,
    "crc": np.uint32,
}


@dataclass
class Manifest:
    """What a folder of shards holds; `Manifest.load` is the way in."""

    root: str
    dataset: str
    kind: str  # "video" or "image"
    classes: list[str]
    splits: dict[str, int]  # samples per split
    shards: list[ShardInfo]
    suffixes: list[str]
    hash: str
    """sha256 over everything that decides order and content."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Options, counts and version of the run that wrote the shards."""
    directional: bool | None = None
    """Whether labels tell left from right; None leaves it to the data set's description."""
    _table: Any = None
    _samples: dict[str, SampleTable] = field(default_factory=dict)

    @staticmethod
    def load(path: str | Path) -> Manifest:
        """Open the manifest of a folder (or URL) of shards; the table of samples is read when first asked for.

        Raises:
            DataError: there is none, or it is not one.
        """
        root = str(path)
        root = root[: -len(MANIFEST)].rstrip("/") or "." if root.endswith(MANIFEST) else root
        try:
            body = json.loads(read_file(join(root, MANIFEST)))
        except FileNotFoundError:
            raise DataError(
                f"{root} holds no {MANIFEST}; make shards with `diffmae shard`, or `diffmae index` for foreign ones."
            ) from None
        except (ValueError, OSError) as error:
            raise DataError(f"{join(root, MANIFEST)} cannot be read ({error}); make the shards again.") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT_VERSION:
            raise DataError(f"{join(root, MANIFEST)} is not of format {FORMAT_VERSION}; make it with this version.")
        try:
            shards = [ShardInfo(**shard) for shard in body["shards"]]
            for shard in shards:
                _check_name(shard.name)
            return Manifest(
                root=root,
                dataset=body["dataset"],
                kind=body["kind"],
                classes=list(body["classes"]),
                splits=dict(body["splits"]),
                shards=shards,
                suffixes=list(body["suffixes"]),
                hash=body["hash"],
                facts=body.get("facts", {}),
                directional=body.get("directional"),
                _table=body["table"],
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{join(root, MANIFEST)} lacks {error}; make it again.") from error

    def samples(self, split: str) -> SampleTable:
        """The table of one split.

        Raises:
            DataError: no such split, or the table does not match the manifest.
        """
        if split not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise DataError(f"{self.root} has no split {split!r} (it has: {known}); choose one with data.split.")
        if split not in self._samples:
            self._read_table()
        return self._samples[split]

    def _read_table(self) -> None:
        import pyarrow.parquet as parquet

        raw = read_file(join(self.root, TABLE))
        if hashlib.sha256(raw).hexdigest() != self._table["sha256"]:
            raise DataError(f"{join(self.root, TABLE)} does not match its checksum; copy it again or index the shards.")
        table = parquet.read_table(io.BytesIO(raw))
        columns = {name: table.column(name).to_numpy().astype(kind, copy=False) for name, kind in _COLUMNS.items()}
        keys = table.column("key").combine_chunks()
        start = 0
        for split, count in self.splits.items():
            part = slice(start, start + count)
            self._samples[split] = SampleTable(
                **{name: values[part] for name, values in columns.items()}, keys=keys.slice(start, count)
            )
            start += count
        if start != table.num_rows:
            raise DataError(
                f"{join(self.root, TABLE)} has {table.num_rows} rows, the manifest {start}; index it again."
            )


def write_manifest(
    root: str | Path,
    *,
    dataset: str,
    kind: str,
    classes: list[str],
    shards: list[tuple[ShardInfo, list[dict[str, Any]]]],
    facts: dict[str, Any] | None = None,
    directional: bool | None = None,
) -> Manifest:
    """Write `samples.parquet` and then `manifest.json`, each atomically; shards of a split must be adjacent.

    Args:
        shards: every shard with the rows of its samples (dicts with `key`, `suffix` and the columns of SampleTable).
    """
    import pyarrow
    import pyarrow.parquet as parquet

    suffixes = sorted({row["suffix"] for _, rows in shards for row in rows})
    place = {suffix: number for number, suffix in enumerate(suffixes)}
    columns: dict[str, list[Any]] = {name: [] for name in ("key", *_COLUMNS)}
    splits: dict[str, int] = {}
    for number, (shard, rows) in enumerate(shards):
        splits[shard.split] = splits.get(shard.split, 0) + len(rows)
        for row in rows:
            columns["key"].append(row["key"])
            for name in _COLUMNS:
                value = number if name == "shard" else place[row["suffix"]] if name == "suffix" else row.get(name, 0)
                columns[name].append(value)
    arrays = {"key": pyarrow.array(columns["key"], pyarrow.large_string())}
    arrays |= {name: pyarrow.array(np.asarray(columns[name], kind)) for name, kind in _COLUMNS.items()}
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays), buffer, compression="zstd", store_schema=False)
    raw = buffer.getvalue()
    infos = [shard for shard, _ in shards]
    body: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "dataset": dataset,
        "kind": kind,
        "classes": classes,
        "directional": directional,
        "splits": splits,
        "suffixes": suffixes,
        "table": {
            "name": TABLE,
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
            "rows": len(arrays["key"]),
        },
        "shards": [vars(info) for info in infos],
        "facts": facts or {},
    }
    digest = json.dumps([body["table"]["sha256"], body["shards"], classes, splits], sort_keys=True)
    body["hash"] = hashlib.sha256(digest.encode()).hexdigest()
    write_file(join(str(root), TABLE), raw)
    write_file(join(str(root), MANIFEST), (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())
    return Manifest.load(root)


def _check_name(name: str) -> None:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or ":" in name or "\\" in name or not name.endswith(".tar"):
        raise DataError(f"The manifest names the shard {name!r}, which is no plain .tar inside its folder; refuse it.")


class TarShard:
    """Build one shard in memory or in a file: ustar members, fixed time and owner, no PAX headers."""

    def __init__(self, stream: Any):
        import webdataset

        self.stream = stream
        self.tar = webdataset.TarWriter(
            stream, mtime=_MTIME, user="diffmae", group="diffmae", encoder=False, format="USTAR_FORMAT"
        )
        self.rows: list[dict[str, Any]] = []

    def add(self, key: str, suffix: str, data: bytes, meta: dict[str, Any]) -> None:
        """Append a sample; `meta` becomes the JSON member and fills the row of the table."""
        if "." in key or "/" in key or not key:
            raise ValueError(f"key {key!r} must be a plain name without dots")
        text = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
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
            from diffmae_video.data.cache import ShardCache

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
            except ValueError:
                raise DataError(
                    f"Sample {table.key(index)} of {self.manifest.shards[shard].name} has damaged JSON; "
                    "run `diffmae verify`."
                ) from None
        suffix = self.manifest.suffixes[int(table.suffix[index])]
        return Sample(table.key(index), data, suffix, int(table.label[index]), facts if isinstance(facts, dict) else {})

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        name = self.manifest.shards[shard].name
        try:
            if shard not in self._files:
                if len(self._files) >= 64:
                    os.close(self._files.pop(next(iter(self._files))))
                path = self.cache.fetch(shard) if self.cache else join(self.manifest.root, name)
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._files[shard], size, offset)
        except OSError as error:
            raise DataError(f"Shard {name} cannot be read ({error.strerror}); run `diffmae verify`.") from error
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
