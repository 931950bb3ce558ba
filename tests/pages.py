"""Pages of the documentation, read by tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def shell_lines(page: Path) -> list[list[str]]:
    """Words of each line in the code blocks of a page that are no Python, TOML or output."""
    lines = []
    for language, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text("utf-8"), re.S):
        if language in ("", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                lines.append(shlex.split(line.removeprefix("$ "), comments=True))
    return lines
