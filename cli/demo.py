"""`diffmae demo-data` and `diffmae demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffmae_video.cli.options import Device, DeviceOption, SeedOption


def demo_data(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the clips.")],
    train: Annotated[int, typer.Option("--train", help="Clips to train on.")] = 4000,
    val: Annotated[int, typer.Option("--val", help="Clips to validate on.")] = 800,
    size: Annotated[int, typer.Option("--size", help="Height and width, pixels, even.")] = 32,
    frames: Annotated[int, typer.Option("--frames", help="Frames of each clip.")] = 20,
    fps: Annotated[int, typer.Option("--fps", help="Frames a second.")] = 10,
    seed: SeedOption = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes; all cores by default.")] = None,
) -> None:
    """Write the embedded data set: H.264 clips in Kinetics layout whose class is the motion of an object."""
    from diffmae_video.pipelines.demo import demo_data as write

    write(directory, train=train, val=val, size=size, frames=frames, fps=fps, seed=seed or 0, workers=workers)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything it makes.")] = Path("demo"),
    recipe: Annotated[
        str,
        typer.Option("--recipe", metavar="demo|smoke|PATH", help="Settings of all stages."),
    ] = "demo",
    seed: SeedOption = None,
    device: DeviceOption = Device.auto,
) -> None:
    """See it whole: make clips, shard, pre-train, fine-tune, evaluate, inpaint; ends with a report of what it proved.

    Stopped halfway, the same command continues.
    """
    from diffmae_video.pipelines.demo import demo as run

    run(out, recipe=recipe, seed=seed, device=device.value)


COMMANDS = {"demo": demo, "demo-data": demo_data}
