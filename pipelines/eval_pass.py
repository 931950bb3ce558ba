"""The work of `diffmae eval`: what is computed, the pass over the videos, and the scores that come of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffmae_video._version import __version__
from diffmae_video.data.manifest import Manifest
from diffmae_video.errors import DataError, Stopped
from diffmae_video.evaluation.classify import SplitViews, run_pass, videos_per_block
from diffmae_video.evaluation.metrics import ClassificationScores, classification_scores
from diffmae_video.evaluation.predictions import Predictions
from diffmae_video.evaluation.records import PassStore
from diffmae_video.evaluation.views import parse_views
from diffmae_video.pipelines import console
from diffmae_video.pipelines.classifiers import Loaded
from diffmae_video.pipelines.eval_report import write_evaluation
from diffmae_video.pipelines.evaluate import EvaluateResult
from diffmae_video.pipelines.run import RunFolder
from diffmae_video.pipelines.tasks import check_classes, default_views, view_settings
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.signals import stop_on_signal


@dataclass(frozen=True)
class EvaluationPlan:
    """What an evaluation will compute."""

    source: str
    loaded: Loaded
    manifest: Manifest
    dataset: SplitViews  # the labelled videos of the split
    facts: dict[str, Any]  # everything that decides a video's probabilities

    @property
    def fingerprint(self) -> str:
        """A digest of the facts: what an unfinished evaluation must share to be continued."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True, default=str).encode()).hexdigest()


def plan_evaluation(
    source: str, loaded: Loaded, manifest: Manifest, views: str | None, processes: Distributed
) -> EvaluationPlan:
    """Decide what is computed, saying so.

    Args:
        loaded: the model of `source`, one that classifies.

    Raises:
        DataError: labels that do not fit the classifier, or a split without labels.
    """
    settings = loaded.settings
    check_classes(source, loaded, manifest)
    split = manifest.held_out(settings.data.eval_split)
    labels = manifest.samples(split, "data.eval_split").label
    samples = [index for index in range(len(labels)) if labels[index] >= 0]
    if not samples:
        raise DataError(f"Split {split} of {manifest.root} has no labelled sample; choose one with data.eval_split.")
    protocols = parse_views(views or settings.evaluate.views or default_views(manifest))
    spec = view_settings(loaded, protocols, manifest.dataset, image=manifest.kind == "image")
    facts = {
        "version": __version__,
        "weights": loaded.weights_sha256,
        "data": manifest.hash,
        "split": split,
        "views": asdict(spec),
        "batch_views": settings.evaluate.batch_views,
        "model": settings.model.model_dump(mode="json"),
        "precision": loaded.precision,
        "device": processes.device.type,
        **({"draws": settings.evaluate.draws, "mask": settings.mask.model_dump()} if loaded.denoises else {}),
    }
    names, size = ",".join(map(str, protocols)), "x".join(map(str, settings.model.size))
    console.say(
        f"Views: {names} of {spec.frames} frames, {spec.timing}, {size} pixels; {len(samples)} videos "
        f"of {split}; {loaded.precision} on {processes.device.type}, {processes.world} "
        f"process{'es' if processes.world > 1 else ''}."
    )
    if loaded.denoises:
        count = settings.evaluate.draws * len(loaded.classes)
        console.say(f"Protocol: denoise, {count} denoisings a view ({len(loaded.classes)} labels x draws).")
    block = videos_per_block(protocols, settings.evaluate.batch_views)
    data = settings.data
    dataset = SplitViews(manifest, split, spec, samples, block, data.cache_dir, data.cache_gib)
    return EvaluationPlan(source, loaded, manifest, dataset, facts)


