"""Layouts of published data sets: Something-Something V2, UCF101, HMDB51, Kinetics, ImageNet.

A layout is one function `(tree, fold) -> Listing | None`: None where the folder does not look like it. Where the layout
is not named, they are tried in the order of this file, then those of layouts.py.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re

from diffmae_video.data.listing import SPLITS, Item, Listing, Rejection, Tree, number_of, split_of, stem_of
from diffmae_video.data.remote import join, read_file
from diffmae_video.errors import DataError
from diffmae_video.registry import layouts


@layouts.register("ssv2")
def ssv2(tree: Tree, fold: int) -> Listing | None:
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
    files = {stem_of(path): path for path in tree.media}
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


@layouts.register("ucf101")
def ucf101(tree: Tree, fold: int) -> Listing | None:
    """UCF101: classInd.txt and {train,test}list0N.txt; the test list becomes split `val`."""
    tables = {posixpath.basename(path): path for path in tree.paths if path.endswith(".txt")}
    if "classInd.txt" not in tables:
        return None
    classes = dict(line.split()[::-1] for line in tree.text(tables["classInd.txt"]).splitlines() if line.strip())
    listing = Listing("ucf101", classes=[name for name, _ in sorted(classes.items(), key=lambda pair: int(pair[1]))])
    for name, split in ((f"trainlist0{fold}.txt", "train"), (f"testlist0{fold}.txt", "val")):
        for line in tree.text(tables[name]).splitlines() if name in tables else ():
            if line.strip():
                relative = line.split()[0]
                path = tree.of_class(relative, relative.split("/")[0], classes)
                if path is None:
                    listing.rejected.append(Rejection(relative, split, "missing", f"{name} names it"))
                else:
                    listing.items.append(Item(path, split, relative.split("/")[0]))
    return listing


@layouts.register("hmdb51")
def hmdb51(tree: Tree, fold: int) -> Listing | None:
    """HMDB51: `<class>_test_splitN.txt` with 1 = train, 2 = test (split `val`), 0 = not used."""
    tables = [path for path in tree.paths if path.endswith(f"_test_split{fold}.txt")]
    if not tables:
        return None
    listing = Listing("hmdb51")
    named = {table: posixpath.basename(table).removesuffix(f"_test_split{fold}.txt") for table in tables}
    classes = frozenset(named.values())
    for table, label in named.items():
        for line in tree.text(table).splitlines():
            name, _, use = line.strip().rpartition(" ")
            if use in ("1", "2"):
                split = "train" if use == "1" else "val"
                path = tree.of_class(name.strip(), label, classes)
                if path is None:
                    listing.rejected.append(Rejection(name.strip(), split, "missing", f"{table} names it"))
                else:
                    listing.items.append(Item(path, split, label))
    return listing


@layouts.register("kinetics")
def kinetics(tree: Tree, fold: int) -> Listing | None:
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
        split = split_of(path)
        if path.startswith("replacement"):
            replaced[stem] = path
        else:
            by_stem.setdefault((split, stem), path)
            by_id.setdefault((split, stem[:11]), []).append(path)
    listing, taken = Listing("kinetics"), set()
    spans: set[tuple[str, float | None, float | None]] = set()
    for split, table in tables.items():
        for row in csv.DictReader(io.StringIO(tree.text(table))):
            row = {(name or "").strip().lower(): (value or "").strip() for name, value in row.items() if name}
            video = row.get("youtube_id", "")[:11]
            start, end = number_of(row.get("time_start")), number_of(row.get("time_end"))
            if not video:
                continue
            stem = f"{video}_{int(start or 0):06d}_{int(end or 0):06d}"
            path = by_stem.get((split, stem)) or by_stem.get((None, stem)) or replaced.get(stem)
            for place in (split, None):  # some copies drop the times from the name
                path = path or next((p for p in by_id.get((place, video), ()) if stem_of(p) == video), None)
            label = row.get("label", "").strip('"') or None
            if path is None:
                listing.rejected.append(Rejection(f"{stem}.mp4", split, "missing", f"{table} names it"))
                continue
            whole = stem_of(path) != stem  # the file is the uncut video, which may hold several spans
            span = (start, end) if whole else (None, None)
            if (path, *span) in spans:
                listing.rejected.append(Rejection(path, split, "duplicate", f"{table} names it twice"))
                continue
            spans.add((path, span[0], span[1]))
            taken.add(path)
            path = replaced.get(stem, path)
            taken.add(path)
            listing.items.append(Item(path, split, label, *span))
    known, stems = set(tables), {stem_of(path) for path in taken}
    for path in tree.media:
        if path not in taken and "." in posixpath.basename(path) and split_of(path) in known:
            twin = stem_of(path) in stems  # the same clip in a second folder, or as a link by class
            why = ("duplicate", "another copy is used") if twin else ("unannotated", "no table names it")
            listing.rejected.append(Rejection(path, split_of(path) or "", *why))
    return listing


@layouts.register("imagenet")
def imagenet(tree: Tree, fold: int) -> Listing | None:
    """ImageNet: train/<wnid>/; val/<wnid>/, or flat val with a ground-truth list.

    Three such lists exist: `name wnid ...` (Kaggle's LOC_val_solution.csv), `name number` (Caffe's val.txt: place of
    the sorted wnid, from 0), and one number a line in the order of the sorted files (the official
    ILSVRC2012_validation_ground_truth.txt). The official numbers follow the kit's own order of classes, not that of
    the wnids, so they need the kit's map_clsloc.txt or meta.mat beside them.
    """
    wnids = sorted({p.split("/")[-2] for p in tree.media if re.fullmatch(r"n\d{8}", ("/" + p).split("/")[-2])})
    if not wnids:
        return None
    listing = Listing("imagenet", classes=wnids)
    truth: dict[str, str] = {}
    flat = sorted(path for path in tree.media if split_of(path) == "val" and path.split("/")[-2] not in wnids)
    for path in tree.paths if flat else ():
        if not re.search(r"(ground_truth|val(idation)?(_labels)?|LOC_val_solution)\.(txt|csv)$", path):
            continue
        lines = [line for line in tree.text(path).splitlines() if line.strip() and not line.startswith("ImageId")]
        official: dict[str, str] | None = None
        for number, line in enumerate(lines):
            name, *rest = re.split(r"[ ,]+", line.strip())
            if rest:
                value = rest[0]
                if value.isdigit():
                    value = wnids[int(value)] if int(value) < len(wnids) else value
                truth[stem_of(name)] = value
            elif number < len(flat):
                if name.isdigit():
                    official = _official_numbers(tree, path) if official is None else official
                    name = official.get(name, name)
                truth[stem_of(flat[number])] = name
    for path in tree.media:
        split, parent = split_of(path) or "train", path.split("/")[-2] if "/" in path else ""
        label = parent if parent in wnids else truth.get(stem_of(path)) if split == "val" else None
        if label is None and split != "test":
            listing.rejected.append(Rejection(path, split, "unannotated", "no class folder and no ground truth"))
        elif label is not None and label not in wnids:
            listing.rejected.append(Rejection(path, split, "label", f"{label!r} is no class folder"))
        else:
            listing.items.append(Item(path, split, label))
    return listing


def _official_numbers(tree: Tree, truth: str) -> dict[str, str]:
    """Class number of the development kit -> wnid."""
    for path in tree.paths:
        name = posixpath.basename(path)
        if name == "map_clsloc.txt":  # lines of: wnid number name
            rows = [line.split() for line in tree.text(path).splitlines() if line.strip()]
            return {row[1]: row[0] for row in rows}
        if name == "meta.mat":
            from scipy.io import loadmat

            synsets = loadmat(io.BytesIO(read_file(join(tree.root, path))), squeeze_me=True)["synsets"]
            return {str(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in synsets}
    raise DataError(
        f"{tree.root}/{truth} numbers its classes as the development kit does; put the kit's meta.mat or "
        "map_clsloc.txt into the folder."
    )
