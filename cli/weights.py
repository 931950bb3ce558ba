"""`diffmae import` and `diffmae export`: weights from and for other projects."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from diffmae_video.cli.options import CheckpointOption, OverwriteOption


class Source(str, Enum):
    """Projects whose weights can be read."""

    auto = "auto"
    mae = "mae"
    mae_st = "mae_st"
    videomae = "videomae"
    timm = "timm"
    hf_vitmae = "hf-vitmae"
    hf_videomae = "hf-videomae"


class Format(str, Enum):
    """What an export can be."""

    safetensors = "safetensors"
    timm = "timm"
    hf = "hf"
    onnx = "onnx"


class Inflate(str, Enum):
    """How 2-D kernels become 3-D."""

    central = "central"
    mean = "mean"


def import_command(
    source: Annotated[
        Source,
        typer.Argument(
            metavar="SOURCE",
            help="Where it comes from: auto (by its names), mae, mae_st, videomae, timm, hf-vitmae, hf-videomae.",
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help=".safetensors, .pth, .bin, a Hugging Face folder, or hf:user/model or timm:NAME."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder; FILE's name by default.")] = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", min=1, help="Frames of a clip; inflates image weights."),
    ] = None,
    inflate: Annotated[
        Inflate | None, typer.Option("--inflate", help="How image kernels become video kernels; central by default.")
    ] = None,
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="Encoder heads of an unusual width.")] = None,
    decoder_heads: Annotated[
        int | None,
        typer.Option("--decoder-heads", min=1, help="Decoder heads."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="HxW", help="Pixels of its pictures; 224x224 or as told."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="NAME", help="Table of a file with several: model_ema."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help="What its decoder predicts; pixel, norm_pixel, ...",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option("--classes", metavar="FILE", help="Class names, one a line."),
    ] = None,
    allow_partial: Annotated[
        bool,
        typer.Option("--allow-partial", help="Accept tensors that do not fit."),
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn weights of mae, mae_st, VideoMAE, timm or Hugging Face into a model folder. Nothing in FILE is run."""
    from diffmae_video.pipelines.weights import import_file

    import_file(
        source.value,
        file,
        out=out,
        overwrite=overwrite,
        frames=frames,
        inflate=None if inflate is None else inflate.value,
        heads=heads,
        decoder_heads=decoder_heads,
        size=size,
        key=key,
        target=target,
        classes=classes,
        allow_partial=allow_partial,
    )


def export_command(
    checkpoint: CheckpointOption = None,
    form: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.safetensors,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder; export-FORMAT by default."),
    ] = None,
    licence: Annotated[str, typer.Option("--licence", help="Licence named on the model card.")] = "unknown",
    overwrite: OverwriteOption = False,
) -> None:
    """Write a model for others, with a model card: safetensors, timm, Hugging Face or ONNX."""
    from diffmae_video.pipelines.weights import export

    export(checkpoint, form.value, out=out, licence=licence, overwrite=overwrite)


COMMANDS = {"import": import_command, "export": export_command}
