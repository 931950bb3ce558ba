"""`diffmae recipes fit`: which recipe, micro-batch and length for these clips, this device and this many hours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffmae_video.config import Settings, load_settings
from diffmae_video.data.manifest import Manifest
from diffmae_video.errors import UsageError
from diffmae_video.pipelines import console
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.plan import ASSUMED_UTILIZATION, Plan, make_plan, measure
from diffmae_video.pipelines.recipes import planned_device
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training.footprint import Footprint
from diffmae_video.training.hardware import parse_memory
from diffmae_video.training.task import largest_batch


@dataclass(frozen=True)
class Candidate:
    """A recipe that may be proposed, what is changed of it, and the number of samples from which it makes sense."""

    recipe: str
    set: tuple[str, ...] = ()
    samples: int = 0


# small sets hold too little for large models, see docs/howto/recipe.md; in ascending order of size
CANDIDATES: dict[str, tuple[Candidate, ...]] = {
    "video": (
        Candidate("video-tiny"),
        Candidate("video-tiny", ("model.preset=small",), 1_000),
        Candidate("video-base", ("model.preset=small",), 5_000),
        Candidate("video-base", (), 20_000),
        Candidate("video-large", (), 100_000),
    ),
    "image": (
        Candidate("image-tiny"),
        Candidate("image-base", (), 20_000),
        Candidate("image-large", (), 100_000),
    ),
}
FEW = 1_000
"""Below so many samples, pre-training on them has not helped recognition (docs/howto/recipe.md)."""
SMALL, LONGEST = 20_000, 3_200
"""Below SMALL samples more passes than the recipe's make sense, up to LONGEST: VideoMAE's number for UCF101."""
SHORTEST = 0.25
"""Of a recipe's own length: a training that is cut shorter gives less than a smaller model that is trained well."""


@dataclass(frozen=True)
class Fitted:
    """A candidate on these data and this device."""

    candidate: Candidate
    settings: Settings
    plan: Plan
    hours: float | None
    """Of the recipe's own length; None where the speed of the device is not known."""
    epochs: float
    """Passes that the hours allow, at most the recipe's own."""
    fits: bool
    """One clip at once fits into the memory."""
    enough: bool
    """The data are as many as such a model wants."""

    batch: int
    """Clips of a step: the recipe's, or as many as the data fill."""

    @property
    def share(self) -> float:
        """Of the recipe's own length."""
        return self.epochs / self.settings.train.epochs

    def words(self, data: str) -> str:
        """The command that trains it."""
        kind = "--image" if self.settings.model.frames == 1 else "--video"
        changes = list(self.candidate.set)
        if self.batch != self.settings.train.batch_size:
            changes.append(f"train.batch_size={self.batch}")
        if self.share < 1:
            changes.append(f"train.epochs={self.epochs:g}")
        texts = "".join(f" --set {text}" for text in changes)
        return f"diffmae pretrain {kind} --data {data} --recipe {self.candidate.recipe}{texts}"


