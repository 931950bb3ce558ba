"""Pages of the site that are made from the code: commands, settings, recipes, data sets, and the Python reference.

A hook of MkDocs (`make docs`). It also brings files that stand outside docs/ into the site. Links in pages are written
as a reader of the repository follows them; here they are turned to where the page stands in the site.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert.exporters import MarkdownExporter
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

import diffmae_video
from diffmae_video.cli.app import app
from diffmae_video.config.recipes import read_recipe, recipe_names
from diffmae_video.config.settings import Section, Settings
from diffmae_video.data.datasets import DatasetInfo, dataset_info, dataset_names
from diffmae_video.registry import Registry

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "benchmarks/LOG.md": "project/log.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
}
"""Files of the repository, and the pages of the site that they become."""
_PACKAGES = ("config", "diffusion", "models", "data", "training", "evaluation", "rendering", "pipelines")
_BASICS = ("masking", "registry", "errors")  # modules of the package itself, shown with the diffusion


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here to those of docs/."""
    pages = {
        "reference/commands.md": _commands(),
        "reference/settings.md": _settings(),
        "reference/recipes.md": _recipes(),
        "reference/datasets.md": _datasets(),
        "reference/api/public.md": _public(),
        **{f"reference/api/{package}.md": _modules(package) for package in _PACKAGES},
        **{page: (ROOT / source).read_text("utf-8") for source, page in OUTSIDE.items()},
    }
    for name, content in [*pages.items(), *_notebooks()]:
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages; those without a page become plain text."""
    here = page.file.src_uri
    source = next((source for source, made in OUTSIDE.items() if made == here), f"docs/{here}")

    def turn(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        goal = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if goal is None:
            return text if text.startswith("`") else f"{text} (`{path}` of the repository)"
        return f"[{text}]({posixpath.relpath(goal, posixpath.dirname(here) or '.')}{anchor})"

    # [text](target#anchor), but for addresses and anchors of this page
    return re.sub(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", turn, markdown)


def _notebooks() -> Iterator[tuple[str, str | bytes]]:
    """A page for each notebook, as it was last run, and its pictures."""
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        name = path.stem
        made: Any = MarkdownExporter().from_filename(
            str(path), resources={"unique_key": name, "output_files_dir": f"{name}_files"}
        )
        text, resources = made
        title, rest = text.split("\n", 1)
        note = f"*A notebook: [open it in Jupyter]({path.name}), with `pip install jupyterlab` beside diffmae-video.*"
        yield f"notebooks/{name}.md", f"{title}\n\n{note}\n{rest}"
        for file, data in resources["outputs"].items():
            yield f"notebooks/{file}", data


def _commands() -> str:
    lines = ["# Commands", "", f"{app.info.help} `diffmae COMMAND --help` prints the same.", ""]
    lines += ["Options can also be given as [environment variables](../training.md#environment-variables).", ""]
    for name, command in _walk(typer.main.get_command(app), "diffmae"):
        lines += [f"## `{name}`", "", _plain(command.help or ""), ""]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([name, *("[OPTIONS]",), *(_metavar(p) for p in arguments)])
        lines += ["```text", usage, "```", ""]
        rows = [(f"`{_metavar(p)}`", _plain(getattr(p, "help", "") or ""), "") for p in arguments]
        for option in command.params:
            if option.param_type_name == "option" and "--help" not in option.opts:
                default = "" if option.default in (None, (), [], False) else f"`{_value(option.default)}`"
                rows.append((", ".join(f"`{o}`" for o in option.opts), _plain(option.help or ""), default))
        if rows:
            lines += ["| option | what | default |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(lines)


def _walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command below `command` with its full name, groups that do something by themselves included."""
    for child_name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            if not getattr(child, "commands", None) or child.invoke_without_command:
                yield f"{name} {child_name}", child
            yield from _walk(child, f"{name} {child_name}")


def _metavar(parameter: Any) -> str:
    return (parameter.metavar or parameter.name).upper().strip("{}[]")


def _settings() -> str:
    lines = [
        "# Settings",
        "",
        "Fields of a recipe and of `--set SECTION.FIELD=VALUE`. An unknown key is an error. `config.toml` in a run "
        "holds all of them as they were used.",
        "",
    ]
    top = [(name, field) for name, field in Settings.model_fields.items() if _section(field) is None]
    lines += [*_table("", top), ""]
    for name, field in Settings.model_fields.items():
        section = _section(field)
        if section is not None:
            lines += _section_lines(name, section)
    return "\n".join(lines)


def _section_lines(name: str, section: type[Section]) -> list[str]:
    lines = [f"## `[{name}]`", "", _plain(section.__doc__ or ""), ""]
    lines += [*_table(name, list(section.model_fields.items())), ""]
    for field_name, field in section.model_fields.items():
        inner = _section(field)
        if inner is not None and f"[{name}.{field_name}]" not in lines:
            lines += _section_lines(f"{name}.{field_name}", inner)
    return lines


def _table(prefix: str, items: list[tuple[str, FieldInfo]]) -> list[str]:
    rows = ["| field | values | default | what |", "|---|---|---|---|"]
    for name, field in items:
        key = f"{prefix}.{name}" if prefix else name
        default = "" if _section(field) or field.default is None else f"`{_value(field.default)}`"
        rows.append(f"| `{key}` | {_values(field)} | {default} | {_plain(field.description or '')} |")
    return rows


