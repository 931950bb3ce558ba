"""Probes: what a frozen encoder knows, from features cached in one pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmae_video.config import settings_toml
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.order import label_subset
from diffmae_video.evaluation.metrics import ClassificationScores, classification_scores
from diffmae_video.evaluation.predictions import FILE, Predictions, write_json, write_predictions
from diffmae_video.evaluation.probes import ITERATIONS, PENALTIES, fit_head, fit_linear, knn_probabilities
from diffmae_video.evaluation.views import Protocol
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.weights import save_model
from diffmae_video.pipelines import console
from diffmae_video.pipelines.classifiers import Loaded
from diffmae_video.pipelines.feature_pass import FeaturePass, Features
from diffmae_video.pipelines.run import RunFolder
from diffmae_video.pipelines.tasks import view_settings
from diffmae_video.training.optim import peak_learning_rate


def probe(run: RunFolder, loaded: Loaded, manifest: Manifest, info: dict[str, Any]) -> dict[str, float]:
    """Probe the encoder of `loaded` by `finetune.protocol` and write the result into the run's folder. A collective.

    The linear and the attentive probe leave a classifier that `diffmae eval` takes; kNN has nothing to keep.

    Args:
        loaded: the initial model with the settings of this run.
        info: facts for model.json.

    Returns:
        val_top1, val_top5 and what the probe chose.
    """
    processes, directory, settings = run.processes, run.directory, loaded.settings
    assert processes is not None
    protocol = settings.finetune.protocol
    spec = view_settings(loaded, (Protocol(1, 1),), manifest.dataset, image=manifest.kind == "image")
    pool = "class" if settings.finetune.pool == "class" else "mean"
    features = FeaturePass(processes, loaded, manifest, spec, tokens=protocol == "attentive", pool=pool)
    labels = manifest.samples(settings.data.split).label
    few = settings.data.label_fraction, settings.data.labels_per_class
    subset = label_subset(labels, *few, settings.seed)
    if subset is None and (labels < 0).any():
        subset = np.flatnonzero(labels >= 0)
    train = features.of_split(settings.data.split, subset)
    held = manifest.samples(settings.data.eval_split).label >= 0
    chosen = None if held.all() else held.nonzero()[0]
    test = features.of_split(settings.data.eval_split, chosen)
    console.say(f"Probe: {len(train.labels)} training and {len(test.labels)} evaluation videos.")
    if not processes.main:
        return processes.broadcast(None)
    directory.mkdir(parents=True, exist_ok=True)
    classifier, facts = None, {}
    if protocol == "knn":
        with console.progress(len(test.labels), "nearest neighbours", "videos") as bar:
            probabilities = knn_probabilities(
                test.features,
                train.features,
                train.labels,
                len(manifest.classes),
                neighbours=settings.finetune.knn,
                advance=bar.update,
            )
    else:
        fit = _linear if protocol == "linear" else _attentive
        classifier, facts = fit(loaded, train, len(manifest.classes))
        with torch.inference_mode():
            probabilities = _head_probabilities(classifier, test.features)
    scores = _write(directory, loaded, manifest, test, probabilities, classifier, info, facts)
    return processes.broadcast({"val_top1": scores.top1, "val_top5": scores.top5, **facts})


def _linear(loaded: Loaded, train: Features, classes: int) -> tuple[Classifier, dict[str, float]]:
    settings = loaded.settings
    with console.progress((len(PENALTIES) + 1) * ITERATIONS, "linear probe", "iterations") as bar:
        fitted = fit_linear(
            train.features,
            train.labels,
            classes,
            seed=settings.seed,
            advance=lambda count, loss: bar.update(count, loss=f"{loss:.3f}"),
        )
    pool = "class" if settings.finetune.pool == "class" else "mean"
    classifier = Classifier(copy.deepcopy(loaded.model.encoder), classes, pool=pool).cpu().eval()
    with torch.no_grad():
        classifier.head.load_state_dict({"weight": fitted.weight, "bias": fitted.bias})
    return classifier, {"penalty": fitted.penalty, "held_out_top1": fitted.held_out_top1}


def _attentive(loaded: Loaded, train: Features, classes: int) -> tuple[Classifier, dict[str, float]]:
    settings = loaded.settings
    encoder = copy.deepcopy(loaded.model.encoder)
    classifier = Classifier(
        encoder,
        classes,
        pool="attentive",
        dropout=settings.finetune.dropout,
        head_init=settings.finetune.head_init,
        seed=settings.seed,
    )
    classifier.requires_grad_(False)
    assert classifier.attention is not None
    trained = [*classifier.attention.parameters(), *classifier.head.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    classifier.to(loaded.device).train()
    batch = min(settings.train.batch_size, len(train.labels))
    epochs = max(1, round(settings.train.epochs))
    if settings.train.steps:
        epochs = max(1, round(settings.train.steps * batch / len(train.labels)))
    with console.progress(epochs * -(-len(train.labels) // batch), "attentive probe", "steps") as bar:
        loss = fit_head(
            classifier.forward_head,
            trained,
            train.features,
            train.labels,
            epochs=epochs,
            batch_size=batch,
            lr=peak_learning_rate(settings.train),
            weight_decay=settings.train.weight_decay,
            seed=settings.seed,
            device=str(loaded.device),
            advance=lambda value: bar.update(1, loss=f"{value:.3f}"),
        )
    return classifier.cpu().eval(), {"train_loss": loss}


def _head_probabilities(classifier: Classifier, features: Tensor) -> Tensor:
    """Softmax (n, K) of the head on cached features: pooled (n, D), or tokens (n, N, D)."""
    rows = []
    for part in features.split(256):
        part = part.float()
        rows.append(classifier.forward_head(part) if part.ndim == 3 else classifier.head(part))
    return torch.cat(rows).softmax(dim=-1)


def _write(
    directory: Path,
    loaded: Loaded,
    manifest: Manifest,
    test: Features,
    probabilities: Tensor,
    classifier: Classifier | None,
    info: dict[str, Any],
    facts: dict[str, float],
) -> ClassificationScores:
    settings = loaded.settings
    scores = classification_scores(
        probabilities, test.labels, bootstrap=settings.evaluate.bootstrap, seed=settings.seed
    )
    keys = [manifest.samples(settings.data.eval_split).key(index) for index in test.samples.tolist()]
    write_predictions(directory / FILE, Predictions(keys, test.labels, manifest.classes, {"1x1": probabilities}))
    (directory / "config.toml").write_text(settings_toml(settings), encoding="utf-8")
    if classifier is not None:
        save_model(classifier, directory, info)
    interval = scores.top1_interval
    report = {
        "protocol": settings.finetune.protocol,
        "task": manifest.dataset,
        "top1": scores.top1,
        "top5": scores.top5,
        "mean_class_accuracy": scores.mean_class_accuracy,
        "top1_interval": [interval.low, interval.high] if interval else None,
        "videos": {"used": scores.videos, "failed": len(test.failed)},
        "failed": test.failed,
        **facts,
    }
    write_json(directory / "probe.json", report)
    rows = [[settings.finetune.protocol, scores.top1 * 100, scores.top5 * 100, scores.mean_class_accuracy * 100]]
    console.table(f"{manifest.dataset}, 1x1 views", ["probe", "top-1 %", "top-5 %", "mean class %"], rows)
    return scores
