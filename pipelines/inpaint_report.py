"""What an inpainting evaluation measured, its tables, and the page that shows them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from diffmae_video.config import Settings, settings_toml
from diffmae_video.errors import DataError
from diffmae_video.evaluation.inpainting import PerceptualMetrics
from diffmae_video.files import write_atomic
from diffmae_video.rendering.report import Report
from diffmae_video.rendering.sheet import contact_sheet
from diffmae_video.rendering.writers import write_png

SAMPLE, MEAN, BEST, ONE_STEP = (
    "DiffMAE, one sample",
    "DiffMAE, mean of samples",
    "DiffMAE, best of samples",
    "MAE's one step",
)
COLUMNS = (
    *("psnr_masked", "ssim_masked", "psnr_full", "ssim_full", "ssim_full_crop"),
    *("features", "frechet", "warping", "lpips"),
)
TITLES = {
    "psnr_masked": "PSNR hidden", "ssim_masked": "SSIM hidden", "psnr_full": "PSNR full", "ssim_full": "SSIM full",
    "ssim_full_crop": "SSIM full, cropped",
    "features": "feature dist.", "frechet": "Frechet", "warping": "warp err. x1e3", "lpips": "LPIPS",
}  # fmt: skip
FILE = "inpaint.json"
Pictures = dict[str, list[dict[str, np.ndarray]]]
"""Mask text -> for each shown clip: what it is called -> its middle frame, uint8 (H, W, 3)."""


@dataclass(frozen=True)
class InpaintingEvaluation:
    """What was measured; also written as inpaint.json. `scores[mask][method][column]`."""

    directory: str
    checkpoint: str
    data: str
    clips: int
    seed: int
    sampler: str
    steps: int
    samples: int
    size: tuple[int, ...]
    seconds: float
    conventions: str
    scores: dict[str, dict[str, dict[str, float | None]]]


def table_rows(methods: dict[str, dict[str, float | None]]) -> list[list[object]]:
    """One row a method, for a table of COLUMNS."""
    return [
        [name, *("-" if figures[key] is None else figures[key] for key in COLUMNS)] for name, figures in methods.items()
    ]


def describe_conventions(settings: Settings, clips: int, perceptual: PerceptualMetrics) -> str:
    """How the figures were measured, in a few sentences."""
    height, width = settings.model.size
    deep = (
        "Feature distance: 1 - cosine of pooled EfficientNet-Lite0 features; Frechet: between the same features of all "
        "frames (small sets bias it upwards; compare within the table only). "
    )
    return (
        f"{clips} clips of {settings.model.frames} frames at {width}x{height}, {_timing(settings)}, centre "
        f"crop, seed {settings.seed}, {settings.evaluate.samples} samples a clip; results pasted into the source. PSNR "
        "and SSIM (Gaussian window 11, sigma 1.5; of full frames to the mirrored border, and cropped by 5 pixels as "
        "scikit-image does), uint8 RGB: hidden region pooled over all hidden pixels, full frame "
        "averaged over frames (100 dB where nothing is hidden); best of samples: by hidden PSNR against the source. "
        + (deep if perceptual.features else "")
        + "Warping error: mean squared, values in [0, 1], times 1000. "
        + ("LPIPS: AlexNet, v0.1, full frame." if perceptual.lpips else "LPIPS: not measured (weights not present).")
    )


def write_inpainting(result: InpaintingEvaluation, settings: Settings, pictures: Pictures) -> None:
    """Write pictures, report.html, config.toml and, last, inpaint.json."""
    directory = Path(result.directory)
    report = Report("Inpainting evaluation")
    report.text(result.conventions)
    for text, methods in result.scores.items():
        rows = [[name, *(figures[key] for key in COLUMNS)] for name, figures in methods.items()]
        report.table(f"Mask {text}", ["method", *TITLES.values()], rows)
        shown = pictures[text]
        if shown:
            grid = [(name, [clip[name] for clip in shown]) for name in shown[0]]
            sheet = contact_sheet(grid, [f"clip {n + 1}" for n in range(len(shown))], f"Mask {text}, middle frames")
            file = directory / f"{text.replace(':', '-').replace(',', '-').replace('/', '-')}.png"
            write_png(file, sheet)
            report.image(f"Mask {text}", file)
    report.settings(settings_toml(settings))
    report.write(directory / "report.html")
    write_atomic(directory / "config.toml", settings_toml(settings))
    write_atomic(directory / FILE, json.dumps(asdict(result), indent=1) + "\n")


def read_inpainting(directory: Path) -> InpaintingEvaluation:
    """inpaint.json of a finished evaluation.

    Raises:
        DataError: it cannot be read.
    """
    try:
        facts = json.loads((directory / FILE).read_text(encoding="utf-8"))
        return InpaintingEvaluation(**{**facts, "size": tuple(facts["size"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{directory / FILE} cannot be read ({error}); remove {directory} and try again.") from error


def _timing(settings: Settings) -> str:
    """How the clips lie in time, for people."""
    data, frames = settings.data, settings.model.frames
    if data.segments:
        return f"one from each of {frames} segments"
    seconds = data.seconds(frames)
    return f"over {seconds:.4g} s" if seconds else f"stride {data.stride}"
