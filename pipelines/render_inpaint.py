"""`diffmae render-inpaint`: fill the hidden part of a clip and show what was done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from diffmae_video.config import RenderSettings, load_settings
from diffmae_video.config.fit_text import read_fit_length
from diffmae_video.data.media import read_head
from diffmae_video.errors import UsageError
from diffmae_video.mask_text import MaskRequest, is_generated
from diffmae_video.pipelines.find import Fill, find_inpainter, is_fitted
from diffmae_video.pipelines.job import Job

if TYPE_CHECKING:
    from diffmae_video.pipelines.render_report import RenderResult


def render(
    job: Job,
    clip: Path | str,
    mask: MaskRequest = MaskRequest(),
    *,
    options: Mapping[str, Any] | None = None,
    lossless: bool = False,
    fps: float | None = None,
) -> RenderResult | None:
    """Inpaint a video, an image or a folder of frames, and write the result beside pictures and figures.

    Args:
        job: its recipe names the `render` settings (those saved with the run without it), its checkpoint a pre-training
            run. Without one, what no other frame shows is filled by a small model that is trained on what is visible
            of the clip (`render.fit`). An unfinished render of the same is continued.
        clip: video, image, or folder of images.
        mask: what to hide, `MaskRequest(("center",))`; the recipe's `render.mask` without it.
        options: single fields of the render settings, which win over all others; None values count as absent.
        lossless: FFV1 output (PNG for an image), bit-equal outside the mask.
        fps: frame rate of a folder of images, 24 by default; nothing else takes it.

    Returns:
        What was made and measured; None for a dry run.

    Raises:
        UsageError: no model where one is needed, a mask that does not fit, an output folder in use.
        DataError: a clip that cannot be read, weights that are damaged.
        Stopped: a signal ended it; the same call continues.
    """
    job.resume_auto_or_never()
    fill = _asked(job, mask, options or {})
    if mask.sam is not None and not mask.follow:
        raise UsageError(f"--sam {mask.sam} follows a marked object: add --follow, and --mask PICTURE@FRAME.")
    find_inpainter(job.checkpoint, fill)  # before anything heavy is imported
    if not Path(clip).is_dir():
        read_head(clip)  # raises where there is no such file, or no plain one
    chosen = mask.texts or mask.track or job.recipe != "auto" or job.override("render.mask") is not None
    if not chosen and is_fitted(job.checkpoint, fill):
        raise UsageError(
            "Nothing says what should go: give --mask object.png or --mask box:40%,30%,15%,25%; to see what a model "
            "makes of hidden places, --mask random:0.75."
        )

    from diffmae_video.pipelines.render_pass import plan_render, run_render

    with plan_render(job, clip, mask, fill, options={**(options or {}), "lossless": lossless}, fps=fps) as plan:
        return None if job.dry_run else run_render(job, plan)


def _asked(job: Job, mask: MaskRequest, options: Mapping[str, Any]) -> Fill:
    """What a job says of the ways to fill, before a model is chosen.

    Args:
        options: `propagate` and `fit` among them win over recipe and overrides.

    Raises:
        UsageError: an unknown recipe, setting or choice.
    """
    propagate, fit = options.get("propagate"), options.get("fit")
    asked = load_settings(None if job.recipe == "auto" else job.recipe, "render", job.overrides).render
    choices = get_args(RenderSettings.model_fields["propagate"].annotation)
    if propagate is not None and propagate not in choices:
        raise UsageError(f"--propagate {propagate}: choose {', '.join(choices[:-1])} or {choices[-1]}.")
    try:
        read_fit_length(fit or "auto")
    except ValueError as error:
        raise UsageError(f"--fit {fit}: {error}.") from error
    generated = mask.generated if mask.texts or mask.track else is_generated(asked.mask)
    return Fill(propagate or asked.propagate, generated, fit or asked.fit, asked.fit_recipe)
