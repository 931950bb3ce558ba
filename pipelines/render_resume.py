"""How an interrupted render continues: its finished windows on disk, and what must be equal for them to be used."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffmae_video.config import Settings
from diffmae_video.errors import UsageError
from diffmae_video.files import sha256_of, write_atomic
from diffmae_video.pipelines.console import say
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.rendering.video import VideoSource

WORK = ".work"
"""Folder inside a render's own, removed once the render is whole."""


class WindowFiles:
    """Finished windows as files (rendering.inpaint.WindowStore)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str) -> np.ndarray | None:
        """What was saved under a key; None where nothing whole was."""
        file = self.folder / f"{key}.npy"
        if not file.is_file():
            return None
        try:
            return np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError):
            return None

    def save(self, key: str, clips: np.ndarray) -> None:
        """Keep an array, whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, clips, allow_pickle=False)
        write_atomic(self.folder / f"{key}.npy", buffer.getvalue())


def identity(source: VideoSource, weights: str, settings: Settings, masks: Sequence[str], *rest: Any) -> str:
    """A digest of all that decides a window's pixels: clip, masks, weights, settings and seed.

    Args:
        weights: digest of the model's weights.
        masks: texts; files among them count by their content, since they may change under the same name.
        rest: anything else, compared as JSON.
    """
    digest = hashlib.sha256()
    files = [source.path] if source.path.is_file() else sorted(source.files)
    for path in map(Path, masks):
        files += [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else []
    for file in files:
        digest.update(bytes.fromhex(sha256_of(file)))
    look = settings.render.model_dump(exclude={"codec", "crf", "mask"})  # these change no window
    digest.update(json.dumps([weights, look, settings.seed, list(masks), rest], default=str, sort_keys=True).encode())
    return digest.hexdigest()


def render_directory(out: Path | None, mark: str, resume: str) -> Path:
    """The folder of an interrupted render with the same identity, or a new one (not made yet).

    Args:
        out: the folder asked for.
        mark: identity of this render.
        resume: `auto` or `never`.

    Raises:
        UsageError: `out` is in use, or another value of `resume`.
    """
    workspace = Workspace.here()
    if resume not in ("auto", "never"):
        raise UsageError(f"--resume {resume}: a render knows auto and never; name its folder with --out.")
    candidates = [out] if out is not None else sorted((workspace.folder / "runs").glob("render-*"), reverse=True)
    for folder in candidates:
        file = folder / WORK / "identity"
        if file.is_file():
            if resume == "auto" and file.read_text() == mark:
                say(f"Continuing the interrupted render in {folder}.")
                return folder
            if out is not None and resume == "never":
                shutil.rmtree(folder)  # it holds an unfinished render and nothing else
            elif out is not None:
                raise UsageError(
                    f"--out {out} holds an interrupted render of something else; name another folder or --resume never."
                )
    return workspace.new_run_directory("render", out)


def open_directory(directory: Path, mark: str) -> WindowFiles:
    """Make or reopen a render's folder, drop what a killed one was writing, and return its finished windows."""
    work = directory / WORK
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(work / "identity", mark)
    for stale in directory.glob(".*.tmp"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    return WindowFiles(work / "windows")