def fit_recipe(
    job: Job,
    hours: float | None = None,
    tflops: float | None = None,
    *,
    candidates: Sequence[Candidate] | None = None,
    measured: Callable[[Settings, int], Footprint] = measure,
) -> tuple[Fitted, list[Fitted]]:
    """Propose how to pre-train on a data set, by the cost that `plan.make_plan` predicts.

    Args:
        job: `data` names shards, the workspace's newest by default; `device` and `device_memory` the device.
        hours: that the training may take; as long as the recipe says without it.
        tflops: peak in bf16 of a device that is not here, TFLOP/s; ASSUMED_UTILIZATION of it is counted.
        candidates: recipes to choose from, in ascending order of size; those of CANDIDATES by default.
        measured: cost of a step, see `plan.make_plan`.

    Returns:
        The proposal, and all candidates: the largest model that fits the memory, for which the data suffice, and that
        can be trained for at least SHORTEST of its recipe's length; the smallest one where there is none.

    Raises:
        UsageError: no data, no such device, or not even the smallest model fits.
    """
    path = job.data or Workspace.here().require("shards", "--data").path
    manifest = Manifest.load(path)
    device = planned_device(job)
    memory = parse_memory(job.device_memory) if job.device_memory else None
    found = []
    tried = candidates or CANDIDATES[manifest.kind]
    with console.progress(len(tried), "recipes fit", "recipes") as bar:
        for candidate in tried:
            settings = load_settings(candidate.recipe, "pretrain", candidate.set)
            samples = manifest.splits.get(settings.data.split, 0)
            if not samples:
                known = ", ".join(manifest.splits) or "none"
                raise UsageError(
                    f"{manifest.root} has no split {settings.data.split} (it has {known}); shard clips for it."
                )
            clips, batch = samples * settings.data.repeats, settings.train.batch_size
            if clips < batch:
                batch = largest_batch(settings, clips, job.nproc) or batch
            size = sum(shard.bytes for shard in manifest.shards if shard.split == settings.data.split)
            plan = make_plan(settings, samples, size, world=job.nproc, device=device, memory=memory, measured=measured)
            took = plan.hours
            if tflops:
                rate = job.nproc * tflops * 1e12 * ASSUMED_UTILIZATION / plan.cost.train_flops
                took = plan.steps * settings.train.batch_size / rate / 3600
            share = min(1.0, hours / took) if hours and took else 1.0
            epochs = settings.train.epochs * share
            found.append(
                Fitted(
                    candidate,
                    settings,
                    plan,
                    took,
                    float(f"{epochs:.2g}") if share < 1 else epochs,
                    plan.micro_batch >= 1 and plan.memory_gib <= plan.given_gib,
                    samples >= candidate.samples,
                    batch,
                )
            )
            bar.update(1)
    able = [one for one in found if one.fits]
    if not able:
        raise UsageError(
            f"Not even {found[0].candidate.recipe} fits into {found[0].plan.given_gib:.1f} GiB; give a device with "
            "more memory, or a recipe of your own with a smaller model.size."
        )
    good = [one for one in able if one.enough and one.share >= SHORTEST]
    return (good or able[:1])[-1], found


def fit_and_print(job: Job, hours: float | None, tflops: float | None) -> None:
    """`recipes fit`: `fit_recipe`, shown."""
    chosen, found = fit_recipe(job, hours, tflops)
    print_fit(chosen, found, job.data or Workspace.here().require("shards", "--data").path, hours)


def print_fit(chosen: Fitted, found: Sequence[Fitted], data: str, hours: float | None) -> None:
    """Show all candidates as a table, and the proposed command."""
    rows: list[list[Any]] = []
    for one in found:
        time = "unknown" if one.hours is None else console.format_seconds(one.hours * 3600)
        why = "proposed" if one is chosen else ""
        if not one.fits:
            why = "too large for the memory"
        elif not one.enough:
            why = f"wants {one.candidate.samples:,} samples"
        elif one.share < SHORTEST and one is not chosen:
            why = f"{hours:g} hours are {one.share:.0%} of its length"
        rows.append(
            [
                " ".join([one.candidate.recipe, *one.candidate.set]),
                f"{one.plan.cost.parameters / 1e6:.1f} M",
                f"{one.plan.memory_gib:.1f} GiB",
                f"{one.plan.micro_batch} of {one.settings.train.batch_size}",
                f"{one.settings.train.epochs:g}",
                time,
                f"{one.epochs:g}",
                why,
            ]
        )
    columns = ["recipe", "parameters", "memory", "clips at once", "its passes", "time for them"]
    columns += [f"passes in {hours:g} h" if hours else "passes", "note"]
    samples = chosen.plan.samples
    console.table(f"Recipes for {data}: {samples:,} samples to train on", columns, rows)
    if chosen.hours is None:
        console.say("The time is unknown for a device that is not here: give --tflops, its peak in bf16.")
    else:
        console.say(
            f"Times assume {ASSUMED_UTILIZATION:.0%} of the peak; measure with a few steps before you trust them."
        )
    if chosen.share < SHORTEST:
        least = math.ceil(SHORTEST * (chosen.hours or 0))
        console.say(f"Note: even this one would want {least} hours or more; what comes of so few passes is little.")
    allowed = LONGEST if hours is None or not chosen.hours else chosen.settings.train.epochs * hours / chosen.hours
    allowed = float(f"{min(allowed, LONGEST):.2g}")
    if hours is not None and samples < SMALL and allowed >= 2 * chosen.epochs:
        console.say(
            f"Note: these hours allow --set train.epochs={allowed:g}; small sets want more passes than the recipe has."
        )
    if samples < FEW:
        console.say(
            f"Note: {samples:,} samples are few for a pre-training of your own: try published weights as well "
            "(diffmae import), and compare by a probe."
        )
    console.say(chosen.words(data))
