"""Files that are there whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

from diffmae_video.errors import DataError, DiffmaeError

UNREADABLE_ARRAY = (
    *(OSError, EOFError, ValueError, KeyError, OverflowError, MemoryError, NotImplementedError),
    *(TypeError, AttributeError, SyntaxError, TokenError, BadZipFile, zlib.error),
)
"""What `numpy.load` raises on damaged files: it parses their headers as Python, without running them."""


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary name beside `path` for the block to write; afterwards it is synced and takes the name `path`.

    If the block fails, what it wrote is removed and `path` stays as it was. After a crash a hidden file `.NAME.PID.tmp`
    may be left, which nothing reads.

    Raises:
        OSError: the file cannot be synced or renamed, or the block has written none.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Write a file in one step: readers see the old one or the new one, never half of it. Text becomes UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is absent or damaged, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_holder(path: Path) -> None:
    """Write beside a lock which process holds it."""
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")


def read_holder(path: Path) -> str:
    """Who holds a lock, as `write_holder` said, in words that can be shown."""
    try:
        return printable(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "another process"


def holder_process(path: Path) -> tuple[int, str] | None:
    """Number and host of the process that holds a lock, as `write_holder` said; None where nothing says so."""
    match = re.fullmatch(r"process (\d{1,20}) on (\S+)", read_holder(path).strip())
    return None if match is None else (int(match[1]), match[2])


def check_name(name: object, what: str, error: type[DiffmaeError] = DataError) -> str:
    """A name that somebody else chose and that becomes part of a path: one plain word, of which nothing can be made
    but a file in the folder it is meant for.

    Args:
        name: letters, digits, `_`, `-` and dots, not at the start.
        what: what it names, for the message, e.g. `the split of a manifest`.

    Raises:
        DiffmaeError: of the kind `error`: it is no such name.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}", name):
        raise error(f"{what} is no plain name: {name!r:.80}; use letters, digits, _ and -.")
    return name


def printable(text: str, keep: str = "") -> str:
    """Text of a stranger that can be written and shown: control characters, and bytes of file names that are not UTF-8,
    become escapes.

    Args:
        keep: control characters that stay, e.g. line ends.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else one.encode("unicode_escape").decode() for one in text)


def cache_folder() -> Path:
    """Where this package keeps what can be had again: `diffmae` in XDG_CACHE_HOME, or in ~/.cache. It may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))) / "diffmae"


def sync_path(path: Path | str) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut; Windows has no such call for folders."""
    if os.name == "nt" and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # there, only writers may wait
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
