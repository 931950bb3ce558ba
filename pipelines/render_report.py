"""The page and the figures of a render."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from diffmae_video.config import Settings, settings_toml
from diffmae_video.errors import DataError
from diffmae_video.files import write_atomic
from diffmae_video.rendering.report import Report

EMBEDDED_MEGABYTES = 8
"""Largest video that report.html plays inside."""


@dataclass(frozen=True)
class RenderResult:
    """What `render` made and measured; also written as result.json."""

    directory: str
    video: str
    clip: str
    mask: list[str]
    frames: int
    size: list[int]
    masked_share: float
    seconds: float
    samples: int
    seed: int
    checkpoint: str | None
    """None without a model."""
    removal: bool = False
    """Something was removed, so that the source is no truth: nothing is compared with it."""
    propagated_share: float = 0.0
    """Of the hidden pixels, those that were taken from other frames."""
    modelled_share: float = 1.0
    """Of the hidden pixels, those that the model filled."""
    classical_share: float = 0.0
    """Of the hidden pixels, those that were filled smoothly from their edge: specks, and without a model all others."""
    propagated_confidence: float | None = None
    """How far what was taken from other frames is believed, from 0 to 1, mean over its pixels."""
    fit_steps: int | None = None
    """Steps for which a model was trained on the clip; None where none was."""
    windows: int = 0
    windows_resumed: int = 0
    steps: int | None = None
    """None without a model, like `sampler` and `stride`."""
    sampler: str | None = None
    stride: int | None = None
    psnr_masked: float | None = None
    """None, like the figures below, where something was removed."""
    ssim_masked: float | None = None
    psnr_full: float | None = None
    ssim_full: float | None = None
    ssim_full_crop: float | None = None


def read_render_result(directory: Path) -> RenderResult:
    """result.json of a finished render.

    Raises:
        DataError: it cannot be read.
    """
    file = directory / "result.json"
    try:
        return RenderResult(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error}); remove {directory} and render again.") from error


def describe_figures(result: RenderResult) -> str:
    """What can be said of a result, in one or two sentences."""
    parts = [
        (result.propagated_share, "taken from other frames"),
        (result.modelled_share, "painted by the model"),
        (result.classical_share, "filled smoothly from its edge"),
    ]
    text = "Of the hidden region " + ", ".join(f"{share:.1%} {how}" for share, how in parts if share) + "."
    if result.psnr_masked is not None and result.ssim_masked is not None:
        text += f" Against the source: PSNR {result.psnr_masked:.2f} dB, SSIM {result.ssim_masked:.3f}."
    return text


def write_render_result(result: RenderResult, settings: Settings) -> None:
    """Write config.toml, report.html and, last, result.json beside what was rendered."""
    directory = Path(result.directory)
    write_atomic(directory / "config.toml", settings_toml(settings))
    report = Report(f"Inpainting of {Path(result.clip).name}")
    sampled = "" if result.sampler is None else f" {result.sampler}, {result.steps} steps, {result.windows} windows;"
    report.text(
        f"Mask **{', '.join(result.mask)}**, {result.masked_share:.1%} of the pixels hidden;{sampled} seed "
        f"{result.seed}; {result.seconds:.1f} s.\n\n{describe_figures(result)}"
    )
    if not result.removal:
        report.text(
            "PSNR and SSIM compare the result with the source. One sample of a sharp model has a lower PSNR than the "
            "blurred mean of all plausible answers, which is what one step shows."
        )
        report.table(
            "Against the source",
            ["region", "PSNR, dB", "SSIM"],
            [
                ["hidden", result.psnr_masked, result.ssim_masked],
                ["whole frame", result.psnr_full, result.ssim_full],
                ["whole frame, SSIM without 5 pixels at the border", result.psnr_full, result.ssim_full_crop],
            ],
        )
    third = "one step" if result.propagated_confidence is None else "from other frames"
    if (directory / "comparison.png").is_file():
        report.image("Comparison", directory / "comparison.png")
    else:
        _video(report, f"Source, masked, {third}, result", directory / "comparison.mp4")
        if Path(result.video).suffix in (".mp4", ".gif"):
            _video(report, "Result", Path(result.video))
    report.image("Frames", directory / "sheet.png")
    if (directory / "uncertainty.png").is_file():
        report.image("Uncertainty", directory / "uncertainty.png")
    if (directory / "trajectory.mp4").is_file():
        report.video("From noise to the sample: state and prediction", directory / "trajectory.mp4")
    report.settings(settings_toml(settings))
    report.write(directory / "report.html")
    write_atomic(directory / "result.json", json.dumps(asdict(result), indent=1) + "\n")


def _video(report: Report, title: str, path: Path) -> None:
    """Embed a video, or say where it is: a page is held in memory whole, by us and by the browser."""
    megabytes = path.stat().st_size / 1e6
    if megabytes <= EMBEDDED_MEGABYTES:
        report.video(title, path)
    else:
        report.text(f"**{title}**: `{path.name}`, {megabytes:.0f} MB, too large for this page, lies beside it.")
