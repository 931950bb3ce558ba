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
    psnr_masked: float
    ssim_masked: float
    psnr_full: float
    ssim_full: float
    masked_share: float
    seconds: float
    windows: int
    windows_resumed: int
    steps: int
    sampler: str
    samples: int
    stride: int
    seed: int
    checkpoint: str
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


def write_render_result(result: RenderResult, settings: Settings) -> None:
    """Write config.toml, report.html and, last, result.json beside what was rendered."""
    directory = Path(result.directory)
    write_atomic(directory / "config.toml", settings_toml(settings))
    report = Report(f"Inpainting of {Path(result.clip).name}")
    report.text(
        f"Mask **{', '.join(result.mask)}**, {result.masked_share:.1%} of the pixels hidden; {result.sampler}, "
        f"{result.steps} steps, seed {result.seed}; {result.windows} windows in {result.seconds:.1f} s.\n\n"
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
    if (directory / "comparison.png").is_file():
        report.image("Comparison", directory / "comparison.png")
    else:
        _video(report, "Source, masked, one step, result", directory / "comparison.mp4")
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
