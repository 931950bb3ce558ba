"""Recipes: TOML files of the settings' shape, layered into the settings of a stage.

A recipe holds the sections of `Settings` plus, under `[stage.NAME]`, the same sections again with what differs in that
stage (`[stage.finetune.train]`). Settings of a stage are: defaults, then the plain sections of the recipe it `extends`
and of the recipe, then the tables of that stage in the same order, then `--set section.field=value`. So what a parent
says of a stage holds until a child says something else of that stage.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from diffmae_video.config.settings import Settings, Stage
from diffmae_video.errors import UsageError


class Recipe(BaseModel):
    """A TOML file under manifests/recipes, or a user's own."""

    model_config = ConfigDict(extra="forbid")
    name: str
    summary: str
    extends: str | None = None
    tables: dict[str, Any]
    stages: dict[str, dict[str, Any]]


def recipe_names() -> list[str]:
    """Names of the built-in recipes, sorted."""
    folder = resources.files("diffmae_video.manifests") / "recipes"
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(name_or_path: str) -> Recipe:
    """Read a built-in recipe by name, or any TOML file by path.

    Raises:
        UsageError: there is no such recipe, or the file is not a recipe.
    """
    if name_or_path.endswith(".toml") or os.sep in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise UsageError(
                f"--recipe {name_or_path}: there is no such file; `diffmae recipes` lists the built-in ones."
            )
        try:
            text, name = path.read_text(encoding="utf-8"), path.stem
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--recipe {name_or_path} cannot be read ({error}); give a text file in UTF-8.") from error
    elif name_or_path in recipe_names():
        text = (resources.files("diffmae_video.manifests") / "recipes" / f"{name_or_path}.toml").read_text("utf-8")
        name = name_or_path
    else:
        hint = _nearest(name_or_path, recipe_names())
        raise UsageError(f"--recipe {name_or_path}: no such recipe{hint}; `diffmae recipes` lists them.")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"Recipe {name_or_path} is not valid TOML ({error}); correct that line.") from error
    stages = tables.pop("stage", {})
    unknown = [stage for stage in stages if stage not in Stage.__args__]
    if unknown:
        known = ", ".join(Stage.__args__)
        raise UsageError(f"Recipe {name_or_path} has [stage.{unknown[0]}], which is not one of {known}; rename it.")
    summary, extends = tables.pop("summary", ""), tables.pop("extends", None)
    return Recipe(name=name, summary=summary, extends=extends, tables=tables, stages=stages)


def recipe_chain(name_or_path: str) -> list[Recipe]:
    """A recipe and those it extends, the nearest first.

    Raises:
        UsageError: one of them does not exist, is no recipe, or extends itself.
    """
    chain: dict[str, Recipe] = {}  # by the name or path that was asked for
    name: str | None = name_or_path
    while name:
        if name in chain:
            raise UsageError(f"Recipe {name_or_path} extends itself through {name}; break the circle.")
        chain[name] = read_recipe(name)
        name = chain[name].extends
    return list(chain.values())


def load_settings(recipe: str | None, stage: Stage, overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """Resolve the settings of a stage: defaults, recipe chain, its stage tables, then `section.field=value` overrides.

    Args:
        recipe: name or path; None for the defaults.
        stage: whose `[stage.NAME]` table applies.
        overrides: texts such as `train.base_lr=3e-4`; values are TOML, bare words are strings.

    Raises:
        UsageError: an unknown recipe, key or value, named with the nearest valid key.
    """
    tables: dict[str, Any] = {}
    origin = f"recipe {recipe}"
    if recipe:
        chain = recipe_chain(recipe)[::-1]
        for layer in (*(part.tables for part in chain), *(part.stages.get(stage, {}) for part in chain)):
            _merge(tables, layer)
    for text in overrides:
        _merge(tables, _parse_override(text))
        origin = "--set" if not recipe else f"recipe {recipe} with --set"
    return validate_settings(tables, origin)


def validate_settings(tables: dict[str, Any], origin: str) -> Settings:
    """Build Settings from nested tables; errors are one sentence that names the key and the nearest valid one."""
    try:
        return Settings.model_validate(tables)
    except ValidationError as error:
        raise UsageError(_explain(error, origin)) from error


def read_settings(path: Path) -> Settings:
    """Read the resolved settings that a run saved (config.toml)."""
    try:
        return validate_settings(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as settings ({error}); give the folder of a run.") from error


def settings_toml(settings: BaseModel) -> str:
    """The settings as TOML; fields that are None are left out (TOML has no null)."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))


def settings_listing(settings: Settings) -> str:
    """All settings as TOML; those that are not set stand as comments, with what leaving them out means."""
    lines = []
    for table in _tables(settings):
        lines += ["", f"[{table[0]}]"] if table[0] else []
        for name, field in type(table[1]).model_fields.items():
            value = getattr(table[1], name)
            if value is None:
                meaning = " ".join((field.description or "").split())
                lines.append(f"# {name} is not set. {meaning}")
            elif not isinstance(value, BaseModel):
                plain = table[1].model_dump(mode="json", include={name}, exclude_none=True)
                lines.append(f"{name} = {_inline(plain[name])}")
    return "\n".join(lines) + "\n"


def _tables(settings: BaseModel, prefix: str = "") -> list[tuple[str, BaseModel]]:
    """Every group of settings with its dotted name, outer ones first."""
    found = [(prefix, settings)]
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            found += _tables(value, f"{prefix}.{name}".lstrip("."))
    return found


def _inline(value: Any) -> str:
    """A value as TOML on one line; a list of tables in its other form would end the table it stands in."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def setting_keys(section: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Dotted names of all settings, e.g. `train.base_lr`."""
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += setting_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def with_overrides(settings: Settings, **sections: Any) -> Settings:
    """A copy with single fields replaced and validated: `with_overrides(s, train={"steps": 5})`."""
    tables = settings.model_dump()
    _merge(tables, sections)
    return validate_settings(tables, "settings")


def override_settings(settings: Settings, overrides: Sequence[str] = (), seed: int | None = None) -> Settings:
    """A copy changed by `section.field=value` texts and, where given, the seed.

    Raises:
        UsageError: an unknown key or a value that is not valid.
    """
    tables = settings.model_dump()
    for text in overrides:
        _merge(tables, _parse_override(text))
    if seed is not None:
        tables["seed"] = seed
    return validate_settings(tables, "--set")


def _merge(into: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = json.loads(json.dumps(value)) if isinstance(value, dict) else value


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text}: write it as section.field=value, for example train.base_lr=3e-4.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    tables: dict[str, Any] = {}
    inner = tables
    *parents, last = key.strip().split(".")
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = parsed
    return tables


def _explain(error: ValidationError, origin: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"Unknown setting {key} in {origin}{_nearest(key, setting_keys())}; `diffmae recipes show` lists all."
    message = first["msg"].removeprefix("Value error, ")
    return f"Setting {key} in {origin} is not valid: {message[:1].lower()}{message[1:]}; correct it."


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if not near:  # a right field in a wrong or missing section
        near = difflib.get_close_matches(name.rpartition(".")[2], [key.rpartition(".")[2] for key in known], n=1)
        near = [key for key in known if near and key.endswith(near[0])][:1]
    return f" (did you mean {near[0]}?)" if near else ""
