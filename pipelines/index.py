"""Make a manifest for shards that something else wrote (video2dataset, img2dataset, webdataset itself)."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffmae_video.data.annotations import MOST_CLASSES, numeric_classes
from diffmae_video.data.listing import SPLITS
from diffmae_video.data.manifest import ShardInfo, write_manifest
from diffmae_video.data.media import DEFAULT_LIMITS, MEDIA_SUFFIXES, access_error
from diffmae_video.data.remote import filesystem, is_remote, join, retry, write_file
from diffmae_video.errors import DataError, UsageError
from diffmae_video.files import check_name, printable
from diffmae_video.pipelines.console import progress

_META_BYTES = 1 << 20


@dataclass(frozen=True)
class IndexResult:
    """What was found in the tars; found = indexed + rejected."""

    path: str
    shards: int
    indexed: int
    rejected: dict[str, int]
    splits: dict[str, int]
    classes: list[str]


def index(folder: str, *, dataset: str | None = None, split: str | None = None) -> IndexResult:
    """Read every `.tar` of a folder or URL once; write manifest.json, samples.parquet and rejected.jsonl beside them.

    A sample needs exactly one media member of a known suffix, whole, and next to its other members. Nothing is
    extracted; members that are links, devices or sparse, and suffixes that are not known, are never read.

    Args:
        dataset: name for the manifest; the folder's by default.
        split: split of all shards; otherwise from a word like `train` in a shard's name, else `train`.

    Raises:
        DataError: no tars, or no usable sample in them.
    """
    if split is not None:
        check_name(split, f"--split {split}", UsageError)
    names = sorted(_tars(folder))
    if not names:
        raise DataError(f"{folder} holds no .tar files; give the folder of the shards.")
    shards, rejected = [], []
    with progress(len(names), "index", "shards") as line:
        for name in names:
            path, chosen = join(folder, name), split or _split(name)
            info, rows, bad = retry(partial(read_tar, path, name, chosen), f"Reading {path}")
            rejected += bad
            if rows:
                shards.append((info, rows))
            line.update(1, samples=len(rows), rejected=len(bad))
    if not shards:
        told = ", ".join(sorted({one["reason"] for one in rejected})) or "they are empty"
        raise DataError(f"The tars of {folder} hold no usable sample ({told}); see `diffmae index --help`.")
    shards.sort(key=lambda pair: (pair[0].split != "train", pair[0].split, pair[0].name))
    classes = _classes([row for _, rows in shards for row in rows])
    kinds = Counter(
        k for _, rows in shards for row in rows for k, known in MEDIA_SUFFIXES.items() if row["suffix"] in known
    )
    indexed = sum(len(rows) for _, rows in shards)
    reasons = dict(Counter(one["reason"] for one in rejected))
    counts = {"found": indexed + len(rejected), "written": indexed, "rejected": reasons}
    lines = "".join(json.dumps(one, sort_keys=True) + "\n" for one in rejected)
    write_file(join(folder, "rejected.jsonl"), lines.encode())
    manifest = write_manifest(
        folder,
        dataset=dataset or folder.rstrip("/").rpartition("/")[2] or "shards",
        kind=kinds.most_common(1)[0][0],
        classes=classes,
        shards=shards,
        facts={"counts": counts, "indexed": True},
    )
    return IndexResult(folder, len(shards), indexed, reasons, manifest.splits, classes)


def read_tar(path: str, name: str, split: str) -> tuple[ShardInfo, list[dict[str, Any]], list[dict[str, str]]]:
    """Headers and checksums of one tar: what it is, a row for each whole sample, and what was rejected."""
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    group: dict[str, tuple[int, int]] = {}
    current, seen = None, set()
    with _open(path) as file:
        size = file.seek(0, 2)
        file.seek(0)

        def finish() -> None:
            if current is None:
                return
            try:
                if current in seen:
                    raise DataError("scattered")
                seen.add(current)
                rows.append(_row(file, current, group, size))
            except DataError as error:
                reason = str(error).split(":")[0]
                rejected.append(
                    {"path": printable(f"{name}/{current}"), "split": split, "reason": reason, "detail": str(error)}
                )

        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                    if member.isdir():
                        continue
                    base = posixpath.basename(member.name)
                    stem, _, suffix = base.partition(".")
                    key = posixpath.join(posixpath.dirname(member.name), stem)
                    if key != current:
                        finish()
                        current, group = key, {}
                    if not member.isreg() or member.issparse() or suffix.lower() in group:
                        group["!"] = (0, 0)
                    else:
                        group[suffix.lower()] = (member.offset_data, member.size)
                file.seek(tar.offset)
                if any(file.read(512)):  # tarfile ends quietly at a header that is none
                    raise tarfile.ReadError(f"no header at {tar.offset}")
        except OSError as error:
            raise access_error(path, error) from error
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            rejected.append({"path": name, "split": split, "reason": "cut", "detail": f"{error}"})
        finish()
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return ShardInfo(name, split, size, digest.hexdigest(), len(rows)), rows, rejected


class _Header(tarfile.TarInfo):
    """A header whose long names and extensions are bounded: tarfile takes memory for whatever size they claim."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > _META_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _proc_gnusparse_10(self, next: tarfile.TarInfo, *_: Any) -> None:
        next.sparse = []  # type: ignore[attr-defined]  # never read: the map may be as large as it likes


