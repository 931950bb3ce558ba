"""The model that inpaints: found, loaded, and checked before any work is done."""

from __future__ import annotations

from diffmae_video.config import Settings
from diffmae_video.errors import UsageError
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.pipelines.classifiers import Loaded, load
from diffmae_video.pipelines.console import say
from diffmae_video.pipelines.find import find_run
from diffmae_video.pipelines.job import Job
from diffmae_video.training.hardware import pick_device


def load_inpainter(job: Job) -> tuple[str, DiffMAE, Loaded]:
    """The job's pre-training run (the workspace's newest without a checkpoint) and its model; says which.

    Raises:
        UsageError: no model is there, or it cannot inpaint.
        DataError: its weights are damaged.
    """
    source, which = find_run("pretrain", job.checkpoint)
    say(which)
    loaded = load(source, pick_device(job.device), job.overrides, job.seed)
    if not isinstance(loaded.model, DiffMAE):
        raise UsageError(f"{source} is a classifier, which cannot inpaint; give a pre-training run as --checkpoint.")
    return source, loaded.model, loaded


def check_steps(settings: Settings) -> None:
    """Refuse more denoising steps than the model has timesteps. Raises UsageError."""
    steps, timesteps = settings.render.steps, settings.diffusion.timesteps
    if steps > timesteps:
        raise UsageError(f"{steps} steps are more than the {timesteps} timesteps of the model; take at most so many.")
