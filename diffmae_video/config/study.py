"""Studies: TOML files of arms, seeds and stages, and the runs that they come to.

A study compares arms (named changes of a recipe) by measures (fine-tuning with few labels, probes, inpainting) over
seeds. `expand` turns it into cells: runs of one stage each, with the cells they need. Arms that pre-train alike share
the cell.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from diffmae_video.config.recipes import load_settings
from diffmae_video.config.settings import Section, Stage
from diffmae_video.errors import UsageError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.,%:+-]{0,59}$")]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class Arm(Section):
    """One way of training, compared with the others."""

    name: Name
    """What tables call it."""
    pretrain: bool = True
    """False: no pre-training; the measures start from scratch."""
    recipe: str | None = None
    """Recipe of this arm; the study's without it."""
    set: tuple[str, ...] = ()
    """`section.field=value` of pre-training (of a scratch arm: its `model.*`)."""
    tune: tuple[str, ...] = ()
    """`section.field=value` of fine-tuning and probes, for example an own learning rate."""
    data: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Data sets to pre-train on, mixed where there are several; the study's without it."""
    kind: Literal["video", "image"] | None = None
    """What this arm pre-trains on; the study's without it."""


class Measure(Section):
    """What is measured of every arm."""

    name: Name
    """What tables call it."""
    kind: Literal["finetune", "linear", "attentive", "knn", "inpaint"]
    """Fine-tuning and test, a probe of frozen features, or inpainting."""
    task: str
    """Labelled data set; for `inpaint`, the data set whose evaluation split is filled."""
    recipe: str | None = None
    """Recipe of this stage; the arm's without it."""
    set: tuple[str, ...] = ()
    """`section.field=value`, for example `data.label_fraction=0.1`; an arm's `tune` comes after it."""
    seeds: Seeds | None = None
    """Seeds; the study's without it."""
    masks: tuple[str, ...] = ("random:0.75",)
    """Masks of `inpaint`."""
    arms: tuple[str, ...] | None = None
    """Arms that are measured; all without it."""


class Study(Section):
    """Arms x measures x seeds."""

    name: Name
    summary: str
    """What the study asks, in one sentence."""
    recipe: str
    """Recipe that the arms change."""
    kind: Literal["video", "image"] = "video"
    """What is pre-trained on."""
    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """Data sets to pre-train on, by name; several are mixed."""
    baseline: str
    """Arm that the others are tested against."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the measures."""
    pretrain_seeds: Seeds = (0,)
    """Seeds of pre-training; measure number k starts from seed number k, cycling."""
    set: tuple[str, ...] = ()
    """`section.field=value` of every pre-training."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names(self) -> Self:
        for what, names in (("arm", [arm.name for arm in self.arms]), ("measure", [m.name for m in self.measures])):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice:
                raise ValueError(f"the {what} {twice} is there twice; rename one")
        known = {arm.name for arm in self.arms}
        named = {self.baseline} | {name for measure in self.measures for name in measure.arms or ()}
        if unknown := sorted(named - known):
            raise ValueError(f"{unknown[0]} is no arm; the arms are {', '.join(sorted(known))}")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of one stage."""

    name: str
    """Folder below `cells/`: readable, and different as soon as anything that it depends on differs."""
    stage: Literal["pretrain", "finetune", "eval", "inpaint"]
    arm: str
    """First arm that needs it."""
    measure: str | None
    """None for pre-training."""
    seed: int
    needs: str | None
    """Cell it starts from."""
    recipe: str
    overrides: tuple[str, ...]
    data: tuple[str, ...]
    """Data sets, by name."""
    kind: str = "video"
    """Of `pretrain`: `video`, `image` or `joint`."""
    protocol: str | None = None
    """Of `finetune`."""
    masks: tuple[str, ...] = ()
    """Of `inpaint`."""


@dataclass(frozen=True)
class Result:
    """Where the figures of an arm, a measure and a seed are."""

    arm: str
    measure: str
    seed: int
    cell: str


