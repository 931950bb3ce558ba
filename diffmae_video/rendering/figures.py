"""Charts: curves, a confusion matrix, the denoising error by timestep. Drawn by matplotlib without a display."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # not pyplot: no global state, no display
from matplotlib.ticker import LogFormatter
from torch import Tensor

Points = tuple[np.ndarray, np.ndarray]
"""x and y, float64 (N,) each."""
MAX_POINTS = 800
"""Points of one curve that are drawn; longer ones are averaged in equal bins."""
COLOURS = ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#c2255c")
"""Of curves, in order; readable on light and dark pages."""

MOST_NAMES = 40  # class names beside the axes of a confusion matrix; more would overlap


def curves_svg(curves: Mapping[str, Points], *, x_label: str = "", log_y: bool = False) -> str:
    """A chart of curves (see `clean_points`) as an SVG element for a web page; the curve with index k has id `curve-k`.

    Text takes the page's colour; the same curves give the same bytes. It holds no links.
    """
    options = {"svg.fonttype": "none", "svg.hashsalt": "curves", "path.simplify": False}
    options |= {f"{part}color": "#8b8d98" for part in ("axes.edge", "xtick.", "ytick.", "grid.")}
    with matplotlib.rc_context(cast(Any, options)):
        figure, axes = _figure(9.0, 3.4, layout=None)  # a layout engine draws everything twice
        figure.subplots_adjust(left=0.085, right=0.985, top=0.96, bottom=0.16)
        for index, (x, y) in enumerate(curves.values()):
            # a single point is a line without length whose round ends make a dot: markers are links inside the SVG
            x, y, width = (np.repeat(x, 2), np.repeat(y, 2), 7.0) if len(x) == 1 else (x, y, 1.6)
            (line,) = axes.plot(x, y, color=COLOURS[index % len(COLOURS)], linewidth=width, gid=f"curve-{index}")
            line.set(solid_capstyle="round", clip_on=False)
        axes.set_yscale("log" if log_y else "linear")
        if log_y:  # plain numbers: powers of ten as formulas take most of the drawing
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
        axes.set_xlabel(x_label.encode("utf-8", "replace").decode(), parse_math=False)  # names may be no UTF-8
        axes.grid(axis="y", clip_on=False)
        axes.tick_params(which="both", left=False, bottom=False)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<clipPath.*?</clipPath>", "", svg, flags=re.DOTALL)
    return svg[svg.index("<svg") :]


def clean_points(x: Sequence[float], y: Sequence[float], log_y: bool = False) -> Points:
    """The points that can be drawn: finite, with `log_y` positive, at most MAX_POINTS with the last as it is.

    Raises:
        ValueError: x and y differ in length.
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if xs.shape != ys.shape or xs.ndim != 1:
        raise ValueError(f"curves: x and y need one length, not {xs.shape} and {ys.shape}")
    good = np.isfinite(xs) & np.isfinite(ys) & ((ys > 0) | (not log_y))
    xs, ys = xs[good], ys[good]
    if len(xs) > MAX_POINTS:
        bins = np.array_split(np.arange(len(xs)), MAX_POINTS - 1)
        height = np.log(ys) if log_y else ys
        means = np.array([height[b].mean() for b in bins])
        ys = np.append(np.exp(means) if log_y else means, ys[-1])
        xs = np.append([xs[b].mean() for b in bins], xs[-1])
    return xs, ys


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


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()
