"""What a folder of shards holds: durations, sizes, rates and classes as tables, a histogram PNG and a contact sheet."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffmae_video.data.decode import read_clips
from diffmae_video.data.images import read_image
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.media import MEDIA_SUFFIXES
from diffmae_video.data.remote import write_file
from diffmae_video.data.shards import ShardReader
from diffmae_video.errors import DataError
from diffmae_video.pipelines.console import say, table


@dataclass(frozen=True)
class StatsResult:
    """Percentiles by quantity, samples by class, and the pictures that were written."""

    quantiles: dict[str, list[float]]  # minimum, 5%, median, 95%, maximum
    classes: dict[str, int]
    histogram: Path
    sheet: Path


def stats(path: str, out: str | Path | None = None, *, split: str | None = None, pictures: int = 24) -> StatsResult:
    """Summarise shards.

    Args:
        path: folder or URL of shards.
        out: folder for stats.png and sheet.png; the present one by default.
        split: one split only.
        pictures: frames on the contact sheet.

    Raises:
        DataError: no manifest, or no such split.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    manifest = Manifest.load(path)
    splits = [split] if split else list(manifest.splits)
    tables = [manifest.samples(name) for name in splits]

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in tables]).astype(np.float64)

    frames, fps = column("frames"), column("fps")
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = np.where(fps > 0, frames / fps, 0.0)
    quantities = {
        "seconds": seconds,
        "frames": frames,
        "fps": fps,
        "short side": np.minimum(column("width"), column("height")),
        "aspect": column("width") / np.maximum(column("height"), 1),
        "KiB": column("size") / 1024,
    }
    quantiles = {name: np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).tolist() for name, values in quantities.items()}
    labels = column("label").astype(int)
    counts = {name: int((labels == number).sum()) for number, name in enumerate(manifest.classes)}
    if (labels < 0).any():
        counts["(none)"] = int((labels < 0).sum())

    folder = Path(out or ".")
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(2, 4, figsize=(14, 6), constrained_layout=True)
    for axis, (name, values) in zip(axes.flat, quantities.items(), strict=False):
        axis.hist(values, bins=30, color="#4878a8")
        axis.set(title=name, ylabel="samples")
    axes.flat[6].bar(range(len(counts)), sorted(counts.values(), reverse=True), color="#4878a8")
    axes.flat[6].set(title="samples by class, sorted", xlabel="class")
    axes.flat[7].bar(list(manifest.splits), list(manifest.splits.values()), color="#4878a8")
    axes.flat[7].set(title="samples by split")
    histogram, sheet = folder / "stats.png", folder / "sheet.png"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    pyplot.close(figure)
    write_file(str(histogram), buffer.getvalue())
    write_file(str(sheet), _contact_sheet(manifest, splits, pictures))
    return StatsResult(quantiles, counts, histogram, sheet)


def _contact_sheet(manifest: Manifest, splits: list[str], pictures: int) -> bytes:
    """Middle frames of samples spread evenly over the splits, each with its class below; PNG bytes."""
    from PIL import Image

    from diffmae_video.rendering.sheet import captioned_grid

    places = [(name, index) for name in splits for index in range(manifest.splits[name])]
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, min(pictures, len(places))).round().astype(int)]
    shown: list[np.ndarray | None] = []
    captions = []
    with ShardReader(manifest) as reader:
        for name, index in chosen:
            sample = reader.read(name, index)
            try:
                if sample.suffix in MEDIA_SUFFIXES["image"]:
                    frame = read_image(sample.data)
                else:
                    middle = int(manifest.samples(name).frames[index]) // 2
                    frame = read_clips(sample.data, [[middle]])[0].frames[0]
                shown.append(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()))
            except DataError:
                shown.append(None)
            title = manifest.classes[sample.label] if 0 <= sample.label < len(manifest.classes) else sample.key
            captions.append(title[:20])
    buffer = io.BytesIO()
    Image.fromarray(captioned_grid(shown, captions)).save(buffer, "PNG")
    return buffer.getvalue()


def print_stats(result: StatsResult, path: str) -> None:
    """Tables of quantiles and classes, and where the pictures are."""
    rows = [[name, *(f"{value:.4g}" for value in values)] for name, values in result.quantiles.items()]
    table(path, ["", "min", "5%", "median", "95%", "max"], rows)
    ranked = sorted(result.classes.items(), key=lambda pair: -pair[1])
    shown = ranked if len(ranked) <= 20 else [*ranked[:10], ("...", ""), *ranked[-10:]]
    table(f"{len(ranked)} classes", ["class", "samples"], [list(pair) for pair in shown])
    say(f"Histograms: {os.fspath(result.histogram)}; contact sheet: {os.fspath(result.sheet)}.")
