"""How an interrupted render continues: its finished batches on disk, and what must be equal for them to be used."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from diffmae_video.config import Settings
from diffmae_video.files import UNREADABLE_ARRAY, sha256_of, write_atomic
from diffmae_video.mask_text import MaskRequest
from diffmae_video.rendering.fillers import Taken
from diffmae_video.rendering.inpaint import Sampled, Trajectory
from diffmae_video.rendering.source import VideoSource

WORK = ".work"
"""Folder inside a render's own, removed once the render is whole."""


class WindowFiles:
    """Finished batches as files (rendering.inpaint.WindowStore)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: str) -> Sampled | None:
        """What was saved under a key; None where nothing whole was."""
        try:
            with np.load(self.folder / f"{key}.npz", allow_pickle=False) as file:
                trajectory = Trajectory(tuple(file["steps"].tolist()), file["states"]) if "steps" in file else None
                return Sampled(file["results"], file["first"], trajectory)
        except UNREADABLE_ARRAY:
            return None

    def save(self, key: str, sampled: Sampled) -> None:
        """Keep a batch, whole or not at all, with the trajectory that belongs to it."""
        arrays = {"results": sampled.results, "first": sampled.first}
        if sampled.trajectory is not None:
            arrays |= {"steps": np.array(sampled.trajectory.steps), "states": sampled.trajectory.states}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType] - its own `allow_pickle` confuses the checker
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"{key}.npz", buffer.getvalue())


class TakenFiles:
    """What was taken from other frames, one file a frame (rendering.fillers.TakenStore)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, number: int) -> Taken | None:
        """What was saved of a frame; None where nothing whole was."""
        try:
            with np.load(self.folder / f"{number}.npz", allow_pickle=False) as file:
                shape = tuple(file["shape"].tolist())
                seen = np.unpackbits(file["seen"], count=int(np.prod(shape))).view(bool).reshape(shape)
                return Taken(seen, file["rgb"], float(file["confidence"]))
        except UNREADABLE_ARRAY:
            return None

    def save(self, number: int, taken: Taken) -> None:
        """Keep it, whole or not at all."""
        buffer = io.BytesIO()
        seen, shape = np.packbits(taken.seen), np.array(taken.seen.shape)
        np.savez_compressed(buffer, seen=seen, shape=shape, rgb=taken.rgb, confidence=np.float64(taken.confidence))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"{number}.npz", buffer.getvalue())


def render_identity(
    source: VideoSource, weights: str, settings: Settings, mask: MaskRequest, stride: int
) -> dict[str, Any]:
    """What makes two renders the same (`pipelines.run.open_run`): all that decides what is written.

    Args:
        weights: digest of the model's weights; empty without a model.
        mask: files among its texts count by their content, since they may change under the same name.
    """
    digest = hashlib.sha256()
    files = [source.path] if source.path.is_file() else sorted(source.files)
    for path in mask.files():
        files += [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else []
    for file in files:
        digest.update(bytes.fromhex(sha256_of(file)))
    render = settings.render.model_dump(exclude={"mask"})
    asked = [mask.texts, mask.track, mask.growth, mask.invert, *(["follow", mask.sam] if mask.follow else [])]
    facts = [weights, render, settings.seed, asked, stride, str(source.fps)]
    digest.update(json.dumps(facts, default=str, sort_keys=True).encode())
    return {"kind": "render", "data": digest.hexdigest()}
