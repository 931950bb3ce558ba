"""What a file is, by its first bytes, and how large it may be: decided before any demuxer or decoder sees it.

Names and extensions are never trusted. Playlists, manifests and scripts (HLS, DASH, SDP, ffconcat) match no signature
below and are refused without a file or a socket being opened.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from diffmae_video.errors import DataError, LimitError, StorageError


@dataclass(frozen=True)
class Limits:
    """Bounds on one input; what exceeds them is refused before memory is taken for it."""

    pixels: int = 8192 * 4608
    """Width times height of a frame or image."""
    frames: int = 1_000_000
    """Frames of a video."""
    seconds: float = 4 * 3600.0
    """Duration of what becomes one sample (sharding only)."""
    bytes: int = 4 << 30
    """Size of a file or of a member of a tar."""
    aspect: float = 64.0
    """Longer by shorter side: what is scaled to a short side grows by this."""

    def check_size(self, name: str, width: int, height: int) -> None:
        """Refuse frames or images that are too large or too long.

        Raises:
            LimitError: they are.
        """
        if width * height > self.pixels:
            raise LimitError(f"{name} has {width}x{height} pixels, beyond the limit of {self.pixels}; leave it out.")
        if max(width, height) > self.aspect * min(width, height):
            raise LimitError(f"{name} is {width}x{height}, longer than {self.aspect:g}:1; leave it out or cut it.")


DEFAULT_LIMITS = Limits()

VIDEO_FORMATS = {
    "mov": "MP4 or QuickTime",
    "matroska": "Matroska or WebM",
    "avi": "AVI",
    "flv": "Flash video",
    "mpegts": "MPEG transport stream",
    "mpeg": "MPEG program stream",
    "mpegvideo": "MPEG video stream",
    "asf": "Windows Media",
    "gif": "GIF",
    "h264": "raw H.264",
    "ogg": "Ogg",
    "ivf": "IVF",
}
"""FFmpeg demuxers that may be opened, with their names for people."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Pillow readers that may be opened."""

MEDIA_SUFFIXES = {"video": ("mp4", "webm", "mkv", "avi", "mov"), "image": ("jpg", "jpeg", "png", "webp", "bmp", "tif")}
"""Members that are ever decoded; every other suffix but `json` is ignored."""

_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp", b"moof", b"sidx")
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")


def sniff(head: bytes) -> str | None:
    """Name the container from the first 1 KiB: a key of VIDEO_FORMATS, `image:KIND`, or None when it is neither."""
    if head[4:8] in _BOXES:
        brand = head[8:12]
        return "image:AVIF" if head[4:8] == b"ftyp" and brand in (b"avif", b"heic", b"mif1") else "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF"):
        return {b"AVI ": "avi", b"WEBP": "image:WEBP"}.get(head[8:12])
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"\x00\x00\x00\x01" or head[:3] == b"\x00\x00\x01":  # Annex B: SPS, access unit delimiter, SEI
        kind = head[4] if head[3] == 1 else head[3]
        return "h264" if kind & 0x80 == 0 and kind & 0x1F in (6, 7, 9) else None
    for offset in range(min(204, max(0, len(head) - 376))):
        if head[offset] == head[offset + 188] == head[offset + 376] == 0x47:
            return "mpegts"
    return None


_MAGIC = (
    (b"\xff\xd8\xff", "image:JPEG"),
    (b"\x89PNG\r\n\x1a\n", "image:PNG"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "image:BMP"),
    (b"II*\x00", "image:TIFF"),
    (b"MM\x00*", "image:TIFF"),
    (b"P5", "image:PPM"),
    (b"P6", "image:PPM"),
    (b"FLV\x01", "flv"),
    (b"OggS", "ogg"),
    (b"DKIF", "ivf"),
    (_ASF, "asf"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"\x00\x00\x01\xb3", "mpegvideo"),
)


def describe(head: bytes) -> str:
    """Say what refused bytes look like, for an error message."""
    text = head[:512].lstrip()
    if not head:
        return "empty (0 bytes)"
    if text.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the file itself (run `git lfs pull`)"
    if text.startswith(b"#EXTM3U") or text.startswith(b"ffconcat") or text.startswith(b"v=0"):
        return "a playlist or session description"
    if b"<MPD" in text:
        return "a DASH manifest"
    if text[:1] == b"<":
        return "an HTML or XML page (a failed download?)"
    if text.isascii() and text.decode("ascii").isprintable():
        return "plain text"
    return "of no known video or image format"


def read_bytes(source: bytes | memoryview | str | Path, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The bytes of a local file, its size checked first; bytes come back as they are.

    Raises:
        DataError: the file is missing, unreadable, no plain file (a pipe, a device), or above the limit.
        StorageError: the disk or server that holds it does not answer.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) > limits.bytes:
            raise LimitError(f"The file has {len(source)} bytes, above the limit of {limits.bytes}; leave it out.")
        return source if isinstance(source, bytes) else bytes(source)
    try:
        with _open_plain(source) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limits.bytes:
                raise LimitError(f"{source} has {size} bytes, above the limit of {limits.bytes}; leave it out.")
            return file.read(size or 1 << 20)  # files below /proc say 0
    except OSError as error:
        raise access_error(str(source), error) from error


def read_head(path: str | Path, size: int = 1024) -> bytes:
    """The first bytes of a local file, for `sniff`; raises as `read_bytes` does."""
    try:
        with _open_plain(path) as file:
            return file.read(size)
    except OSError as error:
        raise access_error(str(path), error) from error


def _open_plain(path: str | Path) -> BinaryIO:
    """Open a file, but no pipe (which would wait for a writer) and no device (which may never end)."""
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError(f"{path} is no plain file but a pipe, device or folder; name a file.")
    return file


_OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


def access_error(path: str, error: OSError) -> DataError:
    """The error for a file that cannot be read: a DataError where the file is to blame, else a StorageError."""
    told = error.strerror or str(error)
    if error.errno in _OF_THE_FILE:
        return DataError(f"{path} cannot be read ({told}); check the path.")
    return StorageError(f"{path} cannot be read ({told}); check the disk or server, then run again.")


def demuxer_of(data: bytes) -> str:
    """The FFmpeg demuxer for a video in memory.

    Raises:
        DataError: the bytes are no video.
    """
    kind = sniff(data[:1024])
    if kind is None:
        raise DataError(f"Not a video: the file is {describe(data[:1024])}; replace or remove it.")
    if kind not in VIDEO_FORMATS:
        raise DataError(f"Not a video: the file is a {kind.removeprefix('image:')} image; use --image for images.")
    return kind
