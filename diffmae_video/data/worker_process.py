"""What a worker process runs: requests come on its standard input, answers leave on its standard output.

A message is two lengths, JSON, bytes. Never pickle: a process that reads files of strangers is not to be trusted.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from typing import IO, Any

from diffmae_video.data.media import read_bytes, sniff
from diffmae_video.data.remote import is_remote, read_file
from diffmae_video.data.transcode import options_from_json, transcode
from diffmae_video.errors import DataError, LimitError, StorageError

MEMORY = "_DIFFMAE_WORKER_MEMORY"
"""Environment variable: bytes of address space that a worker may take."""
_MAX_JSON, _MAX_DATA = 1 << 24, 1 << 34


def command() -> list[str]:
    """The command that starts a worker; modules in the folder that one stands in are never imported."""
    # `-m` and `-c` put that folder first on the path; `-P` prevents it from Python 3.11 on
    start = "import sys; sys.path[:] = [p for p in sys.path if p]; from diffmae_video.data import worker_process as w"
    return [sys.executable, "-c", f"{start}; w.main()"]


def send(stream: IO[bytes], body: dict[str, Any], data: bytes = b"") -> None:
    """Write one message."""
    text = json.dumps(body).encode()
    stream.write(struct.pack("<IQ", len(text), len(data)) + text)
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Read one message.

    Raises:
        EOFError: the other end left, or what came is no message.
    """
    size, extra = struct.unpack("<IQ", _read_exactly(stream, 12))
    if size > _MAX_JSON or extra > _MAX_DATA:
        raise EOFError
    return json.loads(_read_exactly(stream, size)), _read_exactly(stream, extra)


def main() -> None:
    """Answer requests until standard input closes: {path, options, span} (+ bytes, instead of reading the path) ->
    {meta, suffix} + bytes, or {error, kind}."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides on Ctrl-C
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print must not break the protocol
    _limit_memory(int(os.environ.get(MEMORY, "0")))
    while True:
        try:
            body, given = receive(requests)
        except EOFError:
            return
        answer(answers, body, given)


def answer(stream: IO[bytes], body: dict[str, Any], given: bytes) -> None:
    """Carry out one request and write its answer; whatever a file makes a library raise, it costs that file alone."""
    path, data = body["path"], given or None
    try:
        options = options_from_json(body["options"])
        if data is None:
            data = read_file(path) if is_remote(path) else read_bytes(path, options.limits)
        span = tuple(body["span"]) if body.get("span") else None
        result, suffix, meta = transcode(data, options, span)
        send(stream, {"suffix": suffix, "meta": meta}, result)
        return
    except StorageError as error:
        kind, told = "storage", str(error)
    except LimitError as error:
        kind, told = "limit", f"{error} `diffmae shard --limit NAME=NUMBER` raises a bound."
    except DataError as error:
        kind = "unreadable" if data is None or sniff(data[:1024]) else "not media"
        told = str(error)
    except FileNotFoundError:
        kind, told = "missing", f"{path} is gone."
    except MemoryError:
        kind, told = "memory", "The file needs more memory than a worker may take."
    except Exception as error:
        kind = "memory" if "allocate memory" in str(error) else "unreadable"
        told = f"{type(error).__name__}: {error}"[:300]
    send(stream, {"error": told, "kind": kind})


def _limit_memory(size: int) -> None:
    """Bound the address space; a lower bound that is set already (`ulimit -v`) stays."""
    try:
        import resource
    except ImportError:  # Windows has no such bound
        return
    if size:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    parts = []
    while size:
        part = stream.read(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    main()
