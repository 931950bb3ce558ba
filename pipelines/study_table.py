"""`diffmae study table`: what a study found, as a table with deviations over seeds and tests against the baseline."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffmae_video.config.study import Grid, Study
from diffmae_video.evaluation.metrics import PairedTest, paired_test, top_k_hits
from diffmae_video.evaluation.predictions import read_predictions
from diffmae_video.files import read_json, write_atomic
from diffmae_video.pipelines import console
from diffmae_video.pipelines.inpaint_report import MEAN, ONE_STEP, SAMPLE
from diffmae_video.pipelines.study import is_done, load_study
from diffmae_video.rendering.report import Report
from diffmae_video.training.logging import read_metrics

BOOTSTRAP = 2000
"""Resamples of the intervals of paired differences."""
_INPAINTING = (
    ("features", SAMPLE, "features"),
    ("features, first step", ONE_STEP, "features"),
    ("Frechet", SAMPLE, "frechet"),
    ("Frechet, first step", ONE_STEP, "frechet"),
    ("PSNR of the mean", MEAN, "psnr_masked"),
)
"""Column, method and figure of an inpainting evaluation."""


@dataclass(frozen=True)
class Column:
    """One figure that is compared."""

    measure: str
    figure: str
    """`top-1 %`, or of inpainting `MASK features`, ..."""

    @property
    def title(self) -> str:
        """What the column is headed."""
        return f"{self.measure}: {self.figure}"


@dataclass(frozen=True)
class StudyTable:
    """Everything a study has found so far."""

    study: Study
    columns: tuple[Column, ...]
    values: dict[str, dict[Column, dict[int, float]]]
    """Arm -> column -> seed -> value."""
    tests: dict[str, dict[Column, PairedTest]]
    """Arm -> column of accuracies -> test against the baseline on the same seeds and samples."""
    missing: int
    """Results that are not there yet."""

    def cell(self, arm: str, column: Column) -> str:
        """`mean ± standard deviation (seeds)`; `-` where nothing was measured."""
        values = list(self.values[arm].get(column, {}).values())
        if not values:
            return "-"
        mean = statistics.fmean(values)
        digits = 3 if abs(mean) < 1 else 1 if abs(mean) >= 10 else 2
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean:.{digits}f}{deviation} ({len(values)})"

    def verdict(self, arm: str, column: Column) -> str:
        """Difference from the baseline with its 95% interval, in points."""
        test = self.tests.get(arm, {}).get(column)
        if test is None:
            return ""
        low, high = 100 * test.interval.low, 100 * test.interval.high
        return f"{100 * test.difference:+.1f} ({low:+.1f} to {high:+.1f}), p = {test.p_value:.2g}"


def study_table(directory: Path) -> StudyTable:
    """Read, print and write what a study's folder holds: table.md, table.csv, table.png, report.html.

    Raises:
        UsageError: the folder holds no study.
    """
    study, grid = load_study(directory)
    table = collect(directory, study, grid)
    rows = [[arm.name, *(table.cell(arm.name, column) for column in table.columns)] for arm in study.arms]
    titles = ["arm", *(column.title for column in table.columns)]
    console.table(f"Study {study.name}: mean ± deviation (seeds)", titles, rows)
    tests = _tests(table)
    if tests:
        console.table(f"Against {study.baseline}, points", ["arm", "measure", "difference (95% interval)"], tests)
    if table.missing:
        console.say(f"{table.missing} of {len(grid.results)} results are not there yet.")
    write_atomic(directory / "table.md", _markdown(table, titles, rows, tests))
    write_atomic(directory / "table.csv", _csv(table))
    if table.columns:
        write_atomic(directory / "table.png", _figure(table))
    _report(directory, table, grid, titles, rows, tests)
    console.say(f"Wrote table.md, table.csv, table.png and report.html in {directory}.")
    return table


def collect(directory: Path, study: Study, grid: Grid) -> StudyTable:
    """Read the figures of all finished cells."""
    values: dict[str, dict[Column, dict[int, float]]] = {arm.name: {} for arm in study.arms}
    hits: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    keys: dict[tuple[str, str], dict[int, list[str]]] = {}
    columns: dict[Column, None] = {}
    missing = 0
    for result in grid.results:
        cell = grid.cells[result.cell]
        folder = directory / "cells" / cell.name
        if not is_done(directory, cell):
            missing += 1
            continue
        if cell.stage == "inpaint":
            for mask, methods in read_json(folder / "inpaint.json")["scores"].items():
                for label, method, figure in _INPAINTING:
                    value = methods.get(method, {}).get(figure)
                    if value is not None:
                        column = Column(result.measure, f"{mask} {label}")
                        columns[column] = None
                        values[result.arm].setdefault(column, {})[result.seed] = float(value)
            continue
        report = read_json(folder / ("eval.json" if cell.stage == "eval" else "probe.json"))
        column = Column(result.measure, "top-1 %")
        columns[column] = None
        values[result.arm].setdefault(column, {})[result.seed] = 100 * float(report["top1"])
        predictions = read_predictions(folder)
        probabilities = list(predictions.probabilities.values())[-1]
        place = (result.arm, result.measure)
        hits.setdefault(place, {})[result.seed] = top_k_hits(probabilities, predictions.labels, 1)
        keys.setdefault(place, {})[result.seed] = predictions.keys
    tests: dict[str, dict[Column, PairedTest]] = {}
    for (arm, measure), by_seed in hits.items():
        base, base_keys = hits.get((study.baseline, measure), {}), keys.get((study.baseline, measure), {})
        common = [seed for seed in by_seed if seed in base and keys[arm, measure][seed] == base_keys[seed]]
        if arm != study.baseline and common:
            first = torch.cat([base[seed] for seed in common])
            second = torch.cat([by_seed[seed] for seed in common])
            test = paired_test(first, second, bootstrap=BOOTSTRAP, seed=0)
            tests.setdefault(arm, {})[Column(measure, "top-1 %")] = test
    order = {measure.name: number for number, measure in enumerate(study.measures)}
    ordered = sorted(columns, key=lambda column: order[column.measure])
    return StudyTable(study, tuple(ordered), values, tests, missing)


def _tests(table: StudyTable) -> list[list[str]]:
    return [
        [arm, column.title, table.verdict(arm, column)]
        for arm, by_column in table.tests.items()
        for column in table.columns
        if column in by_column
    ]


def _markdown(
    table: StudyTable, titles: Sequence[str], rows: Sequence[Sequence[str]], tests: Sequence[Sequence[str]]
) -> str:
    study = table.study
    lines = [
        f"# Study {study.name}",
        "",
        study.summary,
        "",
        "Mean ± standard deviation over seeds (number of seeds).",
        "",
    ]
    lines += _markdown_table(titles, rows)
    if tests:
        lines += ["", f"Paired tests against `{study.baseline}` (same samples and seeds), in points:", ""]
        lines += _markdown_table(["arm", "measure", "difference (95% interval), McNemar's p"], tests)
    if table.missing:
        lines += ["", f"{table.missing} results are not there yet."]
    return "\n".join(lines) + "\n"


def _markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[text.replace("|", "\\|") for text in row] for row in (titles, *rows)]
    return [
        f"| {' | '.join(escaped[0])} |",
        f"|{'---|' * len(titles)}",
        *(f"| {' | '.join(row)} |" for row in escaped[1:]),
    ]


def _csv(table: StudyTable) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "measure", "figure", "seed", "value"])
    for arm, by_column in table.values.items():
        for column in table.columns:
            for seed, value in sorted(by_column.get(column, {}).items()):
                writer.writerow([arm, column.measure, column.figure, seed, repr(value)])
    return buffer.getvalue()


def _figure(table: StudyTable) -> bytes:
    """A panel for every column: mean of each arm, bars of one standard deviation, a dot for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(4, len(table.columns))
    down = math.ceil(len(table.columns) / across)
    arms = [arm.name for arm in table.study.arms]
    figure = Figure(figsize=(3.6 * across, (1.2 + 0.28 * len(arms)) * down), layout="constrained")
    FigureCanvasAgg(figure)
    for place, column in enumerate(table.columns):
        axes = figure.add_subplot(down, across, place + 1)
        for row, arm in enumerate(reversed(arms)):
            values = list(table.values[arm].get(column, {}).values())
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                axes.errorbar(statistics.fmean(values), row, xerr=deviation, fmt="o", color="C0", capsize=3)
                axes.plot(values, [row] * len(values), ".", color="grey", markersize=4)
        axes.set_yticks(range(len(arms)), list(reversed(arms)) if place % across == 0 else [""] * len(arms))
        axes.set_ylim(-0.5, len(arms) - 0.5)
        axes.set_title(column.title, fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _report(
    directory: Path,
    table: StudyTable,
    grid: Grid,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    tests: Sequence[Sequence[str]],
) -> None:
    study = table.study
    report = Report(f"Study {study.name}")
    missing = f"\n\n{table.missing} results are not there yet." if table.missing else ""
    report.text(f"{study.summary}\n\nMean ± standard deviation over seeds (number of seeds).{missing}")
    report.table("Results", titles, rows)
    if tests:
        report.table(f"Against {study.baseline}", ["arm", "measure", "difference (95% interval), McNemar's p"], tests)
    if table.columns:
        report.image("Arms beside each other", directory / "table.png")
    curves = {}
    for cell in grid.cells.values():
        lines = read_metrics(directory / "cells" / cell.name / "metrics.jsonl") if cell.stage == "pretrain" else []
        points = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            curves[f"{cell.arm}, seed {cell.seed}"] = (steps, losses)
    if curves:
        report.curves("Pre-training loss", curves, log_y=True, y_label="loss of the arm's own target")
    for cell in grid.cells.values():
        if cell.stage == "inpaint":
            for mask in cell.masks:
                picture = directory / "cells" / cell.name / f"{mask.replace(':', '-').replace(',', '-')}.png"
                if picture.is_file():
                    report.image(f"{cell.arm}, {mask}, seed {cell.seed}: the same clips for all arms", picture)
    report.write(directory / "report.html")
