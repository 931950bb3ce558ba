"""How stored frames are meant to be shown: turned, mirrored, with pixels that are not square, in high dynamic range.

`display_of` reads it from a stream, `Display.rgb` makes the picture that a player would show, uint8 (H, W, 3), in
square pixels and standard dynamic range. Matrix and range are swscale's part: it follows the tags of each frame, and
takes untagged YUV for BT.601 in limited range, as ffmpeg does.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from diffmae_video.errors import DataError

BT709, BT601, RGB = 1, 6, 0
"""Matrix coefficients of ISO 23091-2, table 4; also FFmpeg's numbers."""
LIMITED = 1
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
"""How YUV becomes RGB: without these flags swscale's table for frames that keep their size is 1 to 1.5 levels dark."""
MATRICES = {BT709: BT709, 4: 4, 5: 5, BT601: BT601, 7: 7, 9: 9}
"""Matrices between RGB and YUV that swscale knows: BT.709, FCC, BT.601 (twice), SMPTE 240M, BT.2020."""
_UNTAGGED = (RGB, 2, 3)  # no matrix, unspecified, reserved
_PQ, _HLG = 16, 18
_WHITE = 203.0  # cd/m2 of diffuse white in HDR (ITU-R BT.2408)
_STRANGE = 4  # pixels beyond 4:1 are no aspect ratio but damage


class Display(NamedTuple):
    """What is done to a stored frame before it is shown: transposed, then mirrored, then widened."""

    transpose: bool = False
    hflip: bool = False
    vflip: bool = False
    aspect: Fraction = Fraction(1)
    """Width of a stored pixel by its height."""
    transfer: int = 0
    """16 for PQ, 18 for HLG; 0 for every standard range."""

    @property
    def turned(self) -> bool:
        """Whether the pixels change places."""
        return self.transpose or self.hflip or self.vflip

    @property
    def plain(self) -> bool:
        """Whether frames are shown as they are stored."""
        return not self.turned and self.aspect == 1 and not self.transfer

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height as shown of a frame that is stored with `width` and `height`."""
        width = max(1, round(width * self.aspect))
        return (height, width) if self.transpose else (width, height)

    def upright(self, rgb: np.ndarray) -> np.ndarray:
        """A stored picture (H, W, 3) with its pixels where they are shown."""
        if self.transpose:
            rgb = rgb.transpose(1, 0, 2)
        return np.ascontiguousarray(rgb[:: -1 if self.vflip else 1, :: -1 if self.hflip else 1])

    def rgb(self, frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
        """The frame as shown, uint8 (H, W, 3)."""
        width = max(1, round(frame.width * self.aspect))
        if self.transfer:
            deep = reformatter.reformat(
                frame, width, frame.height, "rgb48le", interpolation=EXACT, threads=1
            ).to_ndarray()
            return self.upright(tone_map(deep, self.transfer))
        return self.upright(
            reformatter.reformat(frame, width, frame.height, "rgb24", interpolation=EXACT, threads=1).to_ndarray()
        )


PLAIN = Display()


def display_of(
    stream: av.VideoStream, name: str, matrix: tuple[int, ...] | None = None, dolby: bool = False
) -> Display:
    """How the frames of a stream are shown.

    Args:
        stream: opened, so that its header is known.
        name: of the file, for messages.
        matrix: display matrix, 9 numbers in 16.16 and 2.30 fixed point (ISO 14496-12, 8.3.2).
        dolby: its picture needs the metadata of Dolby Vision, without which colours are wrong (profile 5).

    Raises:
        DataError: its colours cannot be read.
    """
    codec = stream.codec_context
    coded = int(codec.colorspace)
    if coded not in MATRICES and coded not in _UNTAGGED:
        raise DataError(f"{name} stores its colours in a way that is not read (matrix {coded}); convert it to BT.709.")
    if dolby:
        raise DataError(
            f"{name} is in Dolby Vision alone (profile 5), whose colours are not read; convert it to HDR10 or BT.709, "
            "e.g. by ffmpeg's filter libplacebo."
        )
    aspect = Fraction(stream.sample_aspect_ratio or codec.sample_aspect_ratio or 1)
    if not Fraction(1, _STRANGE) <= aspect <= _STRANGE:
        aspect = Fraction(1)
    transfer = int(codec.color_trc)
    display = Display(aspect=aspect, transfer=transfer if transfer in (_PQ, _HLG) else 0)
    if matrix is None:
        return display
    a, b, _, c, d, *_ = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return display._replace(hflip=a < 0, vflip=d < 0)
    return display._replace(transpose=True, hflip=c < 0, vflip=b < 0)


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The display matrix that comes with a frame: from the container, or the codec's own message."""
    found: Any = frame.side_data  # by place, though its stubs say by name
    for place in range(len(found)):
        data = found[place]
        if data.type.name == "DISPLAYMATRIX" and data.buffer_size >= 36:
            return struct.unpack("=9i", bytes(data)[:36])
    return None


def has_dolby_vision(frame: av.VideoFrame) -> bool:
    """Whether a frame comes with the metadata of Dolby Vision."""
    found: Any = frame.side_data
    return any(found[place].type.name.startswith("DOVI_") for place in range(len(found)))


def matrix_to_keep(frame: av.VideoFrame) -> int:
    """The matrix that a frame keeps when it is encoded anew: its own; BT.601 for untagged YUV, BT.709 for RGB."""
    if frame.format.is_rgb or frame.format.name == "pal8":
        return BT709
    return MATRICES.get(int(frame.colorspace), BT601)


def tone_map(deep: np.ndarray, transfer: int) -> np.ndarray:
    """PQ or HLG in BT.2020 primaries to BT.709 in standard dynamic range.

    Diffuse white (203 cd/m2) and everything below three quarters of it keep their light; above, a knee leads to white.

    Args:
        deep: uint16 (H, W, 3), R'G'B'.
        transfer: 16 for PQ (SMPTE ST 2084), 18 for HLG (ITU-R BT.2100, display of 1000 cd/m2).

    Returns:
        uint8 (H, W, 3).
    """
    light = _light_of(transfer)[deep]  # (H, W, 3), 1 = diffuse white
    if transfer == _HLG:  # system gamma of 1.2 on the luminance of the scene
        luminance = light @ np.asarray([0.2627, 0.6780, 0.0593], np.float32)
        light = light * np.maximum(luminance, 1e-6)[..., None] ** 0.2 * (1000 / _WHITE)
    light = np.maximum(light @ _TO_BT709, 0)
    peak = light.max(-1, keepdims=True)  # one factor for all three keeps the hue
    knee = 0.75
    bent = np.where(peak > knee, 1 - (1 - knee) * np.exp(-(peak - knee) / (1 - knee)), peak)
    light = light * (bent / np.maximum(peak, 1e-6))
    return np.rint(255 * np.clip(light, 0, 1) ** (1 / 2.4)).astype(np.uint8)  # a display of gamma 2.4, BT.1886


_TO_BT709 = np.asarray(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
).T  # ITU-R BT.2087


@lru_cache
def _light_of(transfer: int) -> np.ndarray:
    """Light for each of 65536 code values, float32: of the display (PQ, 1 = diffuse white) or the scene (HLG, 0..1)."""
    value = np.arange(65536) / 65535
    if transfer == _PQ:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = value ** (1 / m2)
        return (10_000 / _WHITE * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12).astype(np.float32)
