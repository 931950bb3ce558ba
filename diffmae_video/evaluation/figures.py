"""Pictures of an evaluation: confusion matrix, the most confident mistakes, denoising error by timestep."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MOST_NAMES = 40  # class names beside the axes of a confusion matrix; more would overlap


def confusion_figure(confusion: Tensor, classes: Sequence[str], title: str) -> bytes:
    """PNG of a confusion matrix (K, K) of counts, each row scaled to 1 (rows without a video stay empty)."""
    counts = confusion.double()
    rates = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()  # (K, K)
    figure, axes = _figure(side := min(max(4.0, 0.34 * len(classes) + 2.5), 14.0), side)
    image = axes.imshow(rates, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= MOST_NAMES:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 15:
        for row in range(len(classes)):
            for column in range(len(classes)):
                if count := int(confusion[row, column]):
                    shade = "white" if rates[row, column] > 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=8)
    figure.colorbar(image, ax=axes, fraction=0.046, label="share of the true class")
    return _png(figure)


def strip_picture(clips: Sequence[Tensor], captions: Sequence[str], frames: int = 6) -> bytes:
    """PNG with one row per clip uint8 (T, C, H, W): evenly spread frames beside a caption."""
    rows = len(clips)
    figure, _ = _figure(2.4 + 1.3 * frames, 1.35 * rows)
    figure.clf()
    grid = figure.add_gridspec(rows, frames + 1, width_ratios=[2.2] + [1] * frames, wspace=0.03, hspace=0.08)
    for row, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        label = figure.add_subplot(grid[row, 0])
        label.axis("off")
        label.text(0.98, 0.5, caption, ha="right", va="center", fontsize=10)
        chosen = torch.linspace(0, len(clip) - 1, frames).round().long()
        for column, index in enumerate(chosen.tolist()):
            axes = figure.add_subplot(grid[row, column + 1])
            axes.axis("off")
            axes.imshow(clip[index].permute(1, 2, 0).numpy())
    return _png(figure)


def sweep_figure(
    timesteps: Sequence[int],
    errors: dict[str, Sequence[float]],
    signal: Sequence[float],
    levels: dict[str, float] | None = None,
) -> bytes:
    """PNG of the denoising error by diffusion step, one curve per mask ratio, over the share of signal left.

    Args:
        levels: for each mask ratio an error to compare with, drawn as a dashed line of the curve's colour.
    """
    figure, axes = _figure(7.5, 4.5)
    for name, values in errors.items():
        (line,) = axes.plot(timesteps, values, marker="o", markersize=3, label=name)
        if levels:
            axes.axhline(levels[name], color=line.get_color(), linestyle="--", linewidth=1)
    axes.set_xscale("symlog", linthresh=10)  # noise takes over early: most of the schedule looks alike
    axes.set_xlim(left=0)
    axes.set_xlabel("timestep")
    axes.set_ylabel("squared error on masked patches")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(title="mask ratio", loc="lower right")
    right = axes.twinx()
    right.fill_between(timesteps, signal, color="grey", alpha=0.15, linewidth=0)
    right.set_ylim(0, 1)
    right.set_ylabel("signal power left in the noisy patch (grey)")
    return _png(figure)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def mistakes(probabilities: Tensor, labels: Tensor, most: int = 8) -> list[int]:
    """Rows of the wrongly classified videos, the most confident first."""
    confidence, prediction = probabilities.max(dim=1)
    wrong = np.flatnonzero((prediction != labels).numpy())
    order = np.argsort(-confidence.numpy()[wrong], kind="stable")
    return wrong[order][:most].tolist()
