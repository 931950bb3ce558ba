"""Validation clips for a source that has no split of its own."""

from __future__ import annotations

import hashlib
import posixpath
import re
from dataclasses import replace

from diffmae_video.data.listing import Item, Listing, split_of
from diffmae_video.errors import UsageError

FEW = 20
"""Sources with fewer inputs are not divided."""
_KINETICS = re.compile(r"(.{11})_\d{6}_\d{6}")
_PART = re.compile(r"(.+?)[-_ ]?(?:scene|clip|part|chunk|segment|seg|shot|crop|c)[-_ ]?\d+", re.IGNORECASE)


def source_video(item: Item) -> str:
    """The video that an input was cut from, by its name: `ID_000010_000020` (Kinetics), `v_Run_g01_c02` (UCF101),
    `talk-Scene-003` (PySceneDetect), `talk_part2`; the path of the input where the name has no such ending."""
    stem = posixpath.splitext(posixpath.basename(item.path))[0]
    match = _KINETICS.fullmatch(stem) or _PART.fullmatch(stem)
    return match[1] if match else item.path


def hold_out(listing: Listing, fraction: float) -> Listing:
    """Move a fraction of the source videos from `train` to `val`, where the source names no split.

    A video is held out by a hash of its name, so that the choice stays as it is when videos are added, and all clips of
    a video stay together. A class of two or more videos gets at least one into `val`.

    Args:
        listing: what was found; it is returned as it is where folders or annotation tell splits, or there are fewer
            than `FEW` inputs.
        fraction: of the videos, 0 (none) to below 1.

    Raises:
        UsageError: the fraction is out of range.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"--val-fraction {fraction:g}: give a number from 0 to below 1.")
    divided = any(item.split != "train" or split_of(item.path) for item in listing.items)
    if not fraction or divided or len(listing.items) < FEW or listing.layout not in ("folders", "flat", "table"):
        return listing
    classes: dict[str | None, set[str]] = {}
    for item in listing.items:
        classes.setdefault(item.label, set()).add(source_video(item))
    place = {video: _place(video) for videos in classes.values() for video in videos}
    held = {video for video, at in place.items() if at < fraction}
    for videos in classes.values():
        if len(videos) > 1 and not held & videos:
            held.add(min(videos, key=place.__getitem__))
    items = [replace(item, split="val") if source_video(item) in held else item for item in listing.items]
    items.sort(key=lambda item: item.split != "train")
    count = sum(item.split == "val" for item in items)
    note = f"The source names no split: {count} inputs of {len(held)} videos are held out as val; --val-fraction 0 "
    return replace(listing, items=items, notes=[*listing.notes, note + "keeps all for training."])


def _place(video: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(video.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48
