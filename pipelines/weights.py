"""`diffmae import` and `diffmae export`: weights from and for other projects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffmae_video.errors import UsageError
from diffmae_video.models.hub import hub_stem, is_hub_name, local_weights, model_folder
from diffmae_video.pipelines import console
from diffmae_video.pipelines.workspace import Workspace


def import_file(
    source: str,
    file: Path,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    size: str | None = None,
    classes: Path | None = None,
    **options: Any,
) -> tuple[Path, dict[str, Any]]:
    """Turn another project's file into a model folder.

    Args:
        source: the project, or `auto`.
        file: its weights, or their name on a hub.
        out: folder; named after the file by default.
        overwrite: write into a folder that holds something.
        size: `HEIGHTxWIDTH` of the pictures it was trained on.
        classes: text file of class names, one a line, in the head's order.
        options: of `models.importers.import_weights`.

    Returns:
        The folder, and what its model.json says of the import.

    Raises:
        UsageError, DataError: the folder is taken; the file is not what it should be, or does not fit.
    """
    from diffmae_video.models.importers import import_weights
    from diffmae_video.models.weights import save_model

    target = out or Path(f"{hub_stem(file) if is_hub_name(file) else file.stem}-imported")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"--out {target} is not empty; choose a new folder or pass --overwrite.")
    options |= {"size": parse_size(size), "classes": None if classes is None else read_class_names(classes)}
    model = import_weights(source, local_weights(str(file)) if is_hub_name(file) else file, **options)
    save_model(model, target, {"file": str(file)} if is_hub_name(file) else None)
    for problem in model.info["problems"]:
        console.say(f"  {problem}")
    if others := model.info.get("other_tables"):
        console.say(f"  Took {model.info.get('key')} of {file}; --key {others[0]} takes another table of it.")
    encoder, settings = model.encoder, model.settings
    said = f"{settings.frames} frames of {settings.size[1]}x{settings.size[0]}"
    if getattr(model, "decoder", None) is not None:
        said += f", decoder that predicts {settings.target}"
    elif model.num_classes:
        names = "" if model.info.get("classes") else " without names (--classes FILE gives them)"
        said += f", {model.num_classes} classes{names}, {model.pool} pooling"
    console.say(
        f"Imported {model.info['imported_from']} into {target}: {type(model).__name__}, {encoder.width} wide, "
        f"{encoder.depth} blocks, {encoder.heads} heads; {said}. Use it with `finetune --init {target}`, or as "
        "--checkpoint."
    )
    return target, model.info


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`HEIGHTxWIDTH` in pixels.

    Raises:
        UsageError: it is not written so.
    """
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()) or not 0 < int(height) * int(width) <= 2**26:
        raise UsageError(f"--size {text}: write it as HEIGHTxWIDTH in pixels, for example 224x224.")
    return int(height), int(width)


def read_class_names(file: Path) -> list[str]:
    """Class names of a text file, one a line; empty lines at its end are left out.

    Raises:
        UsageError: it cannot be read, has an empty line in between or a name twice.
    """
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--classes {file} cannot be read ({error}); give a text file, one name a line.") from error
    if not names or "" in names or len(set(names)) < len(names):
        raise UsageError(f"--classes {file} must hold one name a line, none empty and none twice; correct it.")
    return names


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
        checkpoint: a run, export or import, or its name on a hub; the workspace's newest fine-tuning, else
            pre-training, by default.
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
    if is_hub_name(checkpoint):
        checkpoint = model_folder(str(checkpoint))
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
