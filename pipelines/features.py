"""`diffmae features`: one pass of a frozen encoder over a data set, kept on disk for probes and for others to use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffmae_video.pipelines import console
from diffmae_video.pipelines.find import find_run
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.run import launch, launches
from diffmae_video.pipelines.workspace import Workspace


def extract_features(job: Job, splits: Sequence[str] = (), views: str = "1x1", tokens: bool = False) -> list[Path]:
    """Write SPLIT.safetensors (features, labels, samples) and SPLIT.parquet (key, label, class) for each split.

    Args:
        job: `checkpoint` names a pre-training or fine-tuning run, the workspace's newest pre-training by default. `out`
            is a folder named after what is computed, under .diffmae/features, by default; what is there is reused.
        splits: all of the data by default.
        views: views whose features are averaged for each video.
        tokens: keep the tokens (n, N, D) in half precision instead of one pooled vector a video.

    Returns:
        The safetensors files.
    """
    source, line = find_run("pretrain", job.checkpoint)
    path = job.data or Workspace.here().require("shards", "--data").path
    if launches(job):
        return launch(extract_features, job, splits, views, tokens)
    console.say(line)

    from diffmae_video.data.manifest import Manifest
    from diffmae_video.pipelines.classifiers import load
    from diffmae_video.pipelines.feature_pass import FeaturePass
    from diffmae_video.pipelines.tasks import one_protocol, view_settings
    from diffmae_video.training.distributed import start

    manifest = Manifest.load(path)
    splits = list(splits) or list(manifest.splits)
    for split in splits:
        manifest.samples(split, "--split")  # a split that is not there is an error before the work starts
    with start(job.device) as processes:
        loaded = load(source, processes.device, job.overrides, job.seed)
        spec = view_settings(loaded, one_protocol(views), manifest.dataset, image=manifest.kind == "image")
        console.say(
            f"Features of {', '.join(splits)} of {path}, views {spec.protocols[0]} of {spec.frames} frames, "
            f"{spec.timing}, {processes.device.type}."
        )
        if job.dry_run:
            return []
        features = FeaturePass(processes, loaded, manifest, spec, tokens=tokens, folder=job.out)
        found = [features.of_split(split) for split in splits]
        for one in found:
            size = " x ".join(map(str, one.features.shape[1:]))
            console.say(
                f"{one.path}: `features` of {len(one.features)} clips, {size} values each; {len(one.failed)} failed. "
                f"{one.path.with_suffix('.parquet').name} beside it names the rows."
            )
        return [one.path for one in found]
