"""`diffmae shard`, `verify`, `index`, `stats`: prepare and examine data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffmae_video.cli.options import DryRunOption, OverwriteOption, names_of

_Shards = Annotated[str, typer.Argument(metavar="SHARDS", help="Folder or URL of shards.")]


def shard(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, URL, or a CSV/TSV of path,label,split.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL for the shards.")],
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Name or TOML file of the data set; guessed."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            help=f"How the source is arranged: {', '.join(names_of('layouts'))}; guessed.",
        ),
    ] = None,
    image: Annotated[bool, typer.Option("--image", help="Images, not videos; guessed.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Keep the bytes instead of re-encoding.")] = False,
    trim: Annotated[bool, typer.Option("--trim", help="Cut annotated spans out of longer videos.")] = False,
    short_side: Annotated[int, typer.Option("--short-side", min=2, help="Pixels; never scaled up.")] = 256,
    fps: Annotated[
        float | None,
        typer.Option("--fps", min=0.1, max=1000, help="Frame rate; kept by default."),
    ] = None,
    crf: Annotated[int, typer.Option("--crf", min=0, max=51, help="H.264 quality.")] = 23,
    preset: Annotated[str, typer.Option("--preset", help="x264 preset.")] = "veryfast",
    gop: Annotated[int, typer.Option("--gop", min=1, help="Frames between key frames.")] = 16,
    b_frames: Annotated[int, typer.Option("--b-frames", min=0, max=15, help="Droppable frames in a row.")] = 3,
    fold: Annotated[int, typer.Option("--fold", min=1, max=3, help="Official split of UCF101, HMDB51.")] = 1,
    val_fraction: Annotated[
        float,
        typer.Option(
            "--val-fraction",
            min=0.0,
            max=0.9,
            help="Videos held out as val where the source names no split.",
        ),
    ] = 0.1,
    min_frames: Annotated[int, typer.Option("--min-frames", min=1, help="Shorter videos are rejected.")] = 1,
    samples_per_shard: Annotated[int | None, typer.Option("--samples-per-shard", min=1, help="At most.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes; one a core.")] = None,
    dask: Annotated[str | None, typer.Option("--dask", metavar="ADDRESS", help="Dask scheduler to use.")] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="Time that reading one input may take.")
    ] = 300.0,
    memory: Annotated[
        float, typer.Option("--memory", min=0.5, metavar="GIB", help="Memory that reading one input may take.")
    ] = 6.0,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="NAME=NUMBER",
            help="Another bound on an input: pixels, frames, seconds, bytes, aspect.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Turn a folder of clips or images into shards. Example: diffmae shard kinetics/ shards/"""
    from diffmae_video.data.transcode import TranscodeOptions
    from diffmae_video.pipelines.shard import ShardJob, parse_limits, shard_and_record

    options = TranscodeOptions(
        copy=copy,
        trim=trim,
        short_side=short_side,
        fps=fps,
        crf=crf,
        preset=preset,
        gop=gop,
        b_frames=b_frames,
        min_frames=min_frames,
        limits=parse_limits(limit or ()),
    )
    job = ShardJob(
        source,
        out,
        options,
        kind="image" if image else "auto",
        dataset=dataset,
        layout=layout,
        fold=fold,
        val_fraction=val_fraction,
        samples_per_shard=samples_per_shard,
        workers=workers,
        dask=dask,
        timeout=timeout,
        memory=int(memory * 2**30),
        overwrite=overwrite,
        dry_run=dry_run,
    )
    shard_and_record(job)


def verify(
    shards: _Shards,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every sample.")] = False,
) -> None:
    """Check shards against their manifest; damage ends with code 3."""
    from diffmae_video.errors import DataError
    from diffmae_video.pipelines.console import say
    from diffmae_video.pipelines.verify import verify as check

    result = check(shards, decode=decode)
    for problem in result.problems:
        say(problem)
    if result.problems:
        raise DataError(f"{shards} has {len(result.problems)} problems, listed above; make those shards again.")
    say(f"{result.shards} shards with {result.samples} samples are whole.")


def index(
    shards: _Shards,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Its name.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of all shards; by name otherwise.")] = None,
) -> None:
    """Make a manifest for tars that something else wrote."""
    from diffmae_video.data.manifest import Manifest
    from diffmae_video.pipelines.console import say
    from diffmae_video.pipelines.index import index as make
    from diffmae_video.pipelines.workspace import Workspace

    result = make(shards, dataset=dataset, split=split)
    manifest = Manifest.load(shards)
    Workspace.here().record("shards", shards, dataset=manifest.dataset, media=manifest.kind)
    lost = ", ".join(f"{count} {reason}" for reason, count in result.rejected.items())
    say(f"Indexed {result.indexed} samples in {result.shards} shards{f'; rejected: {lost}' if lost else ''}.")


def stats(
    shards: _Shards,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("."),
    split: Annotated[str | None, typer.Option("--split", help="One split only.")] = None,
) -> None:
    """Durations, sizes, rates and classes as tables and pictures."""
    from diffmae_video.pipelines.stats import print_stats
    from diffmae_video.pipelines.stats import stats as summarise

    print_stats(summarise(shards, out, split=split), shards)


COMMANDS = {"shard": shard, "verify": verify, "index": index, "stats": stats}
