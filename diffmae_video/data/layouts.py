"""Find the samples of a data set on disk, in the layouts people have them in.

A listing holds each annotated or found file exactly once, either as an Item or as a Rejection, so that counts add up:
found = written + rejected. Published data sets stand in published.py; here are lists, tables and plain folders.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from dataclasses import replace

from diffmae_video.data.annotations import SUFFIXES, by_value, numeric_classes, read_annotation
from diffmae_video.data.listing import (
    SPLITS,
    Item,
    Listing,
    Rejection,
    Tree,
    split_of,
)
from diffmae_video.errors import DataError, UsageError
from diffmae_video.files import printable
from diffmae_video.registry import layouts

_ALSO = {"dev": "val", "eval": "val", "evaluation": "val"}  # of lists and columns; a folder of this name may be a class
_LISTS = SPLITS | _ALSO | {"pretrain": "train", "trainlist": "train", "testlist": "test"}
_LIST_WORDS = {"list", "lists", "split", "splits", "video", "videos", "annotation", "annotations", "label", "labels"}
_LIST_WORDS |= {"file", "files", "data", "csv", "txt", "rawframes", "set"}
_LIST_WORDS |= _LISTS.keys()
_UNREAD = (".json", ".jsonl", ".xlsx", ".xls", ".ods")


def list_samples(source: str, layout: str = "auto", kind: str = "video", fold: int = 1) -> Listing:
    """List a data set.

    Args:
        source: folder or URL; or an annotation file (see annotations.py) with paths relative to its folder.
        layout: `auto`, or the name of one.
        kind: `video`, `image`, or `auto`: images where the folder holds images and no videos.
        fold: which of the three official splits of UCF101 and HMDB51.

    Raises:
        DataError: nothing is there, a folder cannot be listed, or an annotation cannot be understood.
        UsageError: an unknown layout.
    """
    if layout != "auto":
        try:
            layouts.check(layout)
        except ValueError as error:
            raise UsageError(f"--layout {layout}: {error}, or auto.") from error
    table = None
    if source.lower().endswith(SUFFIXES) and not (os.path.isdir(source)):
        source, _, table = source.replace("\\", "/").rpartition("/")
        source = source or "."
    tree = Tree(source, kind)
    kind = tree.kind
    if table is not None:
        if table not in tree.present:
            raise DataError(f"{source}/{table}: there is no such file; check the path.")
        listing = _listed(tree, "table", [table], certain=True)
    else:
        if not tree.paths:
            raise DataError(f"{source} is empty or missing; give the folder that holds the {kind}s.")
        name = layout if layout != "auto" else _guess(tree)
        found = layouts.get(name)(tree, fold)
        if found is None:
            raise DataError(f"{source} does not look like the layout {name!r}; leave --layout out to have it guessed.")
        listing = found
        listing.layout = name
    listing.kind = kind
    if not listing.items and not listing.rejected:
        raise DataError(f"{source} holds no {kind} files; give the folder that holds them.")
    _settle(listing)
    listing.items = [replace(item, size=tree.size(item.path)) for item in _with_keys(listing.items)]
    return listing


def _settle(listing: Listing) -> None:
    """Give the classes an order, and take out what is said twice or against itself."""
    if not listing.classes:
        listing.classes = by_value(item.label for item in listing.items if item.label is not None)
    said: dict[tuple[str, float | None, float | None], list[Item]] = {}
    for item in listing.items:
        said.setdefault((item.path, item.start, item.end), []).append(item)
    kept, shared = [], 0
    for items in said.values():
        labels, by_split = {item.label for item in items}, {item.split: item for item in items}
        if len(labels) > 1:
            told = " and ".join(sorted(repr(label) for label in labels))
            listing.rejected += [
                Rejection(one.path, one.split, "conflict", f"it has the labels {told}") for one in items
            ]
            continue
        kept += by_split.values()
        shared += len(by_split) > 1
        extra = [one for one in items if by_split[one.split] is not one]
        listing.rejected += [Rejection(one.path, one.split, "duplicate", "it is listed twice") for one in extra]
    listing.items = kept
    if shared:
        listing.notes.append(f"{shared} clips stand in more than one split: a test on them is no test.")


def _guess(tree: Tree) -> str:
    """The first layout that the folder looks like; those of other packages come first, they are the most particular."""
    found = {name: layouts.get(name) for name in layouts.names()}
    names = sorted(found, key=lambda name: found[name].__module__.startswith("diffmae_video."))
    return next(name for name in names if found[name](tree, 1) is not None)


def _with_keys(items: list[Item]) -> list[Item]:
    """Give every item a key that is unique in its split, safe in a tar, and free of dots; then shuffle by hash."""
    used: set[tuple[str, str]] = set()
    keyed = []
    for item in sorted(items, key=lambda item: (item.split, item.path, item.start or 0.0)):
        stem = posixpath.splitext(posixpath.basename(item.path))[0]
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60] or "sample"
        mark = hashlib.sha1(f"{item.path}\0{item.start}".encode("utf-8", "surrogateescape")).hexdigest()
        key = plain if plain == stem else f"{plain}-{mark[:8]}"
        if (item.split, key) in used:
            key = f"{plain}-{mark[:12]}"
        used.add((item.split, key))
        keyed.append((mark, replace(item, key=key)))
    keyed.sort(key=lambda pair: (pair[1].split != "train", pair[1].split, pair[0]))  # classes mix within every shard
    return [item for _, item in keyed]


@layouts.register("lists")
def _lists(tree: Tree, fold: int) -> Listing | None:
    """An annotation file for each split, as for mmaction2, SlowFast and VideoMAE: `path label`, `path total label`."""
    files = _annotation_files(tree)
    names = [name for name in files if _split_named(name)]
    others = [name for name in files if name not in names]
    folds = {name: re.search(r"list0*(\d)\.\w+$", name) for name in names}  # trainlist01.txt, testlist01.txt
    names = [name for name in names if not (match := folds[name]) or int(match[1]) == fold]
    if not names:
        return None
    listing = _listed(tree, "lists", names)
    if others:
        told = ", ".join(others)
        listing.notes.append(f"{told} was not read, since {names[0]} tells a split; give its path to read it instead.")
    return listing


@layouts.register("table")
def _any_table(tree: Tree, fold: int) -> Listing | None:
    """One annotation file for all splits; paths are relative to the folder."""
    names = [name for name in _annotation_files(tree) if not _split_named(name)]
    if len(names) > 1:
        told = ", ".join(names)
        raise DataError(f"{tree.root} holds several annotation files ({told}); give the path of one instead.")
    return _listed(tree, "table", names) if names else None


def _annotation_files(tree: Tree) -> list[str]:
    """Files at the top or one folder below that name media with labels, or, by their own name, splits.

    Raises:
        DataError: one is named after a split and is not understood.
    """
    found = []
    for name in tree.paths:
        if name.count("/") > 1:
            continue
        if name.lower().endswith(SUFFIXES):
            rows = read_annotation(tree, name)
            if rows is None and _is_split_list(name):
                raise DataError(
                    f"{tree.root}/{name} names no file of the folder; correct it, or name --layout folders."
                )
            if rows and (_split_named(name) or any(row.label or row.split for row in rows)):
                found.append(name)
        elif name.lower().endswith(_UNREAD) and (_is_split_list(name) or _names_media(tree, name)):
            raise DataError(f"{tree.root}/{name} is not read; write it as CSV of path,label, or name --layout folders.")
    return found


def _names_media(tree: Tree, name: str) -> bool:
    """Whether a file that is not read is called annotation, and lists files of the folder as far as one can see."""
    words = _words(name)
    if not words or not words <= _LIST_WORDS:
        return False
    if not name.lower().endswith((".json", ".jsonl")):
        return True  # a spreadsheet
    text = tree.text(name)
    return any(posixpath.basename(path) in text for path in tree.media[:100])


def _split_named(name: str) -> str | None:
    words = re.split(r"[^a-z]+", posixpath.basename(name).lower())
    return next((_LISTS[word] for word in words if word in _LISTS), None)


def _is_split_list(name: str) -> bool:
    """Whether the name of a file says that it lists a split, and nothing else."""
    return _split_named(name) is not None and _words(name) <= _LIST_WORDS


def _words(name: str) -> set[str]:
    """Words of the name of a file, without its ending."""
    return set(re.findall(r"[a-z]+", posixpath.basename(name).lower().rpartition(".")[0]))


_OUTSIDE = (
    "{} names a file outside the folder; shard the folder that holds both, or put a link to the file into this one"
)


def _listed(tree: Tree, layout: str, names: list[str], certain: bool = False) -> Listing:
    """What annotation files say; where they tell the split alone, class folders tell the label."""
    listing = Listing(layout)
    for name in names:
        for row in read_annotation(tree, name, certain) or ():
            if row.problem:
                split = _split_named(name) or "train"
                listing.rejected.append(Rejection(row.path, split, "annotation", f"{name}, {row.problem}"))
                continue
            given = re.sub(r"[^a-z0-9_-]", "_", (row.split or "").lower())[:40]  # it names files
            hint = (SPLITS | _ALSO).get(given, given) or (_split_named(name) if layout == "lists" else None)
            path = tree.resolve(row.path, hint)
            split = hint or split_of(path or row.path) or _split_named(name) or "train"
            if path is None:
                leaves = row.path.replace("\\", "/").startswith(("../", "/")) and layout == "table"
                why = ("outside", _OUTSIDE.format(name)) if leaves else ("missing", f"{name} names it")
                listing.rejected.append(Rejection(row.path, split, *why))
                continue
            folder = posixpath.basename(posixpath.dirname(path))
            label = (folder if folder.lower() not in SPLITS else None) if row.alone else row.label
            listing.items.append(Item(path, split, label or None, row.start, row.end))
    classes = numeric_classes(item.label for item in listing.items if item.label is not None)
    if classes is not None:
        listing.classes = classes
        _name_by_folders(listing)
    return listing


def _name_by_folders(listing: Listing) -> None:
    """Names for numbered classes, where every number has a folder of its own."""
    folders: dict[str, set[str]] = {}
    for item in listing.items:
        if item.label is not None:
            folders.setdefault(item.label, set()).add(posixpath.basename(posixpath.dirname(item.path)))
    names = {number: found.pop() for number, found in folders.items() if len(found) == 1}
    if len(names) == len(folders) == len(set(names.values())) and not set(names.values()) & {"", *SPLITS}:
        plain = {number: name.replace("_", " ") for number, name in names.items()}
        listing.classes = [plain.get(number, number) for number in listing.classes]
        listing.items = [replace(one, label=plain.get(one.label or "", one.label)) for one in listing.items]


@layouts.register("folders")
def _folders(tree: Tree, fold: int) -> Listing | None:
    """Class folders, directly or below split folders; underscores in names stay as they are."""
    media = [path for path in tree.media if "/" in path or "." in path]  # README, LICENSE at the top are no clips
    parts = [path.split("/") for path in media]
    if not parts or any(len(part) < 2 for part in parts):
        return None
    splits = _splits_of(tree, media)
    if all(len(part) == 2 and splits[path] for path, part in zip(media, parts, strict=True)):
        return None  # split folders without classes
    listing = Listing("folders")
    for path, part in zip(media, parts, strict=True):
        label = printable(part[-2]) if len(part) > 2 or not splits[path] else None
        listing.items.append(Item(path, splits[path] or "train", label))
    return listing


def _splits_of(tree: Tree, media: list[str]) -> dict[str, str | None]:
    """The split of every path. A folder called `train` among others that are no splits is a class (the vehicle).

    Raises:
        DataError: it may be either.
    """
    beside: dict[str, set[str]] = {}  # folder -> names of the folders in it that hold media
    depth: dict[str, set[int]] = {}  # folder -> how many folders deep media lie in it
    for path in media:
        folders = path.split("/")[:-1]
        for place, name in enumerate(folders):
            beside.setdefault("/".join(folders[:place]), set()).add(name)
            depth.setdefault("/".join(folders[: place + 1]), set()).add(len(folders) - place)
    classes = set()
    for parent, names in beside.items():
        splits = {name for name in names if split_of(f"{name}/x")}
        if not splits or splits == names:
            continue
        inside = {name: depth[f"{parent}/{name}" if parent else name] for name in names}
        if any(inside[name] != {1} for name in splits):
            told, others = ", ".join(sorted(splits)), ", ".join(sorted(names - splits)[:3])
            raise DataError(
                f"{tree.root}/{parent}: {told} may be splits or classes, since {others} stand beside; move them apart, "
                "or give a CSV of path,label,split."
            )
        classes |= {f"{parent}/{name}" if parent else name for name in splits}
    found = {}
    for path in media:
        folders = path.split("/")[:-1]
        places = ["/".join(folders[: place + 1]) for place in range(len(folders))]
        named = (split_of(f"{posixpath.basename(place)}/x") for place in places if place not in classes)
        found[path] = next((split for split in named if split), None)
    return found


@layouts.register("flat")
def _flat(tree: Tree, fold: int) -> Listing:
    """Unlabelled files, wherever they are."""
    return Listing("flat", items=[Item(path, split_of(path) or "train", None) for path in tree.media])