def _section(field: FieldInfo) -> type[Section] | None:
    """The group of settings that a field holds (alone, optional, or in a tuple)."""
    parts = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)


def _values(field: FieldInfo) -> str:
    for mark in field.metadata:
        registry = getattr(getattr(mark, "func", None), "__self__", None) if isinstance(mark, AfterValidator) else None
        if isinstance(registry, Registry):
            return ", ".join(f"`{name}`" for name in registry.names())
    inner = _section(field)
    if inner is not None:
        return f"see `[{_plain(inner.__name__)}]`" if field.default is None else "a table"
    text = str(field.annotation).replace("typing.", "")
    literal = re.search(r"Literal\[([^\]]*)\]", text)
    if literal:
        return ", ".join(f"`{value.strip().strip(chr(39))}`" for value in literal[1].split(","))
    kind = next((word for word in ("bool", "int", "float", "str") if word in text), "value")
    words = {"bool": "`true`, `false`", "int": "integer", "float": "number", "str": "text", "value": "value"}[kind]
    bounds = [*field.metadata, *(m for a in getattr(field.annotation, "__args__", ()) for m in _metadata(a))]
    signs = {"ge": "&ge;", "gt": "&gt;", "le": "&le;", "lt": "&lt;"}
    limits = [
        f"{sign} {getattr(part, name)}"
        for mark in bounds
        for part in (mark, *getattr(mark, "metadata", ()))
        for name, sign in signs.items()
        if getattr(part, name, None) is not None
    ]
    several = "list of " if "tuple" in text else ""
    return f"{several}{words} {' and '.join(dict.fromkeys(limits))}".strip()


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__metadata__", ())


def _recipes() -> str:
    lines = [
        "# Recipes",
        "",
        "A recipe is a TOML file of [settings](settings.md). `--recipe NAME` or a path takes one, `diffmae "
        "recipes show NAME` prints what it resolves to, `--set` changes single fields. Below is what each says itself; "
        "the rest comes from the recipe it extends, and from the defaults.",
        "",
        "| recipe | for |",
        "|---|---|",
    ]
    recipes = [read_recipe(name) for name in recipe_names()]
    lines += [f"| [`{recipe.name}`](#{recipe.name}) | {_plain(recipe.summary)} |" for recipe in recipes] + [""]
    for recipe in recipes:
        file = ROOT / "manifests" / "recipes" / f"{recipe.name}.toml"
        lines += [f"## {recipe.name}", "", "```toml", file.read_text("utf-8").strip(), "```", ""]
    return "\n".join(lines)


def _datasets() -> str:
    lines = [
        "# Data sets",
        "",
        "What `--dataset NAME` tells that the files do not. Your own is a TOML file of the same fields.",
        "",
    ]
    about = re.search(r"Attributes:\n(.*)", DatasetInfo.__doc__ or "", re.S)
    if about:
        found = re.findall(r"^ *(\w+): (.*(?:\n {12,}.*)*)", about[1], re.M)
        lines += ["| field | what |", "|---|---|", *(f"| `{name}` | {_plain(text)} |" for name, text in found), ""]
    for name in dataset_names():
        info = dataset_info(name)
        lines += [f"## {name}", ""]
        lines += [
            f"- {field.name}: {_value(getattr(info, field.name))}" for field in fields(info) if field.name != "name"
        ]
        lines.append("")
    return "\n".join(lines)


def _public() -> str:
    lines = ["# The public interface", "", "Names of `import diffmae_video`; they load on first use.", ""]
    lines += ["| name | what |", "|---|---|"]
    for module, names in diffmae_video._MODULES.items():
        path = ROOT / "diffmae_video" / f"{module.replace('.', '/')}"
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for name in names:
            home, doc = _find(path, name)
            lines.append(f"| [`{name}`][{home}.{name}] | {_plain(doc)} |")
    return "\n".join(lines)


def _find(path: Path, name: str) -> tuple[str, str]:
    """Module that defines a name which `path` defines or imports, and the first line of its docstring."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
            return module, (ast.get_docstring(node) or "").split("\n\n")[0]
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _find((ROOT / (node.module or "").replace(".", "/")).with_suffix(".py"), name)
    raise LookupError(f"{path} neither defines nor imports {name}")


def _modules(package: str) -> str:
    """A page for a package: every module of it that holds public names."""
    title = "masking and diffusion" if package == "diffusion" else package
    names = [f"diffmae_video.{name}" for name in _BASICS] if package == "diffusion" else []
    folder = ROOT / "diffmae_video" / package
    names += [f"diffmae_video.{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    lines = [f"# {title}", "", "Letters of shapes: [Architecture](../../architecture.md#letters).", ""]
    for name in names:
        lines += [f"::: {name}", "    options:", "      heading_level: 2", "      show_root_full_path: false", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """One line for a cell of a table."""
    return " ".join(text.split()).replace("|", "&#124;").replace("[", "&#91;")


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return json.dumps(list(value)).replace("|", "&#124;")
    text = str(getattr(value, "value", value))
    return text.lower() if isinstance(value, bool) else text
