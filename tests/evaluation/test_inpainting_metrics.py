"""Figures of inpainting against scikit-image, SciPy and brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from diffmae_video.evaluation.image_metrics import Closeness, psnr, ssim_map
from diffmae_video.evaluation.inpainting import (
    BASELINES,
    DeepFeatures,
    Motion,
    cosine_distance,
    frechet_distance,
    nearest_visible,
    telea,
    temporal_median,
)

RNG = np.random.default_rng(0)


def picture(height: int = 40, width: int = 52) -> np.ndarray:
    return RNG.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)


def noisy(image: np.ndarray, amount: int = 20) -> np.ndarray:
    return np.clip(image.astype(int) + RNG.integers(-amount, amount + 1, image.shape), 0, 255).astype(np.uint8)


def test_psnr_and_ssim_equal_scikit_image() -> None:
    a = picture()
    b = noisy(a)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    _, expected = structural_similarity(a, b, channel_axis=-1, full=True, **options)
    np.testing.assert_allclose(ssim_map(a, b), expected.mean(-1), atol=1e-6)


def test_closeness_of_the_hidden_region_pools_its_pixels() -> None:
    a = np.stack([picture(), picture()])
    b = np.stack([noisy(one, 60) for one in a])
    hidden = np.zeros(a.shape[:3], dtype=bool)
    hidden[0, 5:20, 5:20] = hidden[1, 2:4, 2:4] = True
    b[~hidden] = a[~hidden]
    closeness = Closeness()
    for one in zip(a, b, hidden, strict=True):
        closeness.add(*one)
    figures = closeness.figures()
    assert figures["psnr_masked"] == pytest.approx(psnr(a, b, hidden))
    assert figures["ssim_masked"] == pytest.approx(
        np.concatenate([ssim_map(*x)[m] for *x, m in zip(a, b, hidden, strict=True)]).mean()
    )
    assert figures["psnr_full"] == pytest.approx(np.mean([psnr(*x) for x in zip(a, b, strict=True)]))
    assert figures["ssim_full"] == pytest.approx(np.mean([ssim_map(*x).mean() for x in zip(a, b, strict=True)]))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    usual = [structural_similarity(*x, channel_axis=-1, **options) for x in zip(a, b, strict=True)]
    assert figures["ssim_full_crop"] == pytest.approx(np.mean(usual), abs=1e-6)  # scikit-image crops 5 pixels


@pytest.mark.parametrize(("rows", "features"), [(30, 8), (6, 20), (200, 5)])
def test_frechet_equals_the_matrix_square_root(rows: int, features: int) -> None:
    a, b = RNG.normal(size=(rows, features)), 1.5 * RNG.normal(size=(rows + 3, features)) + 0.3
    # SciPy's square root of a singular product is inexact: compare on the ridge where it is not
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(ca @ cb).real, 0)).sum()
    if rows > features:
        assert root == pytest.approx(np.trace(sqrtm(ca @ cb)).real, rel=1e-6)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_nearest_visible_equals_brute_force() -> None:
    clip = RNG.integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    hidden = RNG.random((5, 6, 7)) < 0.6
    hidden[:, 2, 3] = False
    hidden[1:, 2, 3] = True
    result = nearest_visible(clip, hidden)
    for t, y, x in np.argwhere(hidden):
        shown = [k for k in range(5) if not hidden[k, y, x]]
        if shown:
            nearest = min(shown, key=lambda k: (abs(k - t), k))
            np.testing.assert_array_equal(result[t, y, x], clip[nearest, y, x])


def test_temporal_median_equals_numpy_over_what_is_shown() -> None:
    clip = RNG.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    hidden = np.zeros((5, 4, 4), dtype=bool)
    hidden[2:4, 1, 1] = True
    result = temporal_median(clip, hidden)
    np.testing.assert_array_equal(result[2, 1, 1], np.median(clip[[0, 1, 4], 1, 1], axis=0))


@pytest.mark.parametrize("name", list(BASELINES))
def test_baselines_read_nothing_hidden_and_keep_what_is_shown(name: str) -> None:
    clip = np.stack([picture() for _ in range(4)])
    hidden = RNG.random(clip.shape[:3]) < 0.3
    hidden[:, 8:20, 8:20] = hidden[2] = True
    other = clip.copy()
    other[hidden] = 7
    results = [BASELINES[name](one, hidden) for one in (clip, other)]
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(results[0][~hidden], clip[~hidden])


def test_telea_fills_a_smooth_hole_smoothly() -> None:
    ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None] * 4, (40, 60, 3)).copy()
    hidden = np.zeros((1, 40, 60), dtype=bool)
    hidden[0, 15:25, 25:35] = True
    assert np.abs(telea(ramp[None], hidden)[0].astype(int) - ramp).max() <= 16  # of the 40 levels across the hole


def test_warping_error_sees_flicker_and_not_motion() -> None:
    texture = picture(64, 128)
    moving = np.stack([np.roll(texture, 2 * n, axis=1)[:, 20:84] for n in range(4)])
    steady = Motion(moving).warping_error(moving)
    flicker = Motion(moving).warping_error(np.stack([noisy(frame, 60) for frame in moving]))
    assert flicker > 3 * steady
    still = np.stack([texture] * 3)
    assert Motion(still).warping_error(still) < 1e-6  # Farneback finds nearly no motion


def test_cosine_distance() -> None:
    a = np.array([[1.0, 0], [1, 0], [1, 0]])
    np.testing.assert_allclose(cosine_distance(a, np.array([[2.0, 0], [0, 1], [-1, 0]])), [0, 1, 2])


def test_deep_features_tell_clips_apart(shared_data: Path) -> None:
    from diffmae_video.data.decode import read_clips

    clips = [
        read_clips(shared_data / "clips" / name, [[0, 8]], size=(160, 160))[0].frames.permute(0, 2, 3, 1).numpy()
        for name in ("hiera_dog.mp4", "hiera_goat.mp4")
    ]
    features = DeepFeatures()
    dog, goat = (features(clip) for clip in clips)
    assert dog.shape == (2, 1280)
    assert cosine_distance(dog[:1], dog[1:]) < 0.6 * cosine_distance(dog[:1], goat[:1])
    np.testing.assert_allclose(features(clips[0], batch=1), dog, rtol=1e-3, atol=1e-3)
