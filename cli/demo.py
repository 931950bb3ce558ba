"""`diffmae demo-data` and `diffmae demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffmae_video.cli.options import Device, DeviceOption, SeedOption


def demo_data(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the clips.")],
    train: Annotated[int, typer.Option("--train", envvar="DIFFMAE_TRAIN", help="Clips to train on.")] = 4000,
    val: Annotated[int, typer.Option("--val", envvar="DIFFMAE_VAL", help="Clips to validate on.")] = 800,
    size: Annotated[int, typer.Option("--size", envvar="DIFFMAE_SIZE", help="Height and width, pixels, even.")] = 32,
    frames: Annotated[int, typer.Option("--frames", envvar="DIFFMAE_FRAMES", help="Frames of each clip.")] = 20,
    fps: Annotated[int, typer.Option("--fps", envvar="DIFFMAE_FPS", help="Frames a second.")] = 10,
    seed: SeedOption = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, envvar="DIFFMAE_WORKERS", help="Processes; all cores by default.")
    ] = None,
) -> None:
    """Write the embedded data set: H.264 clips in Kinetics layout whose class is the motion of an object."""
    from diffmae_video.pipelines.demo import demo_data as write

    write(directory, train=train, val=val, size=size, frames=frames, fps=fps, seed=seed or 0, workers=workers)


def demo(
    out: Annotated[Path, typer.Option("--out", envvar="DIFFMAE_OUT", help="Folder for everything it makes.")] = Path(
        "demo"
    ),
    recipe: Annotated[
        str,
        typer.Option("--recipe", metavar="demo|smoke|PATH", envvar="DIFFMAE_RECIPE", help="Settings of all stages."),
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
