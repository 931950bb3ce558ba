"""What a `--task` is: a labelled data set, known by name or sharded here; and whether labels fit a classifier."""

from __future__ import annotations

from pathlib import Path

from diffmae_video.data.datasets import dataset_info, dataset_names, unlike_its_name
from diffmae_video.data.manifest import Manifest
from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.classify import ViewSettings
from diffmae_video.evaluation.predictions import class_difference
from diffmae_video.evaluation.views import Protocol, parse_views
from diffmae_video.pipelines import console
from diffmae_video.pipelines.classifiers import Loaded


def open_task_shards(task: str, path: str, origin: str) -> Manifest:
    """The manifest of a task's shards.

    Args:
        path, origin: as `find_task_shards` tells them.

    Raises:
        UsageError: shards of another data set.
        DataError: no manifest there, or one without labels.
    """
    manifest = Manifest.load(path)
    if manifest.dataset != task:
        raise UsageError(
            f"--task {task}: {path} holds the data set {manifest.dataset}; give --task {manifest.dataset}, or the "
            f"shards of {task} with --data."
        )
    if not manifest.classes:
        raise DataError(f"{manifest.root} has no labels ({origin}); shard a labelled copy, or pre-train on it.")
    if difference := unlike_its_name(task, len(manifest.classes)):
        console.say(f"Note: {manifest.root}: {difference}; figures are not those of the data set of that name.")
    return manifest


def default_views(manifest: Manifest) -> str:
    """The usual test views of a data set: its own, 5x3 for videos that are not known, one for images."""
    if manifest.dataset in dataset_names():
        return dataset_info(manifest.dataset).views
    return "1x1" if manifest.kind == "image" else "5x3"


def one_protocol(views: str) -> tuple[Protocol, ...]:
    """The one protocol of a text such as `5x3`, for what averages over one set of views.

    Raises:
        UsageError: it is not written so, or names several.
    """
    protocols = parse_views(views)
    if len(protocols) > 1:
        raise UsageError(f"--views {views}: one set of views is averaged here; name one of them.")
    return protocols


def view_settings(loaded: Loaded, views: tuple[Protocol, ...], dataset: str | None, *, image: bool) -> ViewSettings:
    """What a test cuts from each video: at the speed at which the model was trained.

    `evaluate.protocol` decides; without it the data set's own, as far as that shows clips at the speed of training
    (`data.clip_seconds`, `data.fps`, `data.segments`, `data.stride`), else the nearest one that does. An import says
    nothing of its training: it is tested as the data set usually is.

    Args:
        dataset: name of the data set, where it is known.
        image: single images are tested.

    Raises:
        UsageError: `seconds` for a model that was not trained by seconds.
    """
    settings = loaded.settings
    frames = 1 if image else settings.model.frames
    seconds, protocol = settings.data.seconds(frames), settings.evaluate.protocol
    own = dataset_info(dataset).protocol if dataset in dataset_names() else None
    if protocol == "seconds" and seconds is None:
        raise UsageError(
            "evaluate.protocol = seconds needs the length of a clip; set data.clip_seconds, as in training."
        )
    if protocol is None:
        if own and not loaded.has_settings:
            protocol = own
        elif settings.data.segments:
            protocol = "segments"
        elif seconds:
            protocol = "slowfast" if own == "slowfast" else "seconds"
        else:
            protocol = "videomae" if own in ("videomae", "slowfast") else "stride"
    return ViewSettings(views, frames, settings.data.stride, settings.model.size, protocol, seconds)


def check_classes(checkpoint: str | Path, loaded: Loaded, manifest: Manifest) -> None:
    """Labels of a classifier and of data must be the same: names, count and order.

    Weights that came without names (an import) are taken to have the names of the data in their order, which is said.

    Raises:
        DataError: names the first difference.
    """
    trained = loaded.classes
    if not loaded.named and len(trained) == len(manifest.classes):
        console.say(
            f"{checkpoint} came without class names: its {len(trained)} classes are taken to be those of the data, "
            "in their order; `diffmae import --classes FILE` names them."
        )
        return
    if difference := class_difference(trained, manifest.classes):
        difference = difference.replace("the first", "the checkpoint").replace("the second", "the data")
        raise DataError(
            f"The labels of {checkpoint} are not those of {manifest.root}: {difference}; fine-tune on this data set, "
            "or give the data the checkpoint was trained on."
        )
