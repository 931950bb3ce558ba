"""A clip with something to remove: a dark ball rolls over a bright place while the view moves."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from diffmae_video.rendering.writers import VideoWriter

HEIGHT, WIDTH, COUNT = 120, 200, 16


def _texture(seed: int, size: int, low: int, high: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    cells = (size // 16, size // 16)
    noise = (0.7 * random.uniform(0, 255, (*cells, 1)) + 0.3 * random.uniform(0, 255, (*cells, 3))).astype(np.float32)
    smooth = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return low + smooth * (high - low) / 255


def write_scene(path: Path, codec: str = "h264", count: int = COUNT) -> list[np.ndarray]:
    """Write the clip; returns the ball of each frame, bool (H, W)."""
    wide, skin = _texture(0, 320, 110, 255), _texture(5, 64, 0, 110)
    writer, masks = VideoWriter(path, (HEIGHT, WIDTH), Fraction(1, 10), Fraction(10), codec=codec), []
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for n in range(count):
        frame = wide[60 : 60 + HEIGHT, 20 + 3 * n : 20 + 3 * n + WIDTH].copy()
        middle = 45 + 5 * n
        ball = (x - middle) ** 2 + (y - 62) ** 2 < 22**2
        frame[ball] = skin[(y - 40) % 64, (x - middle + 32) % 64][ball]
        writer.write(frame.clip(0, 255).astype(np.uint8), n)
        masks.append(ball)
    writer.close()
    return masks