def classify_split(plan: EvaluationPlan, run: RunFolder) -> PassStore:
    """Classify this rank's share of the videos, each kept as it is done. A collective.

    Raises:
        Stopped: a signal came; what is done is kept.
    """
    processes, settings, dataset = run.processes or Distributed(), plan.loaded.settings, plan.dataset
    if run.main and run.resume == "never":
        PassStore(run.directory, plan.fingerprint, processes.rank).remove()
    processes.barrier()
    store = PassStore(run.directory, plan.fingerprint, processes.rank)
    mine = range(processes.rank, len(dataset), processes.world)
    before = sum(len(dataset.blocks[block]) for block in store.done().intersection(mine))
    if before:
        console.say(f"Continuing {run.directory}: {before} videos are done.")
    count = sum(len(dataset.blocks[block]) for block in mine)
    with stop_on_signal() as stop, console.progress(count, "eval", "videos") as bar:
        bar.update(before)

        def advance(videos: int, failed: int) -> None:
            bar.update(videos)
            if stop:
                store.flush()
                raise Stopped(f"Stopped by {stop.name}; run the same command again to continue {run.directory}.")

        run_pass(
            plan.loaded.probabilities,
            dataset,
            store,
            batch_views=settings.evaluate.batch_views,
            device=processes.device,
            workers=settings.data.workers,
            rank=processes.rank,
            world=processes.world,
            advance=advance,
        )
    processes.barrier()
    return store


def conclude(plan: EvaluationPlan, store: PassStore, directory: Path) -> EvaluateResult:
    """Collect what all processes found, score it, write the files.

    Raises:
        DataError: more unreadable videos than data.max_bad_fraction allows.
    """
    settings, manifest, dataset, split = plan.loaded.settings, plan.manifest, plan.dataset, plan.facts["split"]
    rows = len(manifest.samples(split).label)
    samples, failed, seconds = store.summary()
    found = sum(len(block) for block in dataset.blocks)
    if len(samples) + len(failed) != found:
        raise RuntimeError(f"{found} videos were to be evaluated, {len(samples) + len(failed)} were")
    table = manifest.samples(split)
    reasons = {table.key(index): failed[index] for index in sorted(failed)}
    if len(failed) > settings.data.max_bad_fraction * found or len(samples) == 0:
        key, reason = next(iter(reasons.items()))
        raise DataError(
            f"{len(failed)} of {found} videos cannot be read, more than data.max_bad_fraction allows; the first is "
            f"{key} ({reason.rstrip('.')}); repair the shards or raise data.max_bad_fraction: what is done is kept."
        )
    labels = torch.tensor([int(table.label[index]) for index in samples])
    keys = [table.key(index) for index in samples]
    values = {views: store.collect(views) for views in map(str, dataset.settings.protocols)}
    predictions = Predictions(keys, labels, manifest.classes, values)
    scores = {
        views: classification_scores(values[views], labels, bootstrap=settings.evaluate.bootstrap, seed=settings.seed)
        for views in values
    }
    last = list(scores.values())[-1]
    report = {
        "task": manifest.dataset,
        "dataset": manifest.dataset,
        "split": split,
        "top1": last.top1,
        "top5": last.top5,
        "mean_class_accuracy": last.mean_class_accuracy,
        "views": {views: _numbers(one) for views, one in scores.items()},
        "videos": {"found": rows, "unlabelled": rows - found, "used": len(samples), "failed": len(failed)},
        "failed": reasons,
        "classes": len(manifest.classes),
        "frames": dataset.settings.frames,
        "stride": dataset.settings.stride,
        "clip_seconds": dataset.settings.seconds,
        "protocol": dataset.settings.protocol,
        "classified_by": "denoising" if plan.loaded.denoises else "head",
        "timing": dataset.settings.timing,
        "size": list(dataset.settings.size),
        "checkpoint": plan.source,
        "weights_sha256": plan.facts["weights"],
        "data": manifest.root,
        "data_hash": manifest.hash,
        "settings_hash": plan.fingerprint,
        "device": plan.facts["device"],
        "precision": plan.facts["precision"],
        "bootstrap": settings.evaluate.bootstrap,
        "seed": settings.seed,
        "seconds": round(seconds, 3),
        "version": __version__,
    }
    write_evaluation(directory, report, predictions, scores, dataset, settings)
    store.remove()
    return EvaluateResult(
        directory, manifest.dataset, last.top1, last.top5, found, len(samples), reasons, scores, report
    )


def _numbers(scores: ClassificationScores) -> dict[str, Any]:
    names = ("top1", "top5", "top5_rank", "mean_class_accuracy")
    intervals = {
        name: [interval.low, interval.high] if interval else None
        for name, interval in (("top1_interval", scores.top1_interval), ("top5_interval", scores.top5_interval))
    }
    return {name: getattr(scores, name) for name in names} | intervals
