"""The files of an evaluation: predictions, tables, pictures, and the page that shows them."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffmae_video.config import Settings, settings_toml
from diffmae_video.data.shards import ShardReader
from diffmae_video.evaluation.classify import SplitViews, decode_views
from diffmae_video.evaluation.metrics import ClassificationScores, mistakes
from diffmae_video.evaluation.predictions import FILE, Predictions, write_json, write_predictions
from diffmae_video.evaluation.views import Protocol
from diffmae_video.rendering.figures import confusion_figure
from diffmae_video.rendering.report import Report
from diffmae_video.rendering.sheet import clip_strips
from diffmae_video.rendering.writers import write_png

MOST_CONFIDENT = 8  # mistakes in the picture strip


def write_evaluation(
    directory: Path,
    report: dict[str, Any],
    predictions: Predictions,
    scores: dict[str, ClassificationScores],
    dataset: SplitViews,
    settings: Settings,
) -> None:
    """Write every file of an evaluation; eval.json last, for it says that the others are whole."""
    views, last = list(scores.items())[-1]
    (directory / "config.toml").write_text(settings_toml(settings), encoding="utf-8")
    write_predictions(directory / FILE, predictions)
    rows = _class_rows(last, predictions)
    _write_csv(directory / "classes.csv", rows)
    confusion = confusion_figure(last.confusion, predictions.classes, f"{report['task']}, {views}")
    (directory / "confusion.png").write_bytes(confusion)
    page = Report(f"Evaluation of {report['task']}: {report['top1'] * 100:.2f}% top-1")
    page.text(
        f"Checkpoint `{report['checkpoint']}` on `{report['data']}`, split {report['split']}. Videos: "
        f"{report['videos']['used']} used of {report['videos']['found']} found, {report['videos']['failed']} failed, "
        f"{report['videos']['unlabelled']} without a label.\n\n"
        f"Clips of {report['frames']} frames, {report['timing']}, at {' x '.join(map(str, report['size']))} "
        f"pixels; softmax averaged over the views of a video. {report['precision']} on {report['device']}, "
        f"{report['seconds']:.0f} s. Weights `{report['weights_sha256'][:12]}`, data `{report['data_hash'][:12]}`, "
        f"settings `{report['settings_hash'][:12]}`."
    )
    page.table("Accuracy, %", ["views", "top-1", "95% interval", "top-5", "mean class"], accuracy_rows(scores))
    wrong = mistakes(predictions.probabilities[views], predictions.labels, MOST_CONFIDENT)
    if wrong:
        strip = _mistake_strip(dataset, predictions, views, wrong)
        write_png(directory / "mistakes.png", strip)
        page.image("The most confident mistakes", strip)
    page.image("Confusion", confusion)
    page.table("By class, worst first", ["class", "videos", "top-1 %", "most often taken for"], rows)
    if report["failed"]:
        page.table("Videos that could not be read", ["key", "reason"], list(report["failed"].items()))
    page.settings(settings_toml(settings))
    page.write(directory / "report.html")
    write_json(directory / "eval.json", report)


def accuracy_rows(scores: dict[str, ClassificationScores]) -> list[list[Any]]:
    """One row per protocol: views, top-1, its interval, top-5, mean class accuracy; in percent."""
    return [
        [
            views,
            round(one.top1 * 100, 2),
            f"{one.top1_interval.low * 100:.2f} to {one.top1_interval.high * 100:.2f}" if one.top1_interval else "-",
            round(one.top5 * 100, 2),
            round(one.mean_class_accuracy * 100, 2),
        ]
        for views, one in scores.items()
    ]


def _class_rows(scores: ClassificationScores, predictions: Predictions) -> list[list[Any]]:
    rows = []
    for index, name in enumerate(predictions.classes):
        count = int(scores.support[index])
        if count:
            others = scores.confusion[index].clone()
            others[index] = 0
            confused = predictions.classes[int(others.argmax())] if others.max() else "-"
            rows.append([name, count, round(scores.per_class[index].item() * 100, 2), confused])
    return sorted(rows, key=lambda row: (row[2], row[0]))


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "videos", "top1_percent", "most_often_taken_for"])
        writer.writerows(rows)


def _mistake_strip(dataset: SplitViews, predictions: Predictions, views: str, wrong: list[int]) -> np.ndarray:
    """Pictures of the videos in these rows of the predictions, each with what it is and what it was taken for."""
    table = dataset.manifest.samples(dataset.split)
    wanted = {predictions.keys[row]: row for row in wrong}
    places = {table.key(index): index for block in dataset.blocks for index in block if table.key(index) in wanted}
    one = replace(dataset.settings, protocols=(Protocol(1, 1),))
    clips, captions = [], []
    with ShardReader(dataset.manifest, *dataset._cache) as reader:
        for key, row in wanted.items():
            clips.append(decode_views(reader.read(dataset.split, places[key], meta=False).data, one).view(0))
            probability, taken = predictions.probabilities[views][row].max(dim=0)
            truth = predictions.classes[int(predictions.labels[row])]
            captions.append(f"{truth}\ntaken for {predictions.classes[int(taken)]}\n({probability:.0%}) {key[:24]}")
    return clip_strips(clips, captions)
