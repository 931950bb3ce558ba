"""What a listing of inputs is made of: the files below a folder or URL, and each as an Item or a Rejection."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from diffmae_video.data.remote import filesystem, is_remote, join, read_file

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
    size: int = 0
    """Bytes of the file when it was listed: another size makes another input."""


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
        self.root = root
        self._sizes: dict[str, int] = {}
        self.paths = sorted(self._walk())
        self.media = [path for path in self.paths if _is_media(path, extensions)]
        self.present = frozenset(self.paths)

    def size(self, path: str) -> int:
        """Bytes of a file, 0 where the store does not tell."""
        if path not in self._sizes:
            with contextlib.suppress(OSError):
                self._sizes[path] = os.path.getsize(join(self.root, path))
        return self._sizes.get(path, 0)

    def _walk(self) -> Iterable[str]:
        if is_remote(self.root):
            files, inner = filesystem(self.root)
            base = inner.rstrip("/") + "/"
            details = files.find(inner, detail=True)
            found = {path[len(base) :]: facts for path, facts in details.items() if path.startswith(base)}
            self._sizes = {path: int(facts.get("size") or 0) for path, facts in found.items()}
            return list(found)
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


def stem_of(path: str) -> str:
    """File name without folder and extension."""
    return posixpath.splitext(posixpath.basename(path))[0]


def split_of(path: str) -> str | None:
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


def number_of(text: str | None) -> float | None:
    """A number, or None where the text is none."""
    try:
        return float(text) if text else None
    except ValueError:
        return None
