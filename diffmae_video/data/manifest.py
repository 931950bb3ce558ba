"""The manifest of a folder of shards: what they hold, and one row for each sample.

`manifest.json` names every shard with its size and sha256 and points to `samples.parquet`, a table with one row a
sample, so that ten million samples open in seconds and cost a reader a few bytes each.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffmae_video.data.media import MEDIA_SUFFIXES, access_error
from diffmae_video.data.remote import join, read_file, write_file
from diffmae_video.errors import DataError, StorageError
from diffmae_video.files import check_name

MANIFEST = "manifest.json"
TABLE = "samples.parquet"
FORMAT_VERSION = 1


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
        where = join(root, MANIFEST)
        try:
            body = json.loads(read_file(where))
        except FileNotFoundError:
            raise DataError(
                f"{root} holds no {MANIFEST}; make shards with `diffmae shard`, or `diffmae index` for foreign ones."
            ) from None
        except StorageError:
            raise
        except OSError as error:
            raise access_error(where, error) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} cannot be read ({error}); make the shards again.") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT_VERSION:
            raise DataError(f"{where} is not of format {FORMAT_VERSION}; make it with this version.")
        try:
            return _parse(root, body)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where} is damaged or incomplete ({error}); make it again.") from error

    @property
    def encoded(self) -> bool:
        """Whether `diffmae shard` encoded the media itself: frames are shown as they are stored, counts are exact."""
        options = self.facts.get("options")
        return isinstance(options, dict) and options.get("copy") is False

    def held_out(self, split: str) -> str:
        """The split to test on: `test` where `val` is wanted, the default of `data.eval_split`, and only `test` is
        there; else the one that is wanted."""
        return "test" if split == "val" and not self.splits.get("val") and self.splits.get("test") else split

    def samples(self, split: str, option: str = "data.split") -> SampleTable:
        """The table of one split.

        Raises:
            DataError: no such split, or the table does not match the manifest.
        """
        if split not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise DataError(f"{self.root} has no split {split!r} (it has: {known}); choose one with {option}.")
        if split not in self._samples:
            self._read_table()
        return self._samples[split]

    def _read_table(self) -> None:
        import pyarrow
        import pyarrow.parquet as parquet

        where = join(self.root, TABLE)
        raw = read_file(where)
        if hashlib.sha256(raw).hexdigest() != self._table["sha256"]:
            raise DataError(f"{where} does not match its checksum; copy it again or index the shards.")
        rows = sum(self.splits.values())
        try:
            file = parquet.ParquetFile(io.BytesIO(raw))
            if file.metadata.num_rows != rows or rows * 512 > sum(info.bytes for info in self.shards):
                raise ValueError(
                    f"{file.metadata.num_rows} rows, the manifest {rows}"
                )  # each has a header of 512 bytes
            table = file.read()
            columns = {
                name: table.column(name).to_numpy().astype(kind, copy=False, casting="same_kind")
                for name, kind in _COLUMNS.items()
            }
            keys = table.column("key").cast(pyarrow.large_string()).combine_chunks()
            _check_columns(columns, len(self.shards), len(self.suffixes))
        except (ValueError, TypeError, KeyError, OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{where} is damaged ({error}); index the shards again.") from error
        start = 0
        for split, count in self.splits.items():
            part = slice(start, start + count)
            self._samples[split] = SampleTable(
                **{name: values[part] for name, values in columns.items()}, keys=keys.slice(start, count)
            )
            start += count


def _parse(root: str, body: dict[str, Any]) -> Manifest:
    """A manifest from its JSON; names that become paths are checked, and its hash is that of what it says."""
    shards = [ShardInfo(**shard) for shard in body["shards"]]
    for shard in shards:
        _check_shard_name(shard.name)
        check_name(shard.split, "The split of a shard in the manifest")
    splits, classes, suffixes = dict(body["splits"]), list(body["classes"]), list(body["suffixes"])
    for split in splits:
        check_name(split, "A split of the manifest")
    counts = [*splits.values(), *(number for shard in shards for number in (shard.bytes, shard.samples))]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a count is no number")
    if not all(isinstance(text, str) for text in (*classes, *suffixes, *(shard.sha256 for shard in shards))):
        raise ValueError("a name is no text")
    if body["kind"] not in MEDIA_SUFFIXES or not isinstance(body["dataset"], str):
        raise ValueError("kind or dataset")
    if body["hash"] != _hash(body["table"]["sha256"], body["shards"], classes, splits):
        raise DataError(f"{join(root, MANIFEST)} was changed: its hash is another; copy it again or index the shards.")
    facts, directional = body.get("facts", {}), body.get("directional")
    return Manifest(
        root=root,
        dataset=body["dataset"],
        kind=body["kind"],
        classes=classes,
        splits=splits,
        shards=shards,
        suffixes=suffixes,
        hash=body["hash"],
        facts=facts if isinstance(facts, dict) else {},
        directional=directional if isinstance(directional, bool) else None,
        _table=body["table"],
    )


def _hash(table: str, shards: list[dict[str, Any]], classes: list[str], splits: dict[str, int]) -> str:
    """sha256 over everything that decides order and content."""
    return hashlib.sha256(json.dumps([table, shards, classes, splits], sort_keys=True).encode()).hexdigest()


def _check_columns(columns: dict[str, np.ndarray], shards: int, suffixes: int) -> None:
    bounds = {"shard": (0, shards - 1), "suffix": (0, suffixes - 1), "label": (-1, 2**31)}
    bounds |= dict.fromkeys(("offset", "size", "meta_size", "frames", "fps", "width", "height"), (0, 2**62))
    for name, (least, most) in bounds.items():
        values = columns[name]
        if len(values) and not (values.min() >= least and values.max() <= most):  # NaN is neither
            raise ValueError(f"column {name} goes from {values.min()} to {values.max()}")


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
    body["hash"] = _hash(body["table"]["sha256"], body["shards"], classes, splits)
    write_file(join(str(root), TABLE), raw)
    write_file(join(str(root), MANIFEST), (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())
    return Manifest.load(root)


def _check_shard_name(name: str) -> None:
    """Shards may stand in folders below that of the manifest, and be called what their maker likes."""
    parts = name.split("/")
    plain = name.isprintable() and not name.startswith("/") and ".." not in parts and not set(name) & {":", "\\"}
    if not plain or not name.endswith(".tar"):
        raise DataError(f"The manifest names the shard {name!r:.80}, no plain .tar of its folder; refuse it.")
