"""Masks over the token grid: which patches the encoder sees and which the decoder predicts.

Token order is time-major, then row, then column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from diffmae_video.mask_text import Extent, Generated, read_mask_text
from diffmae_video.registry import maskers

GridShape = tuple[int, int, int]  # (T/t, H/p, W/p)


@dataclass(frozen=True)
class Mask:
    """Hidden and visible tokens of a batch.

    The random kinds hide the same number of tokens in every sample; then `visible_valid` and `masked_valid` are None.
    Other masks are padded to the largest count with index 0, and the valid tables say which entries are real.
    """

    grid: Tensor
    """bool (B, N), True = masked."""
    shape: GridShape
    """(T/t, H/p, W/p)."""
    visible: Tensor
    """int64 (B, V), ascending token indices."""
    masked: Tensor
    """int64 (B, M), ascending token indices."""
    visible_valid: Tensor | None = None
    """bool (B, V), False on padding; None when nothing is padded."""
    masked_valid: Tensor | None = None
    """bool (B, M), False on padding; None when nothing is padded."""

    @classmethod
    def from_grid(cls, grid: Tensor, shape: GridShape) -> Mask:
        """Index a boolean grid (B, N) or (B, T/t, H/p, W/p), True = masked.

        Raises:
            ValueError: the grid does not have the tokens of `shape`, or is not boolean.
        """
        grid = grid.flatten(1)
        if grid.dtype != torch.bool or grid.shape[1] != math.prod(shape):
            raise ValueError(f"a mask over {shape} is bool (B, {math.prod(shape)}), not {grid.dtype} {(*grid.shape,)}")
        masked, masked_valid = _indices(grid)  #    (B, M)
        visible, visible_valid = _indices(~grid)  # (B, V)
        return cls(grid, (shape[0], shape[1], shape[2]), visible, masked, visible_valid, masked_valid)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Mask:
        """The same mask with its tensors on `device`."""

        return self._map(lambda table: table.to(device, non_blocking=non_blocking))

    def repeat_interleave(self, times: int) -> Mask:
        """Every sample `times` times in a row: (B, ...) -> (B * times, ...)."""
        return self._map(lambda table: table.repeat_interleave(times, 0))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Mask:
        visible_valid = None if self.visible_valid is None else change(self.visible_valid)
        masked_valid = None if self.masked_valid is None else change(self.masked_valid)
        tables = change(self.grid), self.shape, change(self.visible), change(self.masked)
        return Mask(*tables, visible_valid, masked_valid)

    def pixels(self, tubelet: int, patch: int) -> Tensor:
        """The mask in pixels, bool (B, T, H, W), True = masked."""
        grid = self.grid.unflatten(1, self.shape)  # (B, T/t, H/p, W/p)
        for axis, times in ((1, tubelet), (2, patch), (3, patch)):
            grid = grid.repeat_interleave(times, axis)
        return grid

    @property
    def batch(self) -> int:
        """Samples B."""
        return self.grid.shape[0]


def _indices(grid: Tensor) -> tuple[Tensor, Tensor | None]:
    counts = grid.sum(1)  # (B,)
    width = int(counts.max()) if len(counts) else 0
    order = grid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    if bool((counts == width).all()):
        return order, None
    valid = torch.arange(width, device=grid.device) < counts[:, None]
    return order.where(valid, torch.zeros_like(order)), valid


def pixel_mask_to_grid(pixels: Tensor, tubelet: int, patch: int) -> Tensor:
    """Round a pixel mask outwards to tokens: a token is masked as soon as one of its pixels is.

    Args:
        pixels: bool (T, H, W) or (B, T, H, W), True = masked; T, H, W multiples of tubelet, patch, patch.
        tubelet: frames t of a token.
        patch: pixels p on a side of a token.

    Returns:
        bool (T/t, H/p, W/p) or (B, T/t, H/p, W/p).
    """
    frames, height, width = pixels.shape[-3:]
    if frames % tubelet or height % patch or width % patch:
        raise ValueError(f"a mask of {frames} x {height} x {width} is no multiple of {tubelet} x {patch} x {patch}")
    cells = pixels.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch)).unflatten(-5, (-1, tubelet))
    return cells.any(-1).any(-2).any(-3)


# --- maskers: (shape, ratio, generator) -> bool (N,), True = masked; `ratio` at registration is the default ----------


@maskers.register("random", ratio=0.75)
def random_grid(shape: GridShape, ratio: float, generator: torch.Generator) -> Tensor:
    """Tokens at random in space and time; int(N * (1 - ratio)) stay visible (MAE-ST: 156 of 1568 at 0.9)."""
    tokens = math.prod(shape)
    visible = torch.randperm(tokens, generator=generator)[: int(tokens * (1 - ratio))]
    return torch.ones(tokens, dtype=torch.bool).index_fill(0, visible, False)


@maskers.register("tube", ratio=0.75)
def tube_grid(shape: GridShape, ratio: float, generator: torch.Generator) -> Tensor:
    """The same int(ratio * H/p * W/p) places hidden at all times (VideoMAE: 160 of 1568 stay visible at 0.9)."""
    places = shape[1] * shape[2]
    hidden = torch.randperm(places, generator=generator)[: int(ratio * places)]
    return torch.zeros(places, dtype=torch.bool).index_fill(0, hidden, True).repeat(shape[0])


@maskers.register("block", ratio=0.75)
def block_grid(shape: GridShape, ratio: float, generator: torch.Generator) -> Tensor:
    """Union of random 3-D boxes, cut to exactly N - int(N * (1 - ratio)) tokens by thinning the last box.

    Each box spans 15 to 70 % of every axis on a logarithmic scale, as I-JEPA and V-JEPA draw theirs in spirit.
    """
    tokens = math.prod(shape)
    wanted = tokens - int(tokens * (1 - ratio))
    grid = torch.zeros(shape, dtype=torch.bool)
    while (missing := wanted - int(grid.sum())) > 0:
        share = 0.15 * (0.7 / 0.15) ** torch.rand(3, generator=generator)
        sizes = [min(n, max(1, round(n * float(s)))) for n, s in zip(shape, share, strict=True)]
        starts = [
            int(torch.randint(n - size + 1, (), generator=generator)) for n, size in zip(shape, sizes, strict=True)
        ]
        box = torch.zeros_like(grid)
        box[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))] = True
        new = (box & ~grid).flatten().nonzero().flatten()
        if len(new) > missing:
            new = new[torch.randperm(len(new), generator=generator)[:missing]]
        grid.view(-1)[new] = True
    return grid.flatten()


@maskers.register("center", ratio=0.25)
def center_grid(shape: GridShape, ratio: float, generator: torch.Generator) -> Tensor:
    """A centred rectangle of about `ratio` of the area at all times; 0.25 is the half-side block."""
    sizes = [min(n, max(1, round(n * math.sqrt(ratio)))) for n in shape[1:]]
    (top, left), (height, width) = [(n - size) // 2 for n, size in zip(shape[1:], sizes, strict=True)], sizes
    grid = torch.zeros(shape, dtype=torch.bool)
    grid[:, top : top + height, left : left + width] = True
    return grid.flatten()


@maskers.register("frames", ratio=0.5)
def frames_grid(shape: GridShape, ratio: float, generator: torch.Generator) -> Tensor:
    """The middle of the clip, whole frames: interpolation. At least one tubelet stays at each end."""
    count = _tubelets(ratio, shape[0], keep=2, kind="frames")
    start = (shape[0] - count) // 2
    return _span(range(start, start + count), shape)


@maskers.register("future", ratio=0.5)
def future_grid(shape: GridShape, ratio: float, generator: torch.Generator) -> Tensor:
    """The end of the clip, whole frames: prediction. At least the first tubelet stays."""
    count = _tubelets(ratio, shape[0], keep=1, kind="future")
    return _span(range(shape[0] - count, shape[0]), shape)


def _tubelets(ratio: float, times: int, keep: int, kind: str) -> int:
    if times <= keep:
        raise ValueError(f"mask {kind} needs more than {keep} tubelet(s) in time, and the grid has {times}")
    return min(times - keep, max(1, round(ratio * times)))


def _span(times: range, shape: GridShape) -> Tensor:
    grid = torch.zeros(shape, dtype=torch.bool)
    grid[list(times)] = True
    return grid.flatten()


def make_mask(kind: str, ratio: float, shape: GridShape, seeds: Sequence[int] | Tensor) -> Mask:
    """One mask a sample, each from its own generator: the same seed gives the same mask in any batch.

    Args:
        kind: a name of `registry.maskers`.
        ratio: fraction of the tokens to hide, in (0, 1); `center` reads it as area, `frames` and `future` as time.
        shape: token grid (T/t, H/p, W/p).
        seeds: B integers.

    Raises:
        ValueError: an unknown kind, a ratio out of range, or a grid too short for the kind.
    """
    masker = maskers.get(kind)
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio} is not between 0 and 1")
    seeds = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    grids = [masker(shape, ratio, torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return Mask.from_grid(torch.stack(grids), shape)


def parse_mask(text: str, shape: GridShape, tubelet: int = 2, patch: int = 16) -> Callable[[Sequence[int]], Mask]:
    """Read a mask in words, as `render-inpaint --mask` takes it, and return a function from seeds (B) to a Mask.

    `KIND` or `KIND:RATIO` for the names of `registry.maskers`; `frames:FIRST-LAST` hides those frames (counted from 0,
    both included); `box:X,Y,WIDTH,HEIGHT` a rectangle at all times, or with `@FIRST-LAST` in those frames. Frames and
    pixels are rounded outwards to tokens of `tubelet` frames and `patch` x `patch` pixels.

    Raises:
        ValueError: the text is none of these, or does not fit the grid.
    """
    extent = Extent(shape[0] * tubelet, shape[1] * patch, shape[2] * patch)
    try:
        found = read_mask_text(text, extent)
        if isinstance(found, Generated):
            kind, ratio = found.kind, found.ratio
            make_mask(kind, ratio, shape, [0])  # refuse now what would fail later
            return lambda seeds: make_mask(kind, ratio, shape, seeds)
        if found is None:
            raise ValueError(f"{text.partition(':')[0]!r} is not one of {', '.join(maskers.names())}, box")
        pixels = torch.zeros(extent.frames, extent.height, extent.width, dtype=torch.bool)
        pixels[found.first : found.last + 1, found.rows, found.columns] = True
        grid = pixel_mask_to_grid(pixels, tubelet, patch).flatten()
        if bool(grid.all()):
            raise ValueError("it touches every token, and nothing stays visible")
    except ValueError as error:
        raise ValueError(
            f"mask {text!r}: {error}; write KIND:RATIO, frames:FIRST-LAST or box:X,Y,WIDTH,HEIGHT"
        ) from error
    return lambda seeds: Mask.from_grid(grid.expand(len(seeds), -1).clone(), shape)


def _flatten_mask(mask: Mask) -> tuple[list[Tensor | None], GridShape]:
    return [mask.grid, mask.visible, mask.masked, mask.visible_valid, mask.masked_valid], mask.shape


def _unflatten_mask(values: Any, shape: Any) -> Mask:
    grid, visible, masked, visible_valid, masked_valid = values
    return Mask(grid, shape, visible, masked, visible_valid, masked_valid)


# DistributedDataParallel, torch.compile and torch.export look into registered containers only
pytree.register_pytree_node(
    Mask,
    _flatten_mask,
    _unflatten_mask,
    serialized_type_name="diffmae_video.masking.Mask",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
