"""What a stage takes: shards, a run, weights to start from; named by the user or found in the workspace.

Nothing heavy is imported here: that nothing is known is said at once.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from diffmae_video.config.fit_text import FitLength, read_fit_length
from diffmae_video.data.datasets import dataset_names
from diffmae_video.errors import UsageError
from diffmae_video.models.hub import is_hub_name, local_weights, model_folder
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.workspace import Workspace


def find_run(kind: str, given: str | Path | None, task: str | None = None) -> tuple[str, str]:
    """The run or weights a stage takes, and the line that says which.

    Args:
        kind: `finetune` or `pretrain`, what the workspace is asked for.
        given: `--checkpoint`, a path or a hub name (`models.hub`); the workspace's newest without it.

    Raises:
        UsageError: nothing is there.
        StorageError, DataError: a hub does not answer, or has nothing that can be read.
    """
    if given is not None:
        if is_hub_name(given):
            return str(model_folder(str(given))), f"Checkpoint: {given} (--checkpoint)."
        if not Path(given).exists():
            raise UsageError(f"--checkpoint {given}: there is no such file or folder; give a run or its weights.")
        return str(given), f"Checkpoint: {given} (--checkpoint)."
    entry = Workspace.here().require(kind, "--checkpoint", **({"task": task} if task else {}))
    what = {"finetune": "fine-tuning", "pretrain": "pre-training"}[kind]
    return entry.path, f"Checkpoint: {entry.path} (the newest {what}{f' for {task}' if task else ''})."


@dataclass(frozen=True)
class Fill:
    """How the hidden part of a clip is to be filled."""

    propagate: str = "auto"
    """`render.propagate`."""
    generated: bool = False
    """The mask is drawn by a masker, which shows a model and removes nothing (`mask_text.is_generated`)."""
    fit: str = "auto"
    """`render.fit`."""
    fit_recipe: str = "fit-clip"
    """`render.fit_recipe`."""

    @property
    def fit_length(self) -> FitLength | None:
        """How long a model of the clip is trained; None for `off`, and for `auto`, where the device says."""
        return read_fit_length(self.fit)

    @property
    def looks_elsewhere(self) -> bool:
        """Whether what other frames show is taken from there."""
        return self.propagate == "only" or (self.propagate == "auto" and not self.generated)


def find_inpainter(given: str | Path | None, fill: Fill) -> tuple[str, str] | None:
    """The run that inpaints (see `find_run`), or None where what no other frame shows is filled without a model.

    Args:
        given: `--checkpoint`; the workspace's newest pre-training without it.
        fill: with `only` no model is asked; with `auto` one is not needed, save for a generated mask. A model that is
            fitted to the clip starts from the one that is given, if any.

    Raises:
        UsageError: a model is needed and none is there, or one is given that would not be asked.
        StorageError, DataError: a hub does not answer, or has nothing that can be read.
    """
    if fill.propagate == "only":
        if given is not None:
            raise UsageError("--propagate only asks no model: leave --checkpoint away, or take --propagate auto.")
        if fill.fit_length is not None:
            raise UsageError("--propagate only asks no model: leave --fit away, or take --propagate auto.")
        return None
    if is_fitted(given, fill):
        return None if given is None else find_run("pretrain", given)
    if given is None and Workspace.here().latest("pretrain") is None:
        if fill.propagate == "auto" and not fill.generated:
            return None
        raise UsageError(
            f"No pretrain result is known in {Workspace.here().folder}: run `diffmae pretrain --video` first or give "
            "--checkpoint; a mask that shows what should go (--mask object.png) needs no model, and --fit auto trains "
            "one on the clip."
        )
    return find_run("pretrain", given)


def is_fitted(given: str | Path | None, fill: Fill) -> bool:
    """Whether a model is trained on the clip itself: where that was asked for, or no other is known or named."""
    if fill.propagate == "only" or fill.fit == "off":
        return False
    return fill.fit_length is not None or (given is None and Workspace.here().latest("pretrain") is None)


def find_init(init: str) -> tuple[str | None, str]:
    """The weights a fine-tuning starts from (None: from scratch), and the line that says which.

    Args:
        init: `auto`, `scratch`, a path or a hub name.

    Raises:
        UsageError: nothing is there.
        StorageError, DataError: a hub does not answer, or has nothing that can be read.
    """
    if init == "scratch":
        return None, "Weights: from scratch (--init scratch)."
    if is_hub_name(init):
        return str(model_folder(init)), f"Weights: {init} (--init)."
    if init != "auto":
        if not Path(init).exists():
            raise UsageError(f"--init {init}: there is no such run; give a folder, `scratch` or `auto`.")
        return init, f"Weights: {init} (--init)."
    entry = Workspace.here().latest("pretrain")
    if entry is None:
        raise UsageError(
            f"No pre-training is known in {Workspace.here().folder}: run `diffmae pretrain --video` first, or give "
            "--init PATH or --init scratch."
        )
    return entry.path, f"Weights: {entry.path} (the newest pre-training)."


def find_first_weights(init: str) -> str | None:
    """The weights a pre-training starts from, ours or another project's; None from scratch.

    Args:
        init: `scratch`, a path or a hub name.

    Raises:
        UsageError: nothing is there.
        StorageError, DataError: a hub does not answer, or has nothing that can be read.
    """
    if init == "scratch":
        return None
    if is_hub_name(init):
        return str(local_weights(init))
    if not Path(init).exists():
        raise UsageError(
            f"--init {init}: there is no such file or folder; give a run, another project's weights, or a name on a "
            "hub (hf:user/model, timm:NAME)."
        )
    return init


def find_task_shards(job: Job, task: str, configured: str | None = None) -> tuple[str, str]:
    """Path or URL of the shards of a task, and where it comes from: `--data`, `data.path` or the line that says.

    Args:
        task: data set name, as `diffmae shard` recorded it.
        configured: `data.path` of the recipe.

    Raises:
        UsageError: an unknown task, or none of its shards are known.
    """
    if job.data is not None:
        return job.data, "--data"
    configured = job.override("data.path") or configured
    if configured is not None:
        return configured, "data.path"
    workspace = Workspace.here()
    entry = workspace.latest("shards", dataset=task)
    if entry is None:
        raise UsageError(_unknown(task, workspace))
    return entry.path, f"the newest shards of {task} in {workspace.folder}"


def _unknown(task: str, workspace: Workspace) -> str:
    names = (entry.facts.get("dataset") for entry in workspace.entries() if entry.kind == "shards")
    sharded = {str(name) for name in names if name is not None}
    if task in dataset_names():
        return (
            f"--task {task}: no shards of it are known in {workspace.folder}; make them with `diffmae shard SRC OUT`, "
            "or give --data."
        )
    known = sorted(sharded | set(dataset_names()))
    near = difflib.get_close_matches(task, known, n=1, cutoff=0.0)
    return (
        f"--task {task}: no such data set is known or sharded here (did you mean {near[0]}?); name one or give --data."
    )
