"""What a `--task` is: a labelled data set, known by name or sharded here; and whether labels fit a classifier."""

from __future__ import annotations

import difflib
from pathlib import Path

from diffmae_video.data.datasets import dataset_info, dataset_names
from diffmae_video.data.manifest import Manifest
from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.predictions import class_difference
from diffmae_video.pipelines.workspace import Workspace


def find_task_data(task: str, data: str | Path | None, configured: str | None = None) -> tuple[Manifest, str]:
    """Find the shards of a task.

    Args:
        task: data set name, as `diffmae shard` recorded it.
        data: `--data`; its data set must be the task.
        configured: `data.path` of the recipe, used where `--data` is not given.

    Returns:
        The manifest, and the line that tells where it was found.

    Raises:
        UsageError: an unknown task, or shards of another data set.
        DataError: no manifest there, or one without labels.
    """
    given = data if data is not None else configured
    if given is not None:
        manifest = Manifest.load(given)
        origin = "--data" if data is not None else "data.path"
        if manifest.dataset != task:
            raise UsageError(
                f"--task {task}: {given} holds the data set {manifest.dataset}; give --task {manifest.dataset}, or the "
                f"shards of {task} with --data."
            )
        line = f"Data: {manifest.root} ({origin})."
    else:
        workspace = Workspace.here()
        entry = workspace.latest("shards", dataset=task)
        if entry is None:
            raise UsageError(_unknown(task, workspace))
        manifest = Manifest.load(entry.path)
        line = f"Data: {entry.path} (the newest shards of {task} in {workspace.folder})."
    if not manifest.classes:
        raise DataError(f"{manifest.root} has no labels; shard a labelled copy, or pre-train on it.")
    return manifest, line


def default_views(manifest: Manifest) -> str:
    """The usual test views of a data set: its own, 5x3 for videos that are not known, one for images."""
    if manifest.dataset in dataset_names():
        return dataset_info(manifest.dataset).views
    return "1x1" if manifest.kind == "image" else "5x3"


def check_classes(checkpoint: str | Path, trained: list[str], manifest: Manifest) -> None:
    """Labels of a classifier and of data must be the same: names, count and order.

    Raises:
        DataError: names the first difference.
    """
    if difference := class_difference(trained, manifest.classes):
        difference = difference.replace("the first", "the checkpoint").replace("the second", "the data")
        raise DataError(
            f"The labels of {checkpoint} are not those of {manifest.root}: {difference}; fine-tune on this data set, "
            "or give the data the checkpoint was trained on."
        )


def _unknown(task: str, workspace: Workspace) -> str:
    sharded = {entry.facts.get("dataset") for entry in workspace.entries() if entry.kind == "shards"} - {None}
    if task in dataset_names():
        return (
            f"--task {task}: no shards of it are known in {workspace.folder}; make them with `diffmae shard SRC OUT`, "
            "or give --data."
        )
    known = sorted(sharded | set(dataset_names()))
    near = difflib.get_close_matches(task, known, n=1, cutoff=0.0)
    return (
        f"--task {task}: no such data set is known or sharded here (did you mean {near[0]}?); name one or give --data."
    )
