"""Find the samples of a data set on disk, in the layouts people have them in.

Every layout is one function `(tree, options) -> Listing`. A listing holds each annotated or found file exactly once,
either as an Item or as a Rejection, so that counts add up: found = written + rejected.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from diffmae_video.data.remote import filesystem, is_remote, join, read_file
from diffmae_video.errors import DataError, UsageError

VIDEO_EXTENSIONS = frozenset(
    (
        *("mp4", "m4v", "mov", "webm", "mkv", "avi", "flv", "wmv", "mpg", "mpeg", "mpe", "ts", "m2ts", "3gp", "gif"),
        *("ogv", "h264", "264", "swf"),
    )
)
IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm"])
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "validate": "val"}
SPLITS |= {"test": "test", "testing": "test"}


@dataclass(frozen=True)
class Item:
    """One input: where it is, what it becomes."""

    path: str
    """Path below the source folder, `/` between parts."""
    split: str
    label: str | None
    start: float | None = None
    """Seconds; with `end`, the annotated span that `--trim` cuts out."""
    end: float | None = None
    key: str = ""


@dataclass(frozen=True)
class Rejection:
    """One input that does not become a sample, and why."""

    path: str
    split: str
    reason: str
    """Short kind: missing, unannotated, unreadable, timeout, ..."""
    detail: str = ""


@dataclass
class Listing:
    """All inputs of a data set."""

    layout: str
    items: list[Item] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    """Class names in label order; empty when nothing is labelled."""


class Tree:
    """Files below a local folder or URL, listed once."""

    def __init__(self, root: str, extensions: frozenset[str]):
        self.root, self.extensions = root, extensions
        self.paths = sorted(self._walk())
        self.media = [path for path in self.paths if _is_media(path, extensions)]
        self.present = frozenset(self.paths)

    def _walk(self) -> Iterable[str]:
        import os

        if is_remote(self.root):
            files, inner = filesystem(self.root)
            base = inner.rstrip("/") + "/"
            return [path[len(base) :] for path in files.find(inner) if path.startswith(base)]
        found = []
        for folder, names, files in os.walk(self.root, followlinks=True):
            names[:] = sorted(name for name in names if not name.startswith("."))
            relative = os.path.relpath(folder, self.root).replace(os.sep, "/")
            found += [name if relative == "." else f"{relative}/{name}" for name in files if not name.startswith(".")]
        return found

    def text(self, path: str) -> str:
        """A text file of the tree."""
        return read_file(join(self.root, path)).decode("utf-8-sig", errors="replace")


def _is_media(path: str, extensions: frozenset[str]) -> bool:
    name = posixpath.basename(path)
    return "." not in name or name.rpartition(".")[2].lower() in extensions


def list_samples(source: str, layout: str = "auto", kind: str = "video", fold: int = 1) -> Listing:
    """List a data set.

    Args:
        source: folder or URL; or a CSV/TSV file of path,label[,split][,start,end] with paths relative to its folder.
        layout: `auto`, or a key of LAYOUTS.
        kind: `video` or `image`.
        fold: which of the three official splits of UCF101 and HMDB51.

    Raises:
        DataError: nothing is there.
        UsageError: an unknown layout.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise UsageError(f"--layout {layout} is not known; choose one of auto, {', '.join(LAYOUTS)}.")
    extensions = VIDEO_EXTENSIONS if kind == "video" else IMAGE_EXTENSIONS
    table = None
    if source.lower().endswith((".csv", ".tsv")):
        source, _, table = source.replace("\\", "/").rpartition("/")
        source = source or "."
    tree = Tree(source, extensions)
    if table is not None:
        if table not in tree.present:
            raise DataError(f"{source}/{table}: there is no such file; check the path.")
        listing = _table(tree, table)
    else:
        if not tree.paths:
            raise DataError(f"{source} is empty or missing; give the folder that holds the {kind}s.")
        name = layout if layout != "auto" else _guess(tree)
        listing = LAYOUTS[name](tree, fold)
        if listing is None:
            raise DataError(f"{source} does not look like the layout {name!r}; leave --layout out to have it guessed.")
        listing.layout = name
    if not listing.items and not listing.rejected:
        raise DataError(f"{source} holds no {kind} files; give the folder that holds them.")
    if not listing.classes:
        listing.classes = sorted({item.label for item in listing.items if item.label is not None})
    listing.items = _with_keys(listing.items)
    return listing


def _guess(tree: Tree) -> str:
    for name in ("ssv2", "ucf101", "hmdb51", "kinetics", "lists", "table", "imagenet", "folders"):
        if LAYOUTS[name](tree, 1) is not None:
            return name
    return "flat"


