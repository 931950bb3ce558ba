"""The Python example of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_python_example_runs() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.S)
    assert example
    names: dict = {}
    exec(example[1].replace("steps=20", "steps=2"), names)
    assert names["loss"].isfinite()
    assert names["features"].shape[:2] == (2, 128)
    hidden = names["mask"].pixels(2, 16)[:, None].expand_as(names["clips"])
    assert names["filled"][~hidden].equal(names["clips"][~hidden])
