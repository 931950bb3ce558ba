"""How close a picture is to another: PSNR and SSIM over the whole frame or over what was hidden.

Conventions: uint8 RGB, peak 255. SSIM is that of Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5, K = (0.01,
0.03), population covariance, mean over the three channels (scikit-image with gaussian_weights=True,
use_sample_covariance=False). The masked SSIM is the mean of the full SSIM map over the hidden pixels. The SSIM of a
full frame is given twice: over every pixel, with mirrored borders, and, as scikit-image and Wang's code do, without the
5 pixels at the border whose windows reach beyond the frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
PSNR_CAP = 100.0
"""PSNR in dB of equal pictures, so that means stay finite."""


def psnr_of(squared_error: float) -> float:
    """PSNR in dB of a mean squared error over 8-bit values."""
    return PSNR_CAP if squared_error <= 0 else min(PSNR_CAP, 10 * math.log10(255.0**2 / squared_error))


def psnr(a: np.ndarray, b: np.ndarray, hidden: np.ndarray | None = None) -> float:
    """PSNR in dB of pictures or clips uint8 (..., H, W, 3), over `hidden` bool (..., H, W) or everything."""
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    return psnr_of(float(error.mean() if hidden is None else error[hidden].mean()))


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM at every pixel of two pictures uint8 (H, W, 3), mean over channels: float64 (H, W), borders mirrored."""
    x, y = a.astype(np.float64), b.astype(np.float64)

    def blur(image: np.ndarray) -> np.ndarray:
        window = (SSIM_WINDOW, SSIM_WINDOW)
        return cv2.GaussianBlur(image, window, SSIM_SIGMA, borderType=cv2.BORDER_REFLECT)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean(-1)


@dataclass
class Closeness:
    """Sums over the frames of a video, from which masked and full PSNR and SSIM follow.

    PSNR of the hidden region pools the squared error of all hidden pixels; the full-frame figures are means over
    frames, as E2FGVI and ProPainter report them.
    """

    masked_error: float = 0.0
    masked_ssim: float = 0.0
    masked_pixels: int = 0
    full_psnr: float = 0.0
    full_ssim: float = 0.0
    cropped_ssim: float = 0.0
    frames: int = 0

    def add(self, source: np.ndarray, result: np.ndarray, hidden: np.ndarray) -> None:
        """Count a frame: uint8 (H, W, 3) twice, and bool (H, W)."""
        self.frames += 1
        if not hidden.any():
            self.full_psnr += psnr(source, result)
            self._add_ssim(np.ones(hidden.shape) if np.array_equal(source, result) else ssim_map(source, result))
            return
        error = (source.astype(np.float64) - result.astype(np.float64)) ** 2
        similarity = ssim_map(source, result)
        self.masked_error += float(error[hidden].sum()) / 3
        self.masked_ssim += float(similarity[hidden].sum())
        self.masked_pixels += int(hidden.sum())
        self.full_psnr += psnr_of(float(error.mean()))
        self._add_ssim(similarity)

    def _add_ssim(self, similarity: np.ndarray) -> None:
        """Count a map of SSIM (H, W); frames smaller than the window have nothing to crop."""
        edge = SSIM_WINDOW // 2
        inner = similarity[edge:-edge, edge:-edge]
        self.full_ssim += float(similarity.mean())
        self.cropped_ssim += float(inner.mean() if inner.size else similarity.mean())

    def figures(self) -> dict[str, float]:
        """`psnr_masked`, `ssim_masked`, `psnr_full`, `ssim_full`, `ssim_full_crop`."""
        pixels, frames = max(self.masked_pixels, 1), max(self.frames, 1)
        return {
            "psnr_masked": psnr_of(self.masked_error / pixels),
            "ssim_masked": self.masked_ssim / pixels,
            "psnr_full": self.full_psnr / frames,
            "ssim_full": self.full_ssim / frames,
            "ssim_full_crop": self.cropped_ssim / frames,
        }
