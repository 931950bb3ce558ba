"""Files on local disks and behind fsspec URLs through one handful of functions; local writes are atomic."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from diffmae_video.errors import DataError, DiffmaeError, StorageError, UsageError
from diffmae_video.files import sync_path, write_atomic

SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "hf", "memory", "file", "http", "https")
"""URL schemes that may be opened; anything else (`pipe:` above all) is refused."""
RETRIES = 4
_T = TypeVar("_T")


def is_remote(path: str) -> bool:
    """Whether a path is a URL with an allowed scheme other than `file`.

    Raises:
        UsageError: another scheme.
    """
    scheme, colon, rest = path.partition(":")
    if not colon or os.sep in scheme or not rest:
        return False
    if scheme == "pipe" or rest.startswith("//"):
        if scheme not in SCHEMES:
            raise UsageError(f"{path}: URLs of kind {scheme!r} are not opened; use one of {', '.join(SCHEMES)}.")
        return scheme != "file"
    return False


def join(root: str, name: str) -> str:
    """Path or URL of a file in a folder."""
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else os.path.join(root, name)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path within it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(url.partition(":")[0])
        hint = f"pip install 'diffmae-video[{extra}]'" if extra else "install the package it names"
        raise UsageError(f"{url} cannot be opened ({error}); {hint}.") from error


def retry(action: Callable[[], _T], what: str, attempts: int = RETRIES, wait: float = 0.5) -> _T:
    """Run an action on a remote; failures other than a missing file are tried again, each time later.

    Raises:
        StorageError: it failed every time.
    """
    for attempt in range(attempts):
        try:
            return action()
        except (FileNotFoundError, DiffmaeError):
            raise
        except Exception as error:  # storage libraries raise their own kinds
            if attempt == attempts - 1:
                raise StorageError(
                    f"{what} failed {attempts} times ({error}); check the connection and run again."
                ) from error
            time.sleep(wait * 3**attempt)
    raise AssertionError("unreachable")


def read_file(path: str) -> bytes:
    """All bytes of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(path):
        return Path(path.removeprefix("file://")).read_bytes()
    files, inner = filesystem(path)

    def read() -> bytes:
        files.invalidate_cache()
        data = files.cat_file(inner)
        size = files.size(inner)
        if size is not None and len(data) != size:
            raise OSError(f"{len(data)} of {size} bytes came")
        return data

    return retry(read, f"Reading {path}")


def list_files(url: str) -> list[str]:
    """URLs of all files below a remote folder; none where there is no such folder.

    Raises:
        StorageError: the store does not answer.
    """
    files, inner = filesystem(url)

    def find() -> list[str]:
        files.invalidate_cache()
        return [files.unstrip_protocol(path) for path in files.find(inner)]

    try:
        return retry(find, f"Listing {url}")
    except FileNotFoundError:
        return []


def remove(path: str, recursive: bool = False) -> None:
    """Remove a remote file, or a folder with all below it; nothing happens where there is none.

    Raises:
        StorageError: the store does not answer.
    """
    files, inner = filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        retry(lambda: files.rm(inner, recursive=recursive), f"Removing {path}")


def write_file(path: str, data: bytes) -> None:
    """Write a file atomically: temporary name, fsync, rename (a remote object appears whole by itself)."""
    if is_remote(path):
        files, inner = filesystem(path)
        retry(lambda: files.pipe_file(inner, data), f"Writing {path}")
        return
    try:
        write_atomic(path, data)
        sync_path(os.path.dirname(path) or ".")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); free space or choose another folder.") from error
