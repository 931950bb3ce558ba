"""What only POSIX has is imported where it is needed, and used where somebody has looked whether it is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import diffmae_video

MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "posix", "syslog"}
NAMES = {
    *("signal.SIGUSR1", "signal.SIGUSR2", "signal.SIGALRM", "signal.SIGKILL", "signal.SIGHUP", "signal.alarm"),
    *(
        "os.fork",
        "os.getuid",
        "os.geteuid",
        "os.killpg",
        "os.setsid",
        "os.getpgid",
        "os.mkfifo",
        "os.pread",
        "os.uname",
    ),
    *("os.sched_getaffinity", "os.statvfs", "os.sysconf", "os.getloadavg", "os.fchmod", "os.sync"),
}
ROOT = Path(diffmae_video.__file__).parent
FILES = sorted({path.resolve() for folder in (ROOT, ROOT / "pipelines", ROOT / "cli") for path in folder.rglob("*.py")})


def posix_only(code: str) -> list[str]:
    """Imports at the top of a module, and names in functions that do not ask for them by `hasattr` or `os.name`."""
    tree, lines, found = ast.parse(code), code.splitlines(), []
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"line {node.lineno}: import {name}" for name in names if name.partition(".")[0] in MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if "hasattr(" in text or "os.name" in text or "sys.platform" in text:
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                name = f"{part.value.id}.{part.attr}"
                found += [f"line {part.lineno}: {name}"] if name in NAMES else []
    return found


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("import fcntl", 1),
        ("from resource import getrusage", 1),
        ("def f():\n    import resource", 0),
        ("def f():\n    os.fork()", 1),
        ("def f():\n    if hasattr(os, 'fork'):\n        os.fork()", 0),
    ],
)
def test_the_walk_finds_what_it_looks_for(code: str, count: int) -> None:
    assert len(posix_only(code)) == count


def test_no_module_needs_posix() -> None:
    assert len(FILES) > 100
    found = {path.name: posix_only(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}
