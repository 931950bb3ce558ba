"""`diffmae eval --task propagate`: objects followed by the frozen encoder over a folder in DAVIS layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmae_video.errors import UsageError
from diffmae_video.pipelines.find import find_run
from diffmae_video.pipelines.job import Job


@dataclass(frozen=True)
class PropagationEvaluation:
    """What was measured; all scores are fractions."""

    directory: Path
    j: float
    """Overlap of regions, mean over objects."""
    f: float
    """Agreement of contours, mean over objects."""
    objects: dict[str, tuple[float, float]]
    """`VIDEO/OBJECT` -> (J, F)."""
    report: dict[str, Any]
    """What eval.json holds."""

    @property
    def j_and_f(self) -> float:
        """The measure by which results are ordered: the mean of both."""
        return (self.j + self.f) / 2


def evaluate_propagation(job: Job) -> PropagationEvaluation | None:
    """Follow the objects of each video's first frame and compare with the masks of the others.

    Args:
        job: `checkpoint` names any run or weights of ours, the workspace's newest pre-training by default; `data` a
            folder in DAVIS layout (`JPEGImages/480p`, `Annotations/480p`, `ImageSets/2017/val.txt`); `overrides` the
            settings of the protocol, `evaluate.propagate`.

    Returns:
        J, F and their mean, beside masks as PNGs, pictures and report.html in the run's folder; None for a dry run.

    Raises:
        UsageError: no model, no data, or more than one process.
        DataError: files that are missing or not what they should be.
    """
    job.resume_auto_or_never()
    if job.nproc > 1:
        raise UsageError(f"--nproc {job.nproc}: objects are followed in one process; leave it out.")
    if job.data is None:
        raise UsageError("--task propagate needs --data: the folder of DAVIS, which holds JPEGImages and Annotations.")
    find_run("pretrain", job.checkpoint)  # before anything heavy is imported

    from diffmae_video.pipelines.propagation_pass import follow_objects

    return follow_objects(job)
