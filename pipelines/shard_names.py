"""Which data set a source of clips is, by its layout, classes and folder; what is odd about its classes."""

from __future__ import annotations

import os

from diffmae_video.data.datasets import dataset_names, unlike_its_name
from diffmae_video.data.listing import Listing
from diffmae_video.pipelines.console import say

LAYOUT_DATASETS = {"ssv2": "ssv2", "ucf101": "ucf101", "hmdb51": "hmdb51", "imagenet": "imagenet", "kinetics": "k400"}


def is_known(dataset: str) -> bool:
    """Whether `--dataset` names a data set's description: one of ours, or a file."""
    return dataset in dataset_names() or dataset.endswith(".toml") or os.sep in dataset


def guess_dataset(listing: Listing, source: str) -> str:
    """Name of the data set: that of its layout where the number of classes agrees, else the last part of `source`."""
    from diffmae_video.data.synthetic import CLASSES

    if set(listing.classes) == set(CLASSES):
        return "demo"
    known = LAYOUT_DATASETS.get(listing.layout)
    difference = unlike_its_name(known, len(listing.classes)) if known else None
    if known and not difference:
        return known
    name = source.rstrip("/").rpartition("/")[2]
    name = name.rsplit(".", 1)[0] or "clips"
    if name in dataset_names():
        name = f"{name}-{len(listing.classes)}"
    if difference:
        say(f"Note: the layout is that of {known}, but {difference}: named {name}; --dataset {known} says otherwise.")
    return name


def odd_classes(listing: Listing) -> list[str]:
    """What to say of classes that only other splits than `train` have: no model learns them. A sentence a split."""
    splits: dict[str, set[str]] = {}
    for item in listing.items:
        if item.label is not None:
            splits.setdefault(item.split, set()).add(item.label)
    learned = splits.pop("train", set())
    notes = []
    for split, labels in splits.items() if learned else ():
        if unknown := sorted(labels - learned):
            notes.append(
                f"{len(unknown)} classes of {split} are not in train, e.g. {unknown[0]}: no model learns them."
            )
    return notes
