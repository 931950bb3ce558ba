"""`diffmae eval --task inpaint`: score inpainting over a data set, beside the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffmae_video.errors import UsageError
from diffmae_video.pipelines.find import find_run
from diffmae_video.pipelines.job import Job

if TYPE_CHECKING:
    from diffmae_video.pipelines.inpaint_report import InpaintingEvaluation


def evaluate_inpainting(
    job: Job, *, masks: str | Sequence[str] | None = None, deep: bool = True
) -> InpaintingEvaluation | None:
    """Inpaint clips of a split under each mask and compare with the source, beside one step and the baselines.

    Args:
        job: its checkpoint is a pre-training run; overrides such as `evaluate.clips`, `evaluate.samples`,
            `render.steps` count.
        masks: masks over the token grid, as a list or a text with commas; `evaluate.masks` without it.
        deep: also measure feature, Frechet and LPIPS distances; without them no network but the model runs.

    Returns:
        What was measured, beside pictures and report.html in the run's folder; None for a dry run.

    Raises:
        UsageError: no model, no data, an unknown mask, or, with `deep`, no feature network.
    """
    job.resume_auto_or_never()
    if job.nproc > 1:
        raise UsageError(f"--nproc {job.nproc}: inpainting is evaluated in one process; leave it out.")
    find_run("pretrain", job.checkpoint)  # before anything heavy is imported

    from diffmae_video.pipelines.inpaint_pass import measure_inpainting

    return measure_inpainting(job, masks, deep)
