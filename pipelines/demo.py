"""`diffmae demo-data` and `diffmae demo`: the embedded data set, and the whole chain on it with a proof at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffmae_video.pipelines import console

if TYPE_CHECKING:
    from diffmae_video.data.synthetic import DemoData


def demo_data(
    directory: Path,
    *,
    train: int = 4000,
    val: int = 800,
    size: int = 32,
    frames: int = 20,
    fps: int = 10,
    seed: int = 0,
    workers: int | None = None,
) -> DemoData:
    """Write the embedded data set into a new folder and say what is there; see `write_demo_data` for the arguments.

    Raises:
        UsageError: the folder holds something, or a number is out of range.
    """
    from diffmae_video.data.synthetic import CLASSES, write_demo_data

    with console.progress(train + val, "demo-data", "clips") as line:
        result = write_demo_data(
            directory,
            train=train,
            val=val,
            size=size,
            frames=frames,
            fps=fps,
            seed=seed,
            workers=workers,
            progress=line.update,
        )
    counts = ", ".join(f"{count} {split}" for split, count in result.counts.items())
    console.say(f"Wrote {counts} clips of {len(CLASSES)} classes to {directory} ({result.bytes / 1e6:.1f} MB).")
    return result