def _with_keys(items: list[Item]) -> list[Item]:
    """Give every item a key that is unique in its split, safe in a tar, and free of dots; then shuffle by hash."""
    used: set[tuple[str, str]] = set()
    keyed = []
    for item in sorted(items, key=lambda item: (item.split, item.path, item.start or 0.0)):
        stem = posixpath.splitext(posixpath.basename(item.path))[0]
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60] or "sample"
        mark = hashlib.sha1(f"{item.path}\0{item.start}".encode()).hexdigest()
        key = plain if plain == stem else f"{plain}-{mark[:8]}"
        if (item.split, key) in used:
            key = f"{plain}-{mark[:12]}"
        used.add((item.split, key))
        keyed.append((mark, replace(item, key=key)))
    keyed.sort(key=lambda pair: (pair[1].split != "train", pair[1].split, pair[0]))  # classes mix within every shard
    return [item for _, item in keyed]


# -- layouts -------------------------------------------------------------------------------------------------------


def _kinetics(tree: Tree, fold: int) -> Listing | None:
    """Kinetics: {train,val,test}.csv beside flat folders, class folders, `videos_train/`, with or without times."""
    tables = {}
    for path in tree.paths:
        name = posixpath.basename(path).lower()
        if name.endswith(".csv") and path.count("/") <= 1:
            split = next((SPLITS[part] for part in re.split(r"[^a-z]+", name[:-4]) if part in SPLITS), None)
            if split and "youtube_id" in tree.text(path)[:400].lower():
                tables.setdefault(split, path)
    if not tables:
        return None
    by_stem: dict[tuple[str | None, str], str] = {}
    by_id: dict[tuple[str | None, str], list[str]] = {}
    replaced: dict[str, str] = {}
    for path in tree.media:
        stem = posixpath.splitext(posixpath.basename(path))[0]
        split = _split_of(path)
        if path.startswith("replacement"):
            replaced[stem] = path
        else:
            by_stem.setdefault((split, stem), path)
            by_id.setdefault((split, stem[:11]), []).append(path)
    listing, taken = Listing("kinetics"), set()
    for split, table in tables.items():
        for row in csv.DictReader(io.StringIO(tree.text(table))):
            row = {(name or "").strip().lower(): (value or "").strip() for name, value in row.items() if name}
            video = row.get("youtube_id", "")[:11]
            start, end = _number(row.get("time_start")), _number(row.get("time_end"))
            if not video:
                continue
            stem = f"{video}_{int(start or 0):06d}_{int(end or 0):06d}"
            path = by_stem.get((split, stem)) or by_stem.get((None, stem)) or replaced.get(stem)
            for place in (split, None):  # some copies drop the times from the name
                path = path or next((p for p in by_id.get((place, video), ()) if _stem(p) == video), None)
            label = row.get("label", "").strip('"') or None
            if path is None:
                listing.rejected.append(Rejection(f"{stem}.mp4", split, "missing", f"{table} names it"))
            elif path in taken:
                listing.rejected.append(Rejection(path, split, "duplicate", f"{table} names it twice"))
            else:
                taken.add(path)
                if stem in replaced and path != replaced[stem]:
                    taken.add(replaced[stem])
                    path = replaced[stem]
                whole = _stem(path) != stem  # the file is the uncut video
                listing.items.append(Item(path, split, label, start if whole else None, end if whole else None))
    known = set(tables)
    for path in tree.media:
        if path not in taken and "." in posixpath.basename(path) and _split_of(path) in known:
            listing.rejected.append(Rejection(path, _split_of(path), "unannotated", "no table names it"))
    return listing


def _lists(tree: Tree, fold: int) -> Listing | None:
    """Lists of mmaction2, SlowFast and VideoMAE: lines of `path label`, or `path total label`, without a header."""
    listing, found = Listing("lists"), False
    numbers: dict[int, str] = {}
    rows: list[tuple[str, str, int]] = []
    for table in tree.paths:
        name = posixpath.basename(table).lower()
        if not name.endswith((".txt", ".csv")) or table.count("/") > 1:
            continue
        split = next((SPLITS[part] for part in re.split(r"[^a-z]+", name) if part in SPLITS), None)
        lines = [line for line in tree.text(table).splitlines() if line.strip()]
        parsed = [re.fullmatch(r"(.+?)[ ,](?:(-?\d+) )?(-?\d+)", line.strip()) for line in lines]
        if split is None or not lines or not all(parsed):
            continue
        found = True
        rows += [(split, match[1].strip('"'), int(match[3])) for match in parsed]
    if not found:
        return None
    files = {path: path for path in tree.media}
    by_tail: dict[str, str] = {}
    for path in tree.media:
        by_tail.setdefault("/".join(path.split("/")[-2:]), path)
        by_tail.setdefault(path.split("/")[-1], path)
    resolved = []
    for split, name, label in rows:
        tail = name.replace("\\", "/")
        path = files.get(tail) or by_tail.get("/".join(tail.split("/")[-2:])) or by_tail.get(tail.split("/")[-1])
        if path is None:
            listing.rejected.append(Rejection(name, split, "missing", "a list names it"))
            continue
        resolved.append((split, path, label))
        parent = posixpath.basename(posixpath.dirname(path))
        numbers.setdefault(label, parent)
    folders = {parent.replace("_", " ") for parent in numbers.values()}
    named = len(folders) == len(numbers) and not folders & set(SPLITS)  # class folders tell the names
    names = {n: (numbers[n].replace("_", " ") if named else str(n)) for n in numbers if n >= 0}
    listing.classes = [names[n] for n in sorted(names)]
    listing.items = [Item(path, split, names.get(label)) for split, path, label in resolved]
    return listing


