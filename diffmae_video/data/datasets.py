"""What is known of a data set, as data: one TOML file each in manifests/datasets, or a user's own."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

from diffmae_video.errors import UsageError


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set that its files do not tell.

    Attributes:
        name: what the manifest of its shards says.
        title: name for people.
        kind: `video` or `image`.
        layout: how its folders are arranged (see data/layouts.py); `auto` looks.
        classes: number of classes, 0 for unlabelled or unknown.
        directional: labels tell left from right, so clips are never flipped.
        views: temporal x spatial views of its usual test.
        protocol: which frames and boxes those views are (evaluation/protocols.py).
        source: where these facts are from.
    """

    name: str
    title: str
    kind: str = "video"
    layout: str = "auto"
    classes: int = 0
    directional: bool = False
    views: str = "5x3"
    protocol: str = "stride"
    source: str = ""

    def difference(self, classes: int) -> str | None:
        """What is odd about data of this name with so many classes, in words; None where nothing is."""
        if not self.classes or not classes or self.classes == classes:
            return None
        return f"it has {classes} classes, {self.title} has {self.classes}"


def dataset_names() -> list[str]:
    """Names of the built-in data sets, sorted."""
    folder = resources.files("diffmae_video.manifests") / "datasets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def dataset_info(name_or_path: str) -> DatasetInfo:
    """Facts about a data set, by name or from a TOML file.

    Raises:
        UsageError: it is not known, or the file is not valid.
    """
    if name_or_path.endswith(".toml") or os.sep in name_or_path:
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--dataset {name_or_path}: cannot be read ({error}); write it in UTF-8.") from error
    elif name_or_path in dataset_names():
        text = (resources.files("diffmae_video.manifests") / "datasets" / f"{name_or_path}.toml").read_text("utf-8")
    else:
        known = ", ".join(dataset_names())
        raise UsageError(f"{name_or_path} is not a known data set ({known}); name one of them or give a TOML file.")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name_or_path} is not valid TOML ({error}); correct that line.") from error
    known_fields = {field.name: field for field in fields(DatasetInfo)}
    for key, value in table.items():
        if key not in known_fields:
            raise UsageError(f"{name_or_path} has the unknown field {key}; known are {', '.join(known_fields)}.")
        kind = {"classes": int, "directional": bool}.get(key, str)
        if type(value) is not kind:
            raise UsageError(f"{name_or_path}: {key} must be of type {kind.__name__}, not {value!r}; correct it.")
    if "name" not in table:
        raise UsageError(f"{name_or_path} has no name; add one.")
    return DatasetInfo(**({"title": table["name"]} | table))


def unlike_its_name(dataset: str, classes: int) -> str | None:
    """`DatasetInfo.difference` of a built-in data set; None for others."""
    return dataset_info(dataset).difference(classes) if dataset in dataset_names() else None


def is_directional(dataset: str) -> bool:
    """Whether labels of this data set tell left from right; data sets that are not known do not."""
    return dataset in dataset_names() and dataset_info(dataset).directional
