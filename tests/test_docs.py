"""The documentation holds: links lead somewhere, commands parse, Python examples compile, settings it names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from diffmae_video.cli.app import app
from diffmae_video.config.recipes import load_settings, setting_keys
from tests.pages import shell_lines

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
HISTORY = ("LOG.md", "CHANGELOG.md", "decisions.md")
CURRENT = [page for page in PAGES if page.name not in HISTORY]
FILES = (".toml", ".py", ".md", ".json", ".txt", ".safetensors", ".parquet")


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _anchors(page: Path) -> set[str]:
    """Anchors of headings, by the rule of the repository's host and of MkDocs."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith("reference/") or "../reference/" in path:
            continue  # made with the site, which is built strictly
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), target
        if anchor and goal.suffix == ".md":
            assert anchor in _anchors(goal), target


def _commands(page: Path) -> list[list[str]]:
    """Words of each `diffmae ...` line in code blocks that are no Python, TOML or output."""
    return [words[words.index("diffmae") + 1 :] for words in shell_lines(page) if "diffmae" in words]


def _parse(words: list[str]) -> Any:
    command, name = typer.main.get_command(app), "diffmae"
    while getattr(command, "commands", None) and words and words[0] in command.commands:
        command, name, words = command.commands[words[0]], words[0], words[1:]
    assert name != "diffmae" or words == ["--help"], f"there is no command {words[0]}"
    return command.make_context(name, list(words), resilient_parsing=False)


@pytest.mark.parametrize("page", [page for page in CURRENT if _commands(page)], ids=_id)
def test_commands_parse(page: Path) -> None:
    for words in _commands(page):
        context = _parse(words)
        overrides = [parameter.name for parameter in context.command.params if "--set" in parameter.opts]
        for name in overrides:
            for text in context.params[name] or ():
                load_settings("video-tiny", "pretrain", [text])


def test_environment_variables_are_documented() -> None:
    """Those that hold an option follow one rule (tests/cli/test_options.py); an underscore leads our own."""
    told = "".join(page.read_text("utf-8") for page in CURRENT)
    for folder in ("diffmae_video", "pipelines", "cli", "tests", "benchmarks", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", "", ".sh"):
                for name in re.findall(r"(?<![_A-Z])DIFFMAE_[A-Z_]*[A-Z]", path.read_text("utf-8")):
                    rule = path.parent.name == "cli" or name == "DIFFMAE_COMMAND_OPTION"
                    assert rule or f"`{name}" in told or name == "DIFFMAE_PRETRAIN_SET", (path, name)


@pytest.mark.parametrize("page", CURRENT, ids=_id)
def test_python_examples_compile(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S):
        compile(block, _id(page), "exec")


@pytest.mark.parametrize("page", CURRENT, ids=_id)
def test_settings_that_are_named_exist(page: Path) -> None:
    keys = set(setting_keys())
    sections = {key.split(".")[0] for key in keys if "." in key}
    text = page.read_text("utf-8")
    for key in re.findall(r"`([a-z]+\.[a-z_.]+?)(?: = [^`]*|=[^`]*)?`", text) + re.findall(r"--set \"?([\w.]+)=", text):
        section = key.split(".")[0]
        if section in sections and not key.endswith(FILES):
            assert key in keys or any(known.startswith(f"{key}.") for known in keys), key