@dataclass(frozen=True)
class Grid:
    """Everything a study runs."""

    cells: dict[str, Cell]
    """By name, each after the one it needs."""
    results: tuple[Result, ...]


def study_names() -> list[str]:
    """Names of the built-in studies, sorted."""
    folder = resources.files("diffmae_video.manifests") / "studies"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_study(name_or_path: str) -> Study:
    """Read a built-in study by name, or any TOML file by path.

    Raises:
        UsageError: there is no such study, or the file is not one.
    """
    if name_or_path.endswith(".toml") or os.sep in name_or_path:
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"STUDY {name_or_path} cannot be read ({error}); check the path.") from error
    elif name_or_path in study_names():
        text = (resources.files("diffmae_video.manifests") / "studies" / f"{name_or_path}.toml").read_text("utf-8")
    else:
        known = ", ".join(study_names())
        raise UsageError(f"STUDY {name_or_path}: no such study; name one of {known}, or give a TOML file.")
    try:
        return Study.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"Study {name_or_path} is not valid TOML ({error}); correct that line.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the study"
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"Study {name_or_path}: {key}: {message[:1].lower()}{message[1:]}; correct it.") from error


def expand(study: Study) -> Grid:
    """All runs of a study. The settings of each are resolved here, so that a wrong key fails before anything runs.

    Raises:
        UsageError: a recipe, key or value that does not exist.
    """
    cells: dict[str, Cell] = {}
    results: list[Result] = []

    def add(cell: Cell, stage: Stage, extra: Mapping[str, object]) -> str:
        settings = load_settings(cell.recipe, stage, cell.overrides)
        facts = {"settings": settings.model_dump(mode="json"), "seed": cell.seed, "needs": cell.needs, **extra}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]
        same = next((name for name in cells if name.endswith(f"-{key}")), None)
        name = same or f"{_slug(cell.arm)}-{_slug(cell.measure or cell.stage)}-s{cell.seed}-{key}"
        cells.setdefault(name, Cell(**{**cell.__dict__, "name": name}))
        return name

    for arm in study.arms:
        recipe = arm.recipe or study.recipe
        data = arm.data or study.data
        kind = "joint" if len(data) > 1 else arm.kind or study.kind
        model = tuple(text for text in (*study.set, *arm.set) if text.startswith("model."))
        for measure in study.measures:
            if measure.arms is not None and arm.name not in measure.arms:
                continue
            if measure.kind == "inpaint" and not arm.pretrain:
                continue
            for place, seed in enumerate(measure.seeds or study.seeds):
                start = None
                if arm.pretrain:
                    pretrain_seed = study.pretrain_seeds[place % len(study.pretrain_seeds)]
                    overrides = (*study.set, *arm.set)
                    cell = Cell("", "pretrain", arm.name, None, pretrain_seed, None, recipe, overrides, data, kind)
                    start = add(cell, "pretrain", {"stage": "pretrain", "data": data, "kind": kind})
                recipe_of = measure.recipe or recipe
                if measure.kind == "inpaint":
                    cell = Cell(
                        "", "inpaint", arm.name, measure.name, seed, start, recipe_of, measure.set, (measure.task,),
                        masks=measure.masks,
                    )  # fmt: skip
                    last = add(cell, "render", {"stage": "inpaint", "task": measure.task, "masks": measure.masks})
                else:
                    overrides = (*(() if arm.pretrain else model), *measure.set, *arm.tune)
                    cell = Cell(
                        "", "finetune", arm.name, measure.name, seed, start, recipe_of, overrides, (measure.task,),
                        protocol=measure.kind,
                    )  # fmt: skip
                    last = add(cell, "finetune", {"stage": measure.kind, "task": measure.task})
                    if measure.kind == "finetune":
                        cell = Cell(
                            "", "eval", arm.name, f"{measure.name}-eval", seed, last, recipe_of, (), (measure.task,)
                        )
                        last = add(cell, "evaluate", {"stage": "eval", "task": measure.task})
                results.append(Result(arm.name, measure.name, seed, last))
    return Grid(cells, tuple(results))


def _slug(text: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in text)
