"""The page of the demo: what it proved, in one table, with pictures and curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmae_video._version import __version__
from diffmae_video.config import load_settings, settings_toml
from diffmae_video.data.synthetic import CLASSES
from diffmae_video.evaluation.inpainting import BASELINES
from diffmae_video.pipelines.inpaint_report import SAMPLE
from diffmae_video.pipelines.job import Job
from diffmae_video.rendering.report import Report
from diffmae_video.training.logging import read_metrics

Results = dict[str, dict[str, Any]]
"""What each stage measured, and its seconds."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo proved."""

    directory: Path
    top1: dict[str, float]
    """Fraction of validation clips whose motion was named, by model: `pretrained`, `scratch`."""
    chance: float
    psnr: dict[str, dict[str, float]]
    """Mask -> method -> PSNR of the masked pixels, dB."""
    seconds: dict[str, float]
    """Wall time by stage."""
    peak_memory: int
    """Bytes resident at most in this process (its workers have their own)."""
    files: dict[str, Path]
    """What to look at."""


def demo_rows(result: DemoResult, results: Results) -> list[list[str]]:
    """One table for everything that is proved: what, figure, beside what."""

    def percent(name: str) -> str:
        interval = results[f"eval {name}"]["interval"]
        bounds = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
        return f"{100 * result.top1[name]:.1f} %{bounds}"

    rows = [
        ["top-1 on motions", "DiffMAE pre-training, then few labels", percent("pretrained")],
        ["top-1 on motions", "from scratch, same labels and steps", percent("scratch")],
        ["top-1 on motions", "chance", f"{100 * result.chance:.1f} %"],
    ]
    label = "PSNR of the hidden pixels, behind the ball"
    rows += [[label, name, f"{value:.2f} dB"] for name, value in results["removal"]["psnr"].items()]
    for mask, row in result.psnr.items():
        rows += [[f"PSNR of hidden pixels, {mask}", name, f"{value:.2f} dB"] for name, value in row.items()]
    return rows


def demo_summary(result: DemoResult) -> str:
    """The figures in one sentence."""
    gain = 100 * (result.top1["pretrained"] - result.top1["scratch"])
    above = 100 * (result.top1["pretrained"] - result.chance)
    worst = min(row[SAMPLE] - max(row[name] for name in BASELINES) for row in result.psnr.values())
    return (
        f"Fine-tuned top-1 is {above:+.1f} points from chance and {gain:+.1f} points from training from scratch; "
        f"sampled inpainting is {worst:+.2f} dB from the best baseline."
    )


def write_demo_report(result: DemoResult, results: Results, job: Job) -> None:
    """Write report.html."""
    out, recipe = result.directory, job.recipe
    counts = results["demo-data"]["counts"]
    tuning = load_settings(recipe, "finetune")
    labels = round(counts["train"] * tuning.data.label_fraction)
    report = Report("diffmae demo")
    report.text(
        f"{demo_summary(result)}\n\n"
        f"One DiffMAE was pre-trained on {counts['train']} clips without labels. A classifier of {len(CLASSES)} "
        f"motions was then fine-tuned on about {labels} labels ({tuning.data.label_fraction:.0%}), from that "
        f"encoder and from scratch, {tuning.train.steps} steps of {tuning.train.batch_size} clips each. "
        f"Both were tested on {results['eval pretrained']['clips']} other clips. No single frame tells the motion."
    )
    if recipe == "smoke":
        report.text("**This is the smoke recipe**: it proves that the chain runs; the figures mean nothing.")
    note = (
        f"PSNR: over all hidden pixels of {results['inpainting']['clips']} validation clips. One step "
        "gives a mean of the possible answers, which PSNR favours; sampling gives one of them."
    )
    report.table("What the demo shows", ["figure", "of", "value (95% interval)"], demo_rows(result, results), note)
    for number, part in enumerate(results["render"]["renders"], 1):
        folder = out / part["folder"]
        label = f"Inpainting {number}: {part['clip']}, {part['psnr_masked']:.1f} dB"
        report.image(label, folder / "sheet.png")
        report.video(f"Inpainting {number}: source, masked, result", folder / "comparison.mp4")
    removal = results["removal"]
    report.image(f"Removal of a ball, {removal['psnr']['removal']:.1f} dB", out / removal["folder"] / "sheet.png")
    report.video("Removal: source, masked, from other frames, result", out / removal["folder"] / "comparison.mp4")
    curves = {name: _curve(read_metrics(out / name / "metrics.jsonl"), "loss") for name in ("pretrain",)}
    report.curves("Pre-training loss", curves, log_y=True, y_label="squared error of masked patches")
    for title, column in (("Fine-tuning loss", "loss"), ("Fine-tuning accuracy on its batches", "train_top1")):
        both = {
            name: _curve(read_metrics(out / f"finetune-{name}" / "metrics.jsonl"), column)
            for name in ("pretrained", "scratch")
        }
        report.curves(title, both)
    report.table("Time", ["stage", "seconds"], [[name, float(value)] for name, value in result.seconds.items()])
    for stage in ("pretrain", "finetune", "evaluate", "render"):
        report.settings(settings_toml(load_settings(recipe, stage)), f"Settings of {stage}")
    report.text(f"Seed {job.seed}, diffmae-video {__version__}, recipe `{recipe}`.")
    report.write(result.files["report"])


def _curve(lines: list[dict[str, Any]], column: str) -> tuple[list[float], list[float]]:
    points = [(line["step"], line[column]) for line in lines if isinstance(line.get(column), int | float)]
    return [step for step, _ in points], [value for _, value in points]