def _ssv2(tree: Tree, fold: int) -> Listing | None:
    """Something-Something V2: JSON lists with templates; videos `<id>.webm` or `.mp4`."""
    tables = {}
    for path in tree.paths:
        match = re.search(r"(?:something-something-v2-|^|/)(labels|train|validation|test)\.json$", path)
        if match:
            tables[match[1]] = path
    if "labels" not in tables or "train" not in tables:
        return None
    names = json.loads(tree.text(tables["labels"]))
    listing = Listing("ssv2", classes=[name for name, _ in sorted(names.items(), key=lambda pair: int(pair[1]))])
    files = {_stem(path): path for path in tree.media}
    for table, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        for row in json.loads(tree.text(tables[table])) if table in tables else ():
            path = files.get(str(row["id"]))
            label = row["template"].replace("[", "").replace("]", "") if "template" in row else None
            if path is None:
                listing.rejected.append(Rejection(f"{row['id']}.webm", split, "missing", f"{tables[table]} names it"))
            elif label is not None and label not in names:
                listing.rejected.append(Rejection(path, split, "label", f"{label!r} is not in {tables['labels']}"))
            else:
                listing.items.append(Item(path, split, label))
    return listing


def _ucf101(tree: Tree, fold: int) -> Listing | None:
    """UCF101: classInd.txt and {train,test}list0N.txt; the test list becomes split `val`."""
    tables = {posixpath.basename(path): path for path in tree.paths if path.endswith(".txt")}
    if "classInd.txt" not in tables:
        return None
    classes = dict(line.split()[::-1] for line in tree.text(tables["classInd.txt"]).splitlines() if line.strip())
    listing = Listing("ucf101", classes=[name for name, _ in sorted(classes.items(), key=lambda pair: int(pair[1]))])
    files = {_stem(path): path for path in tree.media}
    for name, split in ((f"trainlist0{fold}.txt", "train"), (f"testlist0{fold}.txt", "val")):
        for line in tree.text(tables[name]).splitlines() if name in tables else ():
            if line.strip():
                relative = line.split()[0]
                path = files.get(_stem(relative))
                if path is None:
                    listing.rejected.append(Rejection(relative, split, "missing", f"{name} names it"))
                else:
                    listing.items.append(Item(path, split, relative.split("/")[0]))
    return listing


def _hmdb51(tree: Tree, fold: int) -> Listing | None:
    """HMDB51: `<class>_test_splitN.txt` with 1 = train, 2 = test (split `val`), 0 = not used."""
    tables = [path for path in tree.paths if path.endswith(f"_test_split{fold}.txt")]
    if not tables:
        return None
    listing = Listing("hmdb51")
    files = {_stem(path): path for path in tree.media}
    for table in tables:
        label = posixpath.basename(table).removesuffix(f"_test_split{fold}.txt")
        for line in tree.text(table).splitlines():
            name, _, use = line.strip().rpartition(" ")
            if use in ("1", "2"):
                split = "train" if use == "1" else "val"
                path = files.get(_stem(name.strip()))
                if path is None:
                    listing.rejected.append(Rejection(name.strip(), split, "missing", f"{table} names it"))
                else:
                    listing.items.append(Item(path, split, label))
    return listing


