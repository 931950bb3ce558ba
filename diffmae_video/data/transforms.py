"""Augmentation of a clip: one set of draws for all its frames, from a generator of its own.

Crops are chosen as boxes (`ClipTransform.box`), so that the decoder can crop and scale inside swscale; everything else
works on uint8 (T, C, H, W). The transforms are torchvision's; RandAugment follows timm's notation, whose operations and
ranges torchvision's has not.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import diffmae_video.compat  # noqa: F401

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from diffmae_video.config import DataSettings
from diffmae_video.data.paint import Box
from diffmae_video.errors import UsageError


def build_transforms(
    data: DataSettings, size: tuple[int, int], training: bool, directional: bool = False
) -> ClipTransform:
    """The transform that the recipe describes.

    Args:
        data: crop, flip, colour, RandAugment and erasing settings.
        size: height and width of the result.
        training: False takes the largest centred box and changes nothing else.
        directional: labels tell left from right, so nothing is flipped.
    """
    if not training:
        return ClipTransform(size, crop="center")
    return ClipTransform(
        size,
        crop=data.crop,
        area=data.crop_area,
        aspect=data.crop_aspect,
        flip=0.0 if directional else data.flip,
        jitter=data.color_jitter,
        rand_augment=parse_rand_augment(data.rand_augment) if data.rand_augment else None,
        erasing=data.erasing,
    )


@dataclass(frozen=True)
class RandAugment:
    """RandAugment in timm's terms: `layers` operations of strength `magnitude` (0..10), each with probability 1/2."""

    magnitude: float = 9.0
    layers: int = 2
    deviation: float = 0.0
    probability: float = 0.5


def parse_rand_augment(text: str) -> RandAugment:
    """Read timm's notation: `rand-m7-n4-mstd0.5-inc1`.

    Raises:
        UsageError: it is not that.
    """
    fields = {"m": 9.0, "n": 2.0, "mstd": 0.0, "p": 0.5, "inc": 1.0}
    name, *parts = text.split("-")
    for part in parts:
        match = re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part)
        if not match:
            raise UsageError(f"data.rand_augment = {text}: {part!r} is not known; write rand-m7-n4-mstd0.5-inc1.")
        fields[match[1]] = float(match[2])
    if name != "rand" or fields["inc"] != 1:
        raise UsageError(f"data.rand_augment = {text}: write it like rand-m7-n4-mstd0.5-inc1 (inc1 always).")
    return RandAugment(fields["m"], int(fields["n"]), fields["mstd"], fields["p"])


class ClipTransform:
    """Crop, scale and augment a clip; see `build_transforms`.

    Calling it does all on a decoded clip. A decoder that crops by itself takes `box` first and `augment` after.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        crop: str = "center",
        area: tuple[float, float] = (0.5, 1.0),
        aspect: tuple[float, float] = (0.75, 4 / 3),
        flip: float = 0.0,
        jitter: float = 0.0,
        rand_augment: RandAugment | None = None,
        erasing: float = 0.0,
    ):
        self.size, self.crop, self.rand_augment, self.erasing = size, crop, rand_augment, erasing
        self._resized = v2.RandomResizedCrop(size, scale=area, ratio=aspect)
        self._flip = v2.RandomHorizontalFlip(flip)
        self._jitter = v2.ColorJitter(jitter, jitter, jitter) if jitter else None

    def __call__(self, clip: Tensor, generator: torch.Generator | int) -> Tensor:
        """Transform one clip, uint8 (T, C, H, W) of any size -> uint8 (T, C, h, w)."""
        generator = as_generator(generator)
        left, top, width, height = self.box(clip.shape[-1], clip.shape[-2], generator)
        clip = tv_tensors.Video(clip[..., top : top + height, left : left + width])
        clip = tv.resize(clip, list(self.size), antialias=True)  # (T, C, h, w)
        return self.augment(clip, generator)

    def box(self, width: int, height: int, generator: torch.Generator) -> Box:
        """Choose a crop of a frame of `width` x `height` pixels."""
        if self.crop == "random_resized":
            with draws_from(generator):
                crop = self._resized.make_params([torch.empty(3, height, width, device="meta")])
            return crop["left"], crop["top"], crop["width"], crop["height"]
        if self.crop == "multi_scale":
            return self._multi_scale(width, height, generator)
        rows, columns = self.size
        if self.crop == "random" and rows <= height and columns <= width:  # pixels as they are
            left = _integer(width - columns + 1, generator)
            return left, _integer(height - rows + 1, generator), columns, rows
        scale = min(width / columns, height / rows)
        columns, rows = max(1, round(columns * scale)), max(1, round(rows * scale))
        if self.crop == "random":
            return _integer(width - columns + 1, generator), _integer(height - rows + 1, generator), columns, rows
        return (width - columns) // 2, (height - rows) // 2, columns, rows

    def _multi_scale(self, width: int, height: int, generator: torch.Generator) -> Box:
        """Corners, centre and the points between, at four scales (Wang et al., TSN, 2016)."""
        base, scales = min(width, height), (1.0, 0.875, 0.75, 0.66)
        pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
        across, down = pairs[_integer(len(pairs), generator)]
        columns, rows = max(1, round(base * across)), max(1, round(base * down))
        grid = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
        x, y = grid[_integer(len(grid), generator)]
        return (width - columns) * x // 4, (height - rows) * y // 4, columns, rows

    def augment(self, clip: Tensor, generator: torch.Generator) -> Tensor:
        """Flip, RandAugment, colour jitter and erasing on a cropped clip, uint8 (T, C, h, w)."""
        clip = tv_tensors.Video(clip)
        with draws_from(generator):
            clip = self._flip(clip)
            if self.rand_augment:
                clip = apply_rand_augment(clip, self.rand_augment)
            if self._jitter:
                clip = self._jitter(clip)
            if self.erasing and random.random() < self.erasing:
                clip = erase(clip)
        return clip.as_subclass(Tensor)


_ERASING = v2.RandomErasing(p=1.0, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=0.0)


def erase(clip: Tensor) -> Tensor:
    """Fill one box, the same in all frames, with noise (Zhong et al., 2017; area 1/50..1/3, aspect 0.3..3.3)."""
    box = _ERASING.make_params([clip])
    if box["v"] is None:  # no box fits
        return clip
    clip, rows, columns = clip.clone(), slice(box["i"], box["i"] + box["h"]), slice(box["j"], box["j"] + box["w"])
    clip[..., rows, columns] = torch.randint(0, 256, clip[..., rows, columns].shape, dtype=torch.uint8)
    return clip


def apply_rand_augment(clip: Tensor, settings: RandAugment) -> Tensor:
    """RandAugment with timm's `inc1` operations and ranges, one draw for all frames (Cubuk et al., 2019)."""
    for name in random.choices(_OPERATIONS, k=settings.layers):
        if random.random() < settings.probability:
            strength = min(max(random.gauss(settings.magnitude, settings.deviation), 0.0), 10.0) / 10
            clip = _operate(clip, name, strength, random.choice((1, -1)))
    return clip


_OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
)


def _operate(clip: Tensor, name: str, strength: float, sign: int) -> Tensor:
    height, width = clip.shape[-2:]
    grey, bilinear = [128.0] * clip.shape[-3], tv.InterpolationMode.BILINEAR
    if name == "AutoContrast":
        return tv.autocontrast(clip)
    if name == "Equalize":
        return tv.equalize(clip)
    if name == "Invert":
        return tv.invert(clip)
    if name == "Posterize":
        return tv.posterize(clip, max(1, 4 - int(strength * 4)))
    if name == "Solarize":
        return tv.solarize(clip, 256 - min(256, int(strength * 256)))
    if name == "SolarizeAdd":
        return torch.where(clip < 128, (clip.int() + int(strength * 110)).clamp(max=255).to(torch.uint8), clip)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        adjust = {"Color": tv.adjust_saturation, "Contrast": tv.adjust_contrast, "Brightness": tv.adjust_brightness}
        return adjust.get(name, tv.adjust_sharpness)(clip, max(0.1, 1 + sign * 0.9 * strength))
    angle, shift, shear = 0.0, [0.0, 0.0], [0.0, 0.0]
    if name == "Rotate":
        angle = sign * 30.0 * strength
    elif name.startswith("Shear"):
        shear[name[-1] == "Y"] = math.degrees(math.atan(sign * 0.3 * strength))
    else:
        shift[name[-1] == "Y"] = round(sign * 0.45 * strength * (height if name[-1] == "Y" else width))
    return tv.affine(clip, angle, shift, 1.0, shear, interpolation=bilinear, fill=grey)


class MixVideo:
    """Mixup or CutMix over a batch of clips, chosen evenly: pytorchvideo's MixVideo, with draws from a generator.

    Args:
        num_classes: width of the soft targets.
        mixup, cutmix: alpha of the Beta distribution; 0 switches one off.
        smoothing: label smoothing.
    """

    def __init__(self, num_classes: int, mixup: float = 0.8, cutmix: float = 1.0, smoothing: float = 0.1):
        from pytorchvideo.transforms import MixVideo as Mix

        self.num_classes, self.smoothing = num_classes, smoothing
        self.mix = None
        if mixup > 0 or cutmix > 0:
            share = 0.5 if mixup > 0 and cutmix > 0 else float(cutmix > 0)
            self.mix = Mix(share, mixup or 1.0, cutmix or 1.0, smoothing, num_classes)

    def __call__(self, clips: Tensor, labels: Tensor, generator: torch.Generator | int) -> tuple[Tensor, Tensor]:
        """Mix each clip with its mirror in the batch.

        Args:
            clips: float (B, C, T, H, W) or (B, C, H, W); left as they are.
            labels: int64 (B,).
            generator: a CPU generator, or its seed.

        Returns:
            Clips of the same shape, and soft targets float (B, num_classes).
        """
        from pytorchvideo.transforms.functional import convert_to_one_hot

        if self.mix is None or len(clips) < 2:
            return clips, convert_to_one_hot(labels, self.num_classes, self.smoothing)
        with draws_from(as_generator(generator)):
            return self.mix(clips.clone(), labels)


def as_generator(generator: torch.Generator | int) -> torch.Generator:
    """A CPU generator from a seed; generators come back as they are."""
    if isinstance(generator, torch.Generator):
        return generator
    return torch.Generator().manual_seed(int(generator))


@contextmanager
def draws_from(generator: torch.Generator) -> Iterator[None]:
    """For the block, Python's and torch's global generators are seeded from `generator`; then they are as before.

    Transforms of torchvision and pytorchvideo draw from these, which others use too.
    """
    seed, state = int(torch.randint(0, 2**62, (), generator=generator)), random.getstate()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def _integer(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, max(bound, 1), (), generator=generator))
