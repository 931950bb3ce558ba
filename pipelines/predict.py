"""`diffmae predict CLIP...`: labels for loose files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffmae_video.errors import DataError
from diffmae_video.pipelines import console
from diffmae_video.pipelines.find import find_run
from diffmae_video.pipelines.job import Job


@dataclass(frozen=True)
class Prediction:
    """Most likely classes of one file, the likeliest first; `error` where it could not be read."""

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(
    job: Job,
    clips: Sequence[Path],
    task: str | None = None,
    views: str = "1x1",
    top: int = 5,
    quiet: bool = False,
) -> list[Prediction]:
    """Classify videos and images that are not sharded.

    Args:
        job: `checkpoint` names a fine-tuning run; the workspace's newest (of `task`) by default.
        clips: files.
        views: protocol such as `5x3`; `1x1` is one clip from the middle, centre crop.
        top: classes told for each file.
        quiet: say nothing about what was picked.

    Returns:
        One prediction for each file, in order; a file that cannot be read has an error instead of classes.
    """
    source, line = find_run("finetune", job.checkpoint, task)
    if not quiet:
        console.say(line)

    import torch

    from diffmae_video.evaluation.classify import decode_views
    from diffmae_video.pipelines.classifiers import load_classifier
    from diffmae_video.pipelines.tasks import one_protocol, view_settings
    from diffmae_video.training.hardware import pick_device

    loaded = load_classifier(source, pick_device(job.device), job.overrides, job.seed)
    settings = loaded.settings
    protocols = one_protocol(views)
    image = loaded.info.get("frames") == 1  # trained on images: one frame
    spec = view_settings(loaded, protocols, loaded.info.get("dataset"), image=image)
    found = []
    for path in clips:
        try:
            video = decode_views(path, spec)
        except DataError as error:
            found.append(Prediction(path, error=str(error)))
            continue
        rows = []
        with torch.inference_mode():
            for start in range(0, len(video.plan.views), settings.evaluate.batch_views):
                indices = range(start, min(start + settings.evaluate.batch_views, len(video.plan.views)))
                batch = torch.stack([video.view(index) for index in indices]).to(loaded.device)
                rows.append(loaded.probabilities(batch).cpu())
        mean = torch.cat(rows).double()[list(video.plan.members[0])].mean(dim=0)
        likely = torch.sort(mean, descending=True, stable=True).indices[:top].tolist()
        found.append(Prediction(path, tuple((loaded.classes[index], mean[index].item()) for index in likely)))
    return found


def print_predictions(found: Sequence[Prediction], *, json_lines: bool = False) -> bool:
    """Print a table, or one JSON object a line; returns whether every file could be read."""
    if json_lines:
        for one in found:
            row: dict[str, object] = {"path": str(one.path)}
            row |= {"error": one.error} if one.error else {"classes": [[name, round(p, 6)] for name, p in one.classes]}
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        rows = [[one.path, ", ".join(f"{name} {p:.1%}" for name, p in one.classes) or one.error] for one in found]
        console.table("Predictions", ["file", "classes"], rows)
    return all(one.error is None for one in found)