def _imagenet(tree: Tree, fold: int) -> Listing | None:
    """ImageNet: train/<wnid>/; val/<wnid>/, or flat val with a ground-truth list (wnid or 1-based number a line)."""
    wnids = sorted({p.split("/")[-2] for p in tree.media if re.fullmatch(r"n\d{8}", ("/" + p).split("/")[-2])})
    if not wnids:
        return None
    listing = Listing("imagenet", classes=wnids)
    truth: dict[str, str] = {}
    flat = sorted(path for path in tree.media if _split_of(path) == "val" and path.split("/")[-2] not in wnids)
    for path in tree.paths:
        if re.search(r"(ground_truth|val(idation)?(_labels)?|LOC_val_solution)\.(txt|csv)$", path):
            lines = [line for line in tree.text(path).splitlines() if line.strip() and not line.startswith("ImageId")]
            for number, line in enumerate(lines):
                parts = re.split(r"[ ,]+", line.strip())
                name = parts[0] if len(parts) > 1 else _stem(flat[number]) if number < len(flat) else ""
                value = parts[1] if len(parts) > 1 else parts[0]
                if value.isdigit():  # one-based in the official list, zero-based with a file name
                    place = int(value) - (1 if len(parts) == 1 else 0)
                    value = wnids[place] if 0 <= place < len(wnids) else value
                truth[_stem(name)] = value
    for path in tree.media:
        split, parent = _split_of(path) or "train", path.split("/")[-2] if "/" in path else ""
        label = parent if parent in wnids else truth.get(_stem(path))
        if label is None and split != "test":
            listing.rejected.append(Rejection(path, split, "unannotated", "no class folder and no ground truth"))
        else:
            listing.items.append(Item(path, split, label))
    return listing


def _folders(tree: Tree, fold: int) -> Listing | None:
    """Class folders, directly or below split folders; underscores in names stay as they are."""
    parts = [path.split("/") for path in tree.media]
    if not parts or any(len(part) < 2 for part in parts):
        return None
    if all(len(part) == 2 and _split_of("/".join(part)) for part in parts):
        return None  # split folders without classes
    listing = Listing("folders")
    for path, part in zip(tree.media, parts, strict=True):
        split = _split_of(path)
        label = part[-2] if len(part) > 2 or not split else None
        listing.items.append(Item(path, split or "train", label))
    return listing


def _flat(tree: Tree, fold: int) -> Listing:
    """Unlabelled files, wherever they are."""
    return Listing("flat", items=[Item(path, _split_of(path) or "train", None) for path in tree.media])


def _any_table(tree: Tree, fold: int) -> Listing | None:
    """A single CSV/TSV with a `path` column at the top of the folder."""
    for path in tree.paths:
        if "/" not in path and path.lower().endswith((".csv", ".tsv")):
            head = re.split(r"[,\t]", (tree.text(path).splitlines() or [""])[0].lower())
            if {"path", "file", "filename", "video"} & {name.strip() for name in head}:
                return _table(tree, path)
    return None


def _table(tree: Tree, name: str) -> Listing:
    """CSV/TSV: path,label[,split][,start,end], with a header or, for two or three columns, without."""
    text = tree.text(name)
    dialect = "\t" if name.lower().endswith(".tsv") else ","
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=dialect) if any(cell.strip() for cell in row)]
    if not rows:
        raise DataError(f"{tree.root}/{name} is empty; give a table with the columns path,label.")
    head = [cell.strip().lower() for cell in rows[0]]
    aliases = {"file": "path", "filename": "path", "video": "path", "class": "label", "time_start": "start"}
    head = [aliases.get(cell, {"time_end": "end"}.get(cell, cell)) for cell in head]
    if "path" in head:
        rows = rows[1:]
    else:
        head = ["path", "label", "split", "start", "end"][: len(rows[0])]
    listing = Listing("table")
    for row in rows:
        cells = dict(zip(head, (cell.strip() for cell in row), strict=False))
        path = posixpath.normpath(cells.get("path", "").replace("\\", "/"))
        given = cells.get("split", "").lower()
        split = SPLITS.get(given, given) or _split_of(path) or "train"
        if path.startswith(("../", "/")):
            listing.rejected.append(Rejection(path, split, "outside", "the path leaves the folder of the table"))
        elif path not in tree.present:
            listing.rejected.append(Rejection(path, split, "missing", f"{name} names it"))
        else:
            start, end = _number(cells.get("start")), _number(cells.get("end"))
            listing.items.append(Item(path, split, cells.get("label") or None, start, end))
    return listing


LAYOUTS: dict[str, Callable[[Tree, int], Listing | None]] = {
    "kinetics": _kinetics,
    "lists": _lists,
    "ssv2": _ssv2,
    "ucf101": _ucf101,
    "hmdb51": _hmdb51,
    "imagenet": _imagenet,
    "folders": _folders,
    "table": _any_table,
    "flat": _flat,
}


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _split_of(path: str) -> str | None:
    """The split that a folder of the path names: `train/`, `videos_val/`, `Validation/`."""
    for part in path.split("/")[:-1]:
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS and part.lower() in (
                word,
                f"videos_{word}",
                f"{word}_256",
                f"{word}_320",
                f"{word}_videos",
            ):
                return SPLITS[word]
    return None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
