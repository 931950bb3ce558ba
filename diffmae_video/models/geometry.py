"""Sizes that tensors of other projects tell, and image kernels made into those of clips."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffmae_video.errors import DataError, UsageError
from diffmae_video.models.tensors import Tensors


class Geometry:
    """Sizes that tensors tell: tubelet, patch, frames, height and width."""

    def __init__(self, tensors: Tensors, frames: int | None, size: tuple[int, int] | None, config: dict) -> None:
        if "patch_embed.proj.weight" not in tensors:
            raise DataError("There is no patch embedding among the tensors; give a ViT's checkpoint.")
        kernel = tensors["patch_embed.proj.weight"]
        self.width, self.patch = kernel.shape[0], kernel.shape[-1]
        self.flat_image = kernel.dim() == 4
        self.inflated = self.flat_image and (frames or 1) > 1
        self.tubelet = 2 if self.inflated else 1 if self.flat_image else kernel.shape[2]
        side = config.get("image_size", 224)
        told = size or ((side, side) if isinstance(side, int) else tuple(side))
        rows, columns = told[0] // self.patch, told[1] // self.patch
        wanted = (frames or 1) // self.tubelet if self.flat_image else frames and frames // self.tubelet
        times = max(1, wanted or config.get("num_frames", 16) // self.tubelet)
        if "pos_embed_spatial" in tensors:
            rows, columns = self._square(tensors["pos_embed_spatial"].shape[1], rows, columns)
            times = tensors["pos_embed_temporal"].shape[1]
        elif "pos_embed" in tensors and self.flat_image:
            count = tensors["pos_embed"].shape[1]
            if "cls_token" in tensors and count != rows * columns:
                fits, square = count - 1 == rows * columns, math.isqrt(count) ** 2 == count
                count -= fits or not square
            rows, columns = self._square(count, rows, columns)
        elif "pos_embed" in tensors:
            count = tensors["pos_embed"].shape[1] - ("cls_token" in tensors)
            if wanted is None and size is None and "num_frames" not in config and count % (rows * columns) == 0:
                times = count // (rows * columns)  # 224 pixels a side are the rule; their number tells the frames
            if count % times:
                raise UsageError(f"{count} positions do not divide into {times} times; give --frames and --size.")
            rows, columns = self._square(count // times, rows, columns)
        height, width = rows * self.patch, columns * self.patch
        self.frames, self.size = (1 if self.flat_image and not self.inflated else times * self.tubelet), (height, width)
        self.shape = (times, height // self.patch, width // self.patch)

    @staticmethod
    def _square(count: int, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of `count` places: those that are told where they fit, else a square.

        Raises:
            UsageError: neither fits.
        """
        if rows * columns == count:
            return rows, columns
        side = math.isqrt(count)
        if side * side != count:
            raise UsageError(
                f"{count} positions are no square grid: give --size HEIGHTxWIDTH of the training pictures."
            )
        return side, side

    def inflate(self, tensors: Tensors, how: str | None) -> Tensors:
        """2-D kernels as 3-D ones: of one frame, or spread over a tubelet.

        Raises:
            UsageError: a way is named, and nothing is inflated.
        """
        if how is not None and not self.inflated:
            raise UsageError(
                f"--inflate {how}: "
                + (
                    "add --frames N above 1, or leave it out."
                    if self.flat_image
                    else "these are weights of videos; leave it out."
                )
            )
        if not self.flat_image:
            return tensors
        kernel = tensors["patch_embed.proj.weight"].unsqueeze(2)  # (D, C, 1, p, p)
        if self.inflated:
            kernel = inflate_kernel(kernel, self.tubelet, how or "central")
        # the decoder, if any, predicts single frames: each of the tubelet's starts as a copy
        copies = {
            name: tensors[name].repeat(self.tubelet, *[1] * (tensors[name].dim() - 1))
            for name in ("decoder_pred.weight", "decoder_pred.bias")
            if name in tensors and self.inflated
        }
        return {**tensors, **copies, "patch_embed.proj.weight": kernel}


def inflate_kernel(kernel: Tensor, tubelet: int, how: str = "central") -> Tensor:
    """Patch embedding of single frames (D, C, 1, p, p) for tubelets (D, C, t, p, p); see `import_weights`."""
    if how == "mean":
        return kernel.repeat(1, 1, tubelet, 1, 1) / tubelet
    return torch.cat([torch.zeros_like(kernel)] * (tubelet - 1) + [kernel], 2)
