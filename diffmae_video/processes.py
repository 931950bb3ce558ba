"""Processes that this package starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_SAFE = "PYTHONSAFEPATH"


@contextmanager
def safe_path() -> Iterator[None]:
    """Python processes that are started in the block import nothing from the folder one stands in.

    `python -c`, which is how multiprocessing starts them, puts that folder first on the path: a file `json.py` in a
    folder of clips would run. The command line sets the variable for good; this is for those who call the package.
    """
    before = os.environ.get(_SAFE)
    os.environ[_SAFE] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE]
        else:
            os.environ[_SAFE] = before
