"""The work of `evaluate_propagation.evaluate_propagation`: every video followed, scored and written down."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffmae_video._version import __version__
from diffmae_video.config import settings_toml
from diffmae_video.data.davis import MaskedVideo, list_davis
from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.predictions import write_json
from diffmae_video.evaluation.propagation import propagate, score
from diffmae_video.files import replacing, sha256_of
from diffmae_video.models.patches import normalize_pixels
from diffmae_video.pipelines.classifiers import Loaded, load
from diffmae_video.pipelines.console import progress, say, table
from diffmae_video.pipelines.evaluate_propagation import PropagationEvaluation
from diffmae_video.pipelines.find import find_run
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.run import open_run
from diffmae_video.rendering.report import Report
from diffmae_video.rendering.writers import write_png
from diffmae_video.training.hardware import pick_device
from diffmae_video.training.signals import stop_on_signal

PALETTE = [(0, 0, 0), (230, 60, 60), (60, 180, 75), (70, 100, 230), (245, 190, 40), (170, 60, 200), (60, 200, 200)]
PICTURED, SHOWN = 4, 5  # videos in the report, frames of each


def follow_objects(job: Job) -> PropagationEvaluation | None:
    """See `evaluate_propagation.evaluate_propagation`."""
    source, line = find_run("pretrain", job.checkpoint)
    say(line)
    assert job.data is not None
    loaded = load(source, pick_device(job.device), job.overrides, job.seed)
    settings, chosen = loaded.settings, loaded.settings.evaluate.propagate
    videos = list_davis(job.data, settings.data.eval_split)
    frames = sum(len(video.frames) for video in videos)
    say(
        f"Data: {job.data}, {len(videos)} videos of {settings.data.eval_split}, {frames} frames. Labels from the first "
        f"and the last {chosen.memory} frames, {chosen.top} patches within {chosen.radius or 'any distance'}, short "
        f"side {chosen.short_side}, {loaded.precision} on {loaded.device.type}."
    )
    if job.dry_run:
        return None
    listed = [(video.name, [sha256_of(path) for path in video.masks if path]) for video in videos]
    facts = [__version__, loaded.weights_sha256, listed, chosen.model_dump(mode="json"), loaded.precision]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    with open_run(
        job, {"kind": "eval", "data": digest}, finished="refuse" if job.resume == "never" else "yield"
    ) as run:
        if run.earlier.get("status") == "finished":
            say(f"{run.directory} holds this evaluation already: done before.")
            return _read(run.directory)
        started, objects, pictures = time.monotonic(), dict[str, tuple[float, float]](), {}
        with stop_on_signal() as signals, progress(frames, "eval propagate", "frames") as bar:
            for video in videos:
                signals.check("the same command continues with the next video")
                result = _finished_video(run.directory, video)
                if result is None:
                    result = _follow(video, loaded, run.directory, bar.update)
                else:
                    bar.update(len(video.frames))
                objects |= {f"{video.name}/{number}": pair for number, pair in score(result, _truth(video)).items()}
                if len(pictures) < PICTURED:
                    pictures[video.name] = _strip(video, result)
        if not objects:
            raise DataError(f"{job.data} marks no object in any first frame; check its Annotations.")
        mean = np.nanmean(np.array(list(objects.values())), axis=0).tolist()
        report = {
            "task": "propagate",
            "checkpoint": str(source),
            "weights_sha256": loaded.weights_sha256,
            "data": job.data,
            "split": settings.data.eval_split,
            "videos": {"used": len(videos), "frames": frames, "objects": len(objects)},
            "j": mean[0],
            "f": mean[1],
            "j_and_f": sum(mean) / 2,
            "objects": {name: list(pair) for name, pair in objects.items()},
            "settings": chosen.model_dump(mode="json"),
            "precision": loaded.precision,
            "device": loaded.device.type,
            "seconds": round(time.monotonic() - started, 3),
            "version": __version__,
        }
        found = PropagationEvaluation(run.directory, mean[0], mean[1], objects, report)
        _write(found, pictures, settings_toml(settings))
        run.finish(task="propagate", j_and_f=found.j_and_f, checkpoint=str(source))
    table(
        f"Objects followed in {len(videos)} videos",
        ["", "J&F %", "J %", "F %"],
        [["mean", 100 * found.j_and_f, 100 * found.j, 100 * found.f]],
    )
    say(f"Wrote {found.directory}/eval.json, masks/ and report.html in {report['seconds']:.0f} s.")
    return found


def describer(loaded: Loaded, short_side: int) -> Callable[[Tensor], Tensor]:
    """A function from a frame uint8 (C, H, W) to the encoder's features of it, (h, w, D), float32.

    A frame is an image to the encoder: a clip of one tubelet. It is scaled to a short side of `short_side` pixels and
    both sides are rounded to whole patches.
    """
    encoder, patch = loaded.model.encoder, loaded.settings.model.patch

    @torch.inference_mode()
    def describe(frame: Tensor) -> Tensor:
        height, width = frame.shape[1:]
        scale = short_side / min(height, width)
        size = [max(1, round(side * scale / patch)) * patch for side in (height, width)]
        pixels = F.interpolate(frame[None].to(loaded.device).float(), size, mode="bicubic", antialias=True)
        pixels = pixels.round().clamp(0, 255).to(torch.uint8)
        clip = normalize_pixels(pixels[:, None], loaded.settings.model.pixel_norm)  # (1, C, 1, H, W)
        with loaded.autocast():
            tokens = encoder.forward_features(clip)[0].float()  # ([1 +] N, D)
        count = size[0] // patch * (size[1] // patch)
        return tokens[-count:].unflatten(0, (size[0] // patch, size[1] // patch))

    return describe


def _follow(video: MaskedVideo, loaded: Loaded, directory: Path, advance: Callable[[int], None]) -> list[np.ndarray]:
    first = video.mask(0)
    assert first is not None  # `list_davis` has looked
    if video.frame(0).shape[1:] != first.shape:
        raise DataError(f"{video.masks[0]} is not of the size of {video.frames[0]}; copy that video again.")
    chosen = loaded.settings.evaluate.propagate
    masks, frames = [], map(video.frame, range(len(video.frames)))
    for mask in propagate(frames, first, describer(loaded, chosen.short_side), chosen):
        masks.append(mask)
        advance(1)
    folder = directory / "masks" / video.name
    folder.mkdir(parents=True, exist_ok=True)
    for path, mask in zip(video.frames, masks, strict=True):  # the last one says that all are there
        image = Image.fromarray(mask.astype(np.uint8), mode="P")
        image.putpalette([value for colour in PALETTE for value in colour])
        with replacing(folder / f"{path.stem}.png") as temporary:
            image.save(temporary, format="PNG")
    return masks


def _finished_video(directory: Path, video: MaskedVideo) -> list[np.ndarray] | None:
    """Masks of an earlier try; None where they are not all there."""
    made = replace(video, masks=tuple(directory / "masks" / video.name / f"{one.stem}.png" for one in video.frames))
    if not all(path is not None and path.is_file() for path in made.masks):
        return None
    return [mask for index in range(len(made.frames)) if (mask := made.mask(index)) is not None]


def _truth(video: MaskedVideo) -> list[np.ndarray | None]:
    return [video.mask(index) for index in range(len(video.frames))]


def _strip(video: MaskedVideo, masks: list[np.ndarray]) -> np.ndarray:
    """Some frames with objects tinted and true contours white, side by side: uint8 (H, W, 3)."""
    shown = np.linspace(0, len(masks) - 1, min(SHOWN, len(masks))).round().astype(int)
    panels = []
    for index in shown:
        frame = video.frame(int(index)).permute(1, 2, 0).numpy().astype(np.float32)
        tint = np.array(PALETTE, np.float32)[masks[index] % len(PALETTE)]
        frame = np.where((masks[index] > 0)[..., None], 0.45 * frame + 0.55 * tint, frame)
        truth = video.mask(int(index))
        if truth is not None:
            edge = np.zeros(truth.shape, bool)
            edge[:, 1:] |= truth[:, 1:] != truth[:, :-1]
            edge[1:] |= truth[1:] != truth[:-1]
            frame[edge] = 255
        picture = Image.fromarray(frame.round().astype(np.uint8))
        scale = min(1.0, 240 / picture.height)
        panels.append(np.asarray(picture.resize((round(picture.width * scale), round(picture.height * scale)))))
    return np.concatenate(panels, axis=1)


def _write(found: PropagationEvaluation, pictures: dict[str, np.ndarray], settings: str) -> None:
    report = found.report
    (found.directory / "config.toml").write_text(settings, encoding="utf-8")
    page = Report(f"Objects followed: J&F {found.j_and_f:.1%}")
    page.text(
        f"Checkpoint `{report['checkpoint']}` on `{report['data']}`, split {report['split']}. Labels of the first "
        "frame go from patch to similar patch; nothing was trained for it. J is the overlap of regions, F the "
        "agreement of contours, both means over the objects, without the first and the last frame of a video."
    )
    page.table("Mean, %", ["J&F", "J", "F"], [[round(100 * x, 2) for x in (found.j_and_f, found.j, found.f)]])
    for name, picture in pictures.items():
        page.image(name, picture, "Colours: what was followed. White lines: contours drawn by people.")
    if pictures:
        write_png(found.directory / "sheet.png", next(iter(pictures.values())))
    rows = [[name, round(100 * j, 2), round(100 * f, 2)] for name, (j, f) in sorted(found.objects.items())]
    page.table("By object, %", ["object", "J", "F"], rows)
    page.write(found.directory / "report.html")
    write_json(found.directory / "eval.json", report)


def _read(directory: Path) -> PropagationEvaluation:
    try:
        report = json.loads((directory / "eval.json").read_text(encoding="utf-8"))
        objects = {name: (pair[0], pair[1]) for name, pair in report["objects"].items()}
        return PropagationEvaluation(directory, report["j"], report["f"], objects, report)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{directory} cannot be read ({error!r}); remove it, or name another --out.") from error
