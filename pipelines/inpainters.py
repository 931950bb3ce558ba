"""The model that inpaints: found, loaded, and checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass

from diffmae_video.config import Settings, load_settings, override_settings, with_overrides
from diffmae_video.errors import UsageError
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.pipelines.classifiers import Loaded, load
from diffmae_video.pipelines.console import say
from diffmae_video.pipelines.find import Fill, find_inpainter, find_run, is_fitted
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


@dataclass(frozen=True)
class Painter:
    """What fills the places that no other frame shows."""

    settings: Settings
    """Those saved with the model, else the defaults; overrides and seed of the job applied."""
    checkpoint: str | None = None
    """Run or weights; None for a classical fill."""
    model: DiffMAE | None = None
    weights_sha256: str = ""
    fitted: bool = False
    """A model of the clip itself is to be made, once it is known what is left to fill; it starts from `checkpoint`."""


def choose_painter(job: Job, fill: Fill) -> Painter:
    """The model that fills what no other frame shows, or none; says which.

    Args:
        fill: what the job says of the ways to fill.

    Raises:
        UsageError: a model is needed and none is there, or it cannot inpaint.
        DataError: its weights are damaged.
    """
    found = find_inpainter(job.checkpoint, fill)
    if is_fitted(job.checkpoint, fill):
        settings = with_overrides(
            load_settings(fill.fit_recipe, "render", job.overrides),
            render={"fit": fill.fit, "fit_recipe": fill.fit_recipe},
        )
        return Painter(override_settings(settings, (), job.seed), None if found is None else found[0], fitted=True)
    if found is not None:
        checkpoint, model, loaded = load_inpainter(job)
        return Painter(loaded.settings, checkpoint, model, loaded.weights_sha256)
    if fill.propagate == "auto":
        say("No model is known here: what no other frame shows is filled smoothly from its edge.")
    recipe = None if job.recipe == "auto" else job.recipe
    return Painter(override_settings(load_settings(recipe, "render", job.overrides), (), job.seed))


def check_steps(settings: Settings) -> None:
    """Refuse more denoising steps than the model has timesteps. Raises UsageError."""
    steps, timesteps = settings.render.steps, settings.diffusion.timesteps
    if steps > timesteps:
        raise UsageError(f"{steps} steps are more than the {timesteps} timesteps of the model; take at most so many.")
