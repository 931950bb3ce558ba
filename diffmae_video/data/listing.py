"""What a listing of inputs is made of: the files below a folder or URL, and each as an Item or a Rejection."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from diffmae_video.data.media import access_error
from diffmae_video.data.remote import filesystem, is_remote, join, read_file, retry
from diffmae_video.errors import DataError

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
    notes: list[str] = field(default_factory=list)
    """What a user should know of the annotation: sentences."""
    kind: str = "video"
    """`video` or `image`."""


class Tree:
    """Files below a local folder or URL, listed once; names that start with a dot are left out.

    Args:
        root: the folder or URL.
        kind: `video`, `image`, or `auto`: images where there are images and no videos.

    Raises:
        DataError: a folder of it cannot be listed.
    """

    def __init__(self, root: str, kind: str = "auto"):
        self.root = root
        self._sizes: dict[str, int] = {}
        self.paths = sorted(self._remote() if is_remote(root) else self._walk(root, "", frozenset()))
        self.kind = _kind_of(self.paths) if kind == "auto" else kind
        extensions = VIDEO_EXTENSIONS if self.kind == "video" else IMAGE_EXTENSIONS
        self.media = [path for path in self.paths if _is_media(path, extensions)]
        """Files of the wanted kind, by extension; files without one may be of any kind."""
        self.present = frozenset(self.paths)

    def size(self, path: str) -> int:
        """Bytes of a file, 0 where the store does not tell."""
        if path not in self._sizes:
            with contextlib.suppress(OSError):
                self._sizes[path] = os.path.getsize(join(self.root, path))
        return self._sizes.get(path, 0)

    def _remote(self) -> Iterable[str]:
        files, inner = filesystem(self.root)
        base = inner.rstrip("/") + "/"
        details = retry(lambda: files.find(inner, detail=True), f"Listing {self.root}")
        found = {path[len(base) :]: facts for path, facts in details.items() if path.startswith(base)}
        self._sizes = {path: int(facts.get("size") or 0) for path, facts in found.items()}
        return list(found)

    def _walk(self, folder: str, relative: str, above: frozenset[tuple[int, int]]) -> Iterable[str]:
        """Files below a folder; a link to a folder is followed unless it points to one that it lies in."""
        try:
            status = os.stat(folder)
            here = above | {(status.st_dev, status.st_ino)}
            if (status.st_dev, status.st_ino) in above:
                return
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:
            if relative:  # a broken link, or removed since its parent was listed
                return
            raise DataError(f"{folder} is empty or missing; give the folder of the files.") from None
        except OSError as error:
            raise access_error(f"The folder {folder}", error) from error
        if not relative:  # a link to a folder above the root would bring the root in again
            here |= _parents(folder)
        for entry in found:
            if entry.name.startswith("."):
                continue
            path = f"{relative}/{entry.name}" if relative else entry.name
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                raise access_error(os.path.join(folder, entry.name), error) from error
            if is_folder:
                yield from self._walk(os.path.join(folder, entry.name), path, here)
            else:
                yield path

    @cached_property
    def _stems(self) -> frozenset[str]:
        return frozenset(name for path in self.media for name in (stem_of(path), posixpath.splitext(path)[0]))

    def has_stem(self, text: str) -> bool:
        """Whether a media file has this name or path, but for its extension."""
        return text in self._stems

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """Media files by their name, with and without extension."""
        found: dict[str, list[str]] = {}
        for path in self.media:
            for name in {posixpath.basename(path), stem_of(path)}:
                found.setdefault(name, []).append(path)
        return found

    def resolve(self, listed: str, split: str | None = None) -> str | None:
        """The file that an annotation means: at its path; or where one path is the end of the other, as lists are
        written for another place. Never a file of the same name elsewhere, and never one of another split's folder.

        Returns:
            The path, or None where there is none or more than one.
        """
        path = posixpath.normpath(listed.replace("\\", "/"))
        if path in self.present:
            return path
        if not path.isascii():  # lists of a Mac write accents as letters of their own
            path = self._composed.get(unicodedata.normalize("NFC", path), path)
            if path in self.present:
                return path
        if path.startswith("../"):
            return None
        parts = path.strip("/").split("/")
        names = [path for path in self._by_name.get(parts[-1], ()) if split is None or split_of(path) in (None, split)]
        matches = []
        for name in names:
            own = name.split("/")
            if own[-1] != parts[-1]:  # listed without extension
                own[-1] = stem_of(name)
            short = min(len(own), len(parts))
            enough = short == len(parts) or short > 1 or path.startswith("/")  # `3.mp4` is not what `run/3.mp4` means
            if enough and own[-short:] == parts[-short:]:
                matches.append(name)
        if len(matches) > 1:
            matches = [name for name in matches if split is not None and split_of(name) == split]
        return matches[0] if len(matches) == 1 else None

    @cached_property
    def _composed(self) -> dict[str, str]:
        """Paths with other than plain letters by their composed form, where only one has it."""
        found: dict[str, list[str]] = {}
        for path in self.paths:
            if not path.isascii():
                found.setdefault(unicodedata.normalize("NFC", path), []).append(path)
        return {name: paths[0] for name, paths in found.items() if len(paths) == 1}

    def of_class(self, listed: str, label: str, classes: Iterable[str]) -> str | None:
        """The file of a name, in the folder of its class or in one that belongs to no class; None without just one."""
        found = {path: posixpath.basename(posixpath.dirname(path)) for path in self._by_name.get(stem_of(listed), ())}
        fits = [path for path, folder in found.items() if folder == label]
        fits = fits or [path for path, folder in found.items() if folder not in classes]
        return fits[0] if len(fits) == 1 else None

    def text(self, path: str) -> str:
        """A text file of the tree: UTF-8, or UTF-16 where it says so; else Windows-1252, as Excel saves CSV."""
        raw = read_file(join(self.root, path))
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            return raw.decode("utf-16", errors="replace")
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            return raw.decode("cp1252", errors="replace")


def _parents(folder: str) -> frozenset[tuple[int, int]]:
    """Device and inode of every folder above a folder."""
    found, path = set(), os.path.dirname(os.path.realpath(folder))
    while True:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found.add((status.st_dev, status.st_ino))
        if path == os.path.dirname(path):
            return frozenset(found)
        path = os.path.dirname(path)


def _kind_of(paths: Iterable[str]) -> str:
    """`image` where files have extensions of images and none has one of videos, else `video`."""
    suffixes = {path.rpartition(".")[2].lower() for path in paths if "." in path}
    return "image" if suffixes & IMAGE_EXTENSIONS and not suffixes & VIDEO_EXTENSIONS else "video"


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


def seconds_of(text: str | None) -> float | None:
    """A time in seconds from `12.5`, `1:02` or `0:01:02.5`; None for no text.

    Raises:
        ValueError: it is no time.
    """
    if not text:
        return None
    parts = text.split(":")
    values = [float(part) for part in parts]
    if len(parts) > 3 or not all(0 <= value < 1e9 for value in values):
        raise ValueError(text)
    return sum(value * 60**place for place, value in enumerate(reversed(values)))


def number_of(text: str | None) -> float | None:
    """A number, or None where the text is none."""
    try:
        return float(text) if text else None
    except ValueError:
        return None