_EXTENDED = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE}
_EXTENDED |= {tarfile.SOLARIS_XHDTYPE}


def _row(file: Any, key: str, group: dict[str, tuple[int, int]], end: int) -> dict[str, Any]:
    if "!" in group:
        raise DataError("not a file: a link, device, sparse or doubled member")
    known = MEDIA_SUFFIXES["video"] + MEDIA_SUFFIXES["image"]
    media = [suffix for suffix in group if suffix in known]
    dotted = [suffix for suffix in group if "." in suffix and suffix.rpartition(".")[2] in known]
    if not media and dotted:
        raise DataError(
            f"dots: WebDataset takes all after the first dot of a name for its kind, here {dotted[0]!r}; name the "
            "files without other dots"
        )
    if len(media) != 1:
        raise DataError(f"incomplete: {len(media)} media members among {sorted(group)}")
    if any(offset + size > end for offset, size in group.values()):
        raise DataError("cut: the tar ends inside this sample")
    offset, size = group[media[0]]
    if size > DEFAULT_LIMITS.bytes or size == 0:
        raise DataError(f"size: the media member has {size} bytes")
    meta: dict[str, Any] = {}
    meta_offset, meta_size = group.get("json", (-1, 0))
    text = b""
    if 0 < meta_size <= _META_BYTES:
        file.seek(meta_offset)
        text = file.read(meta_size)
        try:
            meta = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError("json: the JSON member is damaged") from None
        meta = meta if isinstance(meta, dict) else {}
    elif "json" in group:
        meta_offset, meta_size = -1, 0
    label = meta.get("class")
    label = meta.get("label") if label is None else label
    if "cls" in group and group["cls"][1] <= 256:
        file.seek(group["cls"][0])
        label = file.read(group["cls"][1]).decode("utf-8", errors="replace").strip()
    name = _label_name(label)
    file.seek(offset)
    crc, left = 0, size
    while left:
        block = file.read(min(left, 1 << 22))
        if not block:
            raise DataError("cut: the tar ends inside this sample")
        crc, left = zlib.crc32(block, crc), left - len(block)
    row = {name: value for name in ("frames", "width", "height") if (value := _whole(meta.get(name)))}
    return row | {
        "key": printable(key),
        "suffix": media[0],
        "offset": offset,
        "size": size,
        "meta_offset": meta_offset,
        "meta_size": meta_size,
        "crc": zlib.crc32(text, crc),
        "fps": float(meta["fps"]) if isinstance(meta.get("fps"), (int, float)) and 0 < meta["fps"] < 10_000 else 0.0,
        "label_name": name,
    }


def _label_name(label: Any) -> str | None:
    """A label as text, None for none; numbers below 0 are none."""
    if not isinstance(label, (str, int)) or isinstance(label, bool):
        return None
    name = printable(str(label)).strip()
    if re.fullmatch(r"[+-]?[0-9]{1,18}", name):
        if int(name) >= MOST_CLASSES:
            raise DataError(f"label: {name} is above {MOST_CLASSES - 1}")
        return str(int(name)) if int(name) >= 0 else None
    if len(name) > 1000:
        raise DataError(f"label: a name of {len(name)} characters")
    return name or None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else 0


def _classes(rows: list[dict[str, Any]]) -> list[str]:
    """Turn label names or numbers of the rows into labels; numbers keep their value."""
    given = {row["label_name"] for row in rows if row["label_name"] is not None}
    classes = numeric_classes(given) or sorted(given)
    label = {name: number for number, name in enumerate(classes)}
    for row in rows:
        name = row.pop("label_name")
        row["label"] = -1 if name is None else label[name]
    return classes


def _tars(folder: str) -> list[str]:
    if is_remote(folder):
        files, inner = filesystem(folder)
        found = retry(lambda: files.find(inner, maxdepth=1), f"Listing {folder}")
        return [path.rpartition("/")[2] for path in found if path.endswith(".tar")]
    try:
        return [name for name in os.listdir(folder) if name.endswith(".tar")]
    except OSError as error:
        raise access_error(folder, error) from error


def _open(path: str) -> Any:
    if is_remote(path):
        files, inner = filesystem(path)
        return files.open(inner, "rb")
    return open(path, "rb")


def _split(name: str) -> str:
    return next((SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS), "train")
