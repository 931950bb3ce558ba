"""How long compute threads wait at full speed, settled before PyTorch is loaded."""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = "1000"
"""Turns of libgomp's waiting loop, a few microseconds, before a waiting thread gives its core to other processes.

libgomp's own default is 300,000 turns, which pays on idle cores only: where another process holds a core, the thread
that would be waited for does not run while the others turn. Chosen by measurement (benchmarks/LOG.md, "A shared
machine").
"""


def share_cores(environ: MutableMapping[str, str]) -> None:
    """Let waiting threads of this process and of those it starts leave their cores soon.

    Acts where OpenMP is GNU's (PyTorch on Linux) and PyTorch is not loaded yet. What the environment says about waiting
    stays: GOMP_SPINCOUNT or OMP_WAIT_POLICY
    (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html).
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", SPINS)
