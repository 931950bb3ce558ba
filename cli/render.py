"""`diffmae render-inpaint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffmae_video.cli.options import job_of, names_of, shares


@shares("checkpoint", "recipe", "overrides", "out", "seed", "device", "resume:again", "dry_run")
def render_inpaint(
    clip: Annotated[Path, typer.Argument(metavar="CLIP", help="Video, image, or folder of images.")],
    mask: Annotated[
        list[str] | None,
        typer.Option(
            "--mask",
            metavar="MASK",
            help="random:0.75, tube:0.75, block:0.5, center, frames:8-15, future:0.5, box:x,y,w,h[@start-end] in "
            "pixels or percent (frames, or seconds as 1.5s), or a picture, a folder of pictures, a video (what is "
            "not black is hidden), a .npy array of bool (T, H, W), with @start-end too. May be given several times.",
        ),
    ] = None,
    track: Annotated[
        str | None,
        typer.Option(
            "--track",
            metavar="FRAME:x,y,w,h;...",
            help="A box that moves between key frames.",
        ),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Masks mark an object in single frames, PICTURE@FRAME or box:x,y,w,h@FRAME (frame 0 without @); it is "
            "followed through the clip, see mask.mp4.",
        ),
    ] = False,
    sam: Annotated[
        str | None,
        typer.Option(
            "--sam", metavar="PATH|HUB NAME", help="--follow by SAM 2: weights such as hf:facebook/sam2.1-hiera-tiny."
        ),
    ] = None,
    dilate: Annotated[
        int | None,
        typer.Option("--dilate", min=0, max=512, help="Grow masks by pixels; 4 with --follow, else 0 by default."),
    ] = None,
    invert: Annotated[bool, typer.Option("--invert", help="Hide what masks show.")] = False,
    lossless: Annotated[
        bool,
        typer.Option("--lossless", help="FFV1 output, bit-equal outside the mask."),
    ] = False,
    codec: Annotated[str | None, typer.Option("--codec", metavar="h264|ffv1|gif|png", help="Output format.")] = None,
    crf: Annotated[int | None, typer.Option("--crf", min=0, max=51, help="H.264 quality; lower is better.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", metavar="|".join(names_of("samplers")), help="How to denoise."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.")] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="Samples; several give an uncertainty map."),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option("--label", metavar="NAME", help="Class of what is to be seen, of a model trained with labels."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", min=0, max=100, help="How far --label is followed: 1 as in training, 2 by default."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", min=1, help="Source frames between frames of a window."),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option("--window", metavar="auto|whole|tiles", help="Where in the frame the model looks."),
    ] = None,
    propagate: Annotated[
        str | None,
        typer.Option(
            "--propagate",
            metavar="auto|off|only",
            help="Take from other frames what they show; auto does unless the mask is generated, only asks no model.",
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="auto|off|TIME|Nsteps",
            help="Train a small model on what is visible of this clip: auto does for 3 minutes (30 s on a GPU) where "
            "no model is known, a time (90s, 10m) or a number of steps (400steps) always, off never.",
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", min=0.1, max=240, help="Rate of a folder of images; 24 by default.")
    ] = None,
    **options: Any,
) -> None:
    """Remove something from a clip: what other frames show is taken from there, the rest is filled by a model.

    Where no model is known or named, a small one is trained on what is visible of the clip (--fit).

    Example: diffmae render-inpaint clip.mp4 --mask object.png
    """
    from diffmae_video.mask_text import MaskRequest
    from diffmae_video.pipelines import render_inpaint as stage

    fields = {"codec": codec, "crf": crf, "sampler": sampler, "steps": steps, "samples": samples}
    stage.render(
        job_of(options),
        clip,
        MaskRequest(tuple(mask or ()), track, dilate, invert, follow, sam),
        options={
            **fields,
            "label": label,
            "guidance": guidance,
            "stride": stride,
            "window": window,
            "propagate": propagate,
            "fit": fit,
        },
        lossless=lossless,
        fps=fps,
    )


COMMANDS = {"render-inpaint": render_inpaint}
