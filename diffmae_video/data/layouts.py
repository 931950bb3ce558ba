"""Find the samples of a data set on disk, in the layouts people have them in.

A listing holds each annotated or found file exactly once, either as an Item or as a Rejection, so that counts add up:
found = written + rejected. Published data sets stand in published.py; here are lists, tables and plain folders.
"""

from __future__ import annotations

import csv
import hashlib
import io
import posixpath
import re
from dataclasses import replace

from diffmae_video.data.listing import (
    IMAGE_EXTENSIONS,
    SPLITS,
    VIDEO_EXTENSIONS,
    Item,
    Listing,
    Rejection,
    Tree,
    number_of,
    split_of,
)
from diffmae_video.errors import DataError, UsageError
from diffmae_video.registry import layouts

_LISTS = SPLITS | {"pretrain": "train", "trainlist": "train", "testlist": "test"}
_PATH_COLUMNS = {"path", "file", "filename", "filepath", "file_path", "video", "video_path", "clip"}


def list_samples(source: str, layout: str = "auto", kind: str = "video", fold: int = 1) -> Listing:
    """List a data set.

    Args:
        source: folder or URL; or a CSV/TSV file of `path,label[,split][,start,end]` with paths relative to its folder.
        layout: `auto`, or the name of one.
        kind: `video` or `image`.
        fold: which of the three official splits of UCF101 and HMDB51.

    Raises:
        DataError: nothing is there.
        UsageError: an unknown layout.
    """
    if layout != "auto":
        try:
            layouts.check(layout)
        except ValueError as error:
            raise UsageError(f"--layout {layout}: {error}, or auto.") from error
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
        listing = layouts.get(name)(tree, fold)
        if listing is None:
            raise DataError(f"{source} does not look like the layout {name!r}; leave --layout out to have it guessed.")
        listing.layout = name
    if not listing.items and not listing.rejected:
        raise DataError(f"{source} holds no {kind} files; give the folder that holds them.")
    if not listing.classes:
        listing.classes = sorted({item.label for item in listing.items if item.label is not None})
    listing.items = [replace(item, size=tree.size(item.path)) for item in _with_keys(listing.items)]
    return listing


def _guess(tree: Tree) -> str:
    """The first layout that the folder looks like; those of other packages come first, they are the most particular."""
    names = sorted(layouts.names(), key=lambda name: layouts.get(name).__module__.startswith("diffmae_video."))
    return next(name for name in names if layouts.get(name)(tree, 1) is not None)


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


@layouts.register("lists")
def _lists(tree: Tree, fold: int) -> Listing | None:
    """Lists of mmaction2, SlowFast and VideoMAE: lines of `path label`, or `path total label`, without a header."""
    listing, found = Listing("lists"), False
    numbers: dict[int, str] = {}
    rows: list[tuple[str, str, int]] = []
    for table in tree.paths:
        name = posixpath.basename(table).lower()
        if not name.endswith((".txt", ".csv")) or table.count("/") > 1:
            continue
        split = next((_LISTS[part] for part in re.split(r"[^a-z]+", name) if part in _LISTS), None)
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


@layouts.register("table")
def _any_table(tree: Tree, fold: int) -> Listing | None:
    """A single CSV/TSV with a `path` column at the top of the folder."""
    for path in tree.paths:
        if "/" not in path and path.lower().endswith((".csv", ".tsv")):
            head = re.split(r"[,\t]", (tree.text(path).splitlines() or [""])[0].lower())
            if _PATH_COLUMNS & {name.strip() for name in head}:
                return _table(tree, path)
    return None


@layouts.register("folders")
def _folders(tree: Tree, fold: int) -> Listing | None:
    """Class folders, directly or below split folders; underscores in names stay as they are."""
    media = [path for path in tree.media if "/" in path or "." in path]  # README, LICENSE at the top are no clips
    parts = [path.split("/") for path in media]
    if not parts or any(len(part) < 2 for part in parts):
        return None
    if all(len(part) == 2 and split_of("/".join(part)) for part in parts):
        return None  # split folders without classes
    listing = Listing("folders")
    for path, part in zip(media, parts, strict=True):
        split = split_of(path)
        label = part[-2] if len(part) > 2 or not split else None
        listing.items.append(Item(path, split or "train", label))
    return listing


@layouts.register("flat")
def _flat(tree: Tree, fold: int) -> Listing:
    """Unlabelled files, wherever they are."""
    return Listing("flat", items=[Item(path, split_of(path) or "train", None) for path in tree.media])


def _table(tree: Tree, name: str) -> Listing:
    """CSV/TSV: path,label[,split][,start,end], with a header or, for two or three columns, without."""
    text = tree.text(name)
    dialect = "\t" if name.lower().endswith(".tsv") else ","
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=dialect) if any(cell.strip() for cell in row)]
    if not rows:
        raise DataError(f"{tree.root}/{name} is empty; give a table with the columns path,label.")
    head = [cell.strip().lower() for cell in rows[0]]
    aliases = {"time_start": "start", "time_end": "end", "class": "label"} | dict.fromkeys(_PATH_COLUMNS, "path")
    head = [aliases.get(cell, cell) for cell in head]
    if "path" in head:
        rows = rows[1:]
    else:
        head = ["path", "label", "split", "start", "end"][: len(rows[0])]
    listing, taken = Listing("table"), set()
    for row in rows:
        cells = dict(zip(head, (cell.strip() for cell in row), strict=False))
        path = posixpath.normpath(cells.get("path", "").replace("\\", "/"))
        given = cells.get("split", "").lower()
        given = re.sub(r"[^a-z0-9_-]", "_", given)[:40]  # it names files
        split = SPLITS.get(given, given) or split_of(path) or "train"
        if path.startswith(("../", "/")):
            listing.rejected.append(Rejection(path, split, "outside", "the path leaves the folder of the table"))
        elif path not in tree.present:
            listing.rejected.append(Rejection(path, split, "missing", f"{name} names it"))
        else:
            start, end = number_of(cells.get("start")), number_of(cells.get("end"))
            if (path, split, start, end) in taken:
                listing.rejected.append(Rejection(path, split, "duplicate", f"{name} names it twice"))
                continue
            taken.add((path, split, start, end))
            listing.items.append(Item(path, split, cells.get("label") or None, start, end))
    return listing
