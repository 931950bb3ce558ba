"""`diffmae import` and `diffmae export`: weights from and for other projects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffmae_video.errors import UsageError
from diffmae_video.pipelines import console
from diffmae_video.pipelines.workspace import Workspace


def import_file(
    source: str, file: Path, *, out: Path | None = None, overwrite: bool = False, **options: Any
) -> tuple[Path, dict[str, Any]]:
    """Turn another project's file into a model folder.

    Args:
        source: the project, or `auto`.
        file: its weights.
        out: folder; named after the file by default.
        overwrite: write into a folder that holds something.
        options: of `models.importers.import_weights`.

    Returns:
        The folder, and what its model.json says of the import.

    Raises:
        UsageError, DataError: the folder is taken; the file is not what it should be, or does not fit.
    """
    from diffmae_video.models.importers import import_weights
    from diffmae_video.models.weights import save_model

    target = out or Path(f"{file.stem}-imported")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"--out {target} is not empty; choose a new folder or pass --overwrite.")
    model = import_weights(source, file, **options)
    save_model(model, target)
    for problem in model.info["problems"]:
        console.say(f"  {problem}")
    size = model.encoder
    console.say(
        f"Imported {model.info['imported_from']} into {target}: {type(model).__name__}, {size.width} wide, "
        f"{size.depth} blocks, {size.heads} heads. Use it with `finetune --init {target}`, or as --checkpoint."
    )
    return target, model.info


def export(
    checkpoint: str | Path | None = None,
    form: str = "safetensors",
    *,
    out: Path | None = None,
    licence: str = "unknown",
    overwrite: bool = False,
) -> list[Path]:
    """Write a model for others, with a model card that holds the workspace's evaluations of these very weights.

    Args:
        checkpoint: a run, export or import; the workspace's newest fine-tuning, else pre-training, by default.
        form: one of `models.exporters.FORMATS`.
        out: folder; `export-FORMAT` by default.
        licence: named on the card.
        overwrite: replace what is there.

    Returns:
        The files written.

    Raises:
        UsageError: there is no model, the format cannot hold it, or the folder is taken.
    """
    from diffmae_video.models.exporters import export_model
    from diffmae_video.models.weights import load_model

    if checkpoint is None:
        workspace = Workspace.here()
        entry = workspace.latest("finetune") or workspace.require("pretrain", "--checkpoint")
        checkpoint = entry.path
        console.say(f"Exporting {checkpoint} (the newest {entry.kind} run).")
    model = load_model(checkpoint)
    found = evaluations_of(Path(checkpoint))
    if found:
        model.info["evaluations"] = found
    files = export_model(model, out or Path(f"export-{form}"), form, licence=licence, overwrite=overwrite)
    for path in files:
        console.say(f"{path}  {path.stat().st_size:,} bytes")
    return files


def evaluations_of(source: Path) -> list[dict[str, Any]]:
    """Evaluations on record here whose weights, by SHA-256, are those of a run: task, split, videos and scores."""
    from diffmae_video.models.weights import saved_sha256

    weights = saved_sha256(source)
    found = []
    for entry in Workspace.here().entries():
        file = Path(entry.path) / "eval.json"
        if entry.kind != "eval" or not file.is_file():
            continue
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            if report["weights_sha256"] == weights:
                found.append({name: report[name] for name in ("task", "split", "videos", "views")})
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged report is no measurement
    return found
