"""Every public name has a docstring: modules, classes, functions and methods of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted({path for folder in ("diffmae_video", "pipelines", "cli") for path in (ROOT / folder).rglob("*.py")})
OVERRIDES = {"forward", "extra_repr", "train", "load_state_dict", "state_dict"}
"""Methods whose meaning is torch's."""


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public names without a docstring; what stands inside a function is not public."""
    if tree.body and not ast.get_docstring(tree):
        yield "the module"
    waiting: list[tuple[str, ast.stmt]] = [("", node) for node in tree.body]
    while waiting:
        prefix, node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        overloaded = any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list)
        known = prefix and node.name in OVERRIDES
        if not ast.get_docstring(node) and not overloaded and not known:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            waiting += [(f"{prefix}{node.name}.", inner) for inner in node.body]


def test_public_names_have_docstrings() -> None:
    assert MODULES
    found = [
        f"{path.relative_to(ROOT)}: {name}" for path in MODULES for name in undocumented(ast.parse(path.read_text()))
    ]
    assert found == []
