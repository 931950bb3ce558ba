"""Pre-training as a task for the training loop: mask, draw, denoise; validation loss and pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffmae_video.config import MaskChoice, MaskSettings, Settings
from diffmae_video.data.stream import Batch
from diffmae_video.masking import Mask, make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.initial import start_from
from diffmae_video.models.patches import denormalize_pixels, grid_shape, normalize_pixels, patchify, unpatchify
from diffmae_video.registry import tasks
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.streams import open_stream, validation_opener
from diffmae_video.training.task import LossOutput, TaskSetup

PICTURE_CLIPS = 4  # clips in a picture
PICTURE_FRAMES = 8  # columns of a picture, at most
SPACE_CLIPS = 256  # clips that the statistics of patches come from
VALIDATION_BATCH = 32  # clips at once: without gradients they fit where training fits
VALIDATION_CLIPS = 512  # a fixed part of the validation split is enough for a loss curve


@tasks.register("pretrain")
class PretrainTask:
    """DiffMAE's loss on batches of one or several sources.

    Args:
        model: to train.
        settings: mask and pixel scaling; `data.sources` where the batches come from a mix.
        open_validation: (clips per batch) -> a stream over one pass of the validation split, or None where there is
            no such split.
        distributed: the processes.
        describe: facts for model.json.
    """

    monitor = ("val_loss", "min")

    def __init__(
        self,
        model: DiffMAE,
        settings: Settings,
        open_validation: Callable[[int, bool], Any] | None,
        distributed: Distributed,
        describe: dict[str, Any],
    ) -> None:
        self.model, self.settings, self.distributed, self.describe = model, settings, distributed, describe
        self.open_validation = open_validation
        sources = settings.data.sources
        self.masks = [source.mask or settings.mask for source in sources] or [settings.mask]
        self._shown: Batch | None = None

    @classmethod
    def build(cls, setup: TaskSetup) -> PretrainTask:
        """A new DiffMAE by the settings, with the weights of `setup.init` where they fit.

        Raises:
            UsageError: the encoder of those weights is another one.
        """
        settings = setup.settings
        model = DiffMAE(settings.model, settings.diffusion, seed=settings.seed)
        if setup.init is not None:
            setup.say(start_from(model, setup.init, setup.facts.get("init")))
        if model.space.missing:  # a run that is continued brings its own in its checkpoint
            with contextlib.closing(open_stream(settings, 0, 1)) as stream:
                estimate_space(model, stream)
            setup.say(describe_space(model))
        return cls(model, settings, validation_opener(settings, setup.processes), setup.processes, setup.facts)

    def open_stream(self, rank: int, world: int) -> Any:
        """Training batches of one folder of shards, or of `data.sources`."""
        return open_stream(self.settings, rank, world)

    def _prepare(self, batch: Batch, device: torch.device, mask: MaskSettings | MaskChoice) -> tuple[Tensor, Mask]:
        clips = normalize_pixels(batch.clips.to(device, non_blocking=True), self.settings.model.pixel_norm)
        shape = grid_shape(*clips.shape[2:], tubelet=self.model.tubelet, patch=self.model.patch)
        return clips, make_mask(mask.kind, mask.ratio, shape, mask_seeds(batch.seeds)).to(device)

    def loss(self, model: nn.Module, batch: Batch, device: torch.device) -> LossOutput:
        """Mean squared error on the masked patches; mask, timestep and noise of a clip come from its own seed."""
        chosen = choose_mask(self.masks[batch.source], batch.seeds)
        parts = {name: getattr(batch, name)[batch.part] for name in ("clips", "seeds", "labels")}
        batch = replace(batch, **parts)
        clips, mask = self._prepare(batch, device, chosen)
        output = model(clips, mask, self.model.draw(batch.seeds, mask, batch.labels))
        metrics = {}
        if len(self.masks) > 1:  # a mix: one curve a source; zero where the batch was of another
            for number in range(len(self.masks)):
                here = output.loss.detach() if number == batch.source else torch.zeros((), device=device)
                metrics[f"loss_source_{number}"] = here
        return LossOutput(output.loss, output.per_sample.detach(), metrics)

    @torch.no_grad()
    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Loss on the first clips of the validation split, with masks and noise that never change."""
        if self.open_validation is None:
            return {}
        total = torch.zeros(3, dtype=torch.float64)  # losses, clips, unreadable samples
        limit = VALIDATION_CLIPS // self.distributed.world
        size = max(1, min(VALIDATION_BATCH, self.settings.train.batch_size // self.distributed.world))
        if self.distributed.world > 1 and self.settings.train.sharding == "fsdp":
            size, limit = min(size, 8), 0  # ranks must compute in step: one batch each, which all of them have
        stream = self.open_validation(size, False)
        try:
            for batch in stream:
                clips, mask = self._prepare(batch, self.distributed.device, self.settings.mask)
                output = model(clips, mask, self.model.draw(batch.seeds, mask, batch.labels))
                total[0] += output.per_sample.sum().cpu().double()
                total[1] += len(clips)
                if total[1] >= limit:
                    break
            total[2] = sum(stream.bad.values())
        finally:
            stream.close()
        total = self.distributed.sum(total)
        found = {"val_loss": float(total[0] / total[1])} if total[1] else {}
        return found | ({"val_unreadable": float(total[2])} if total[2] else {})

    @torch.no_grad()
    def pictures(self, model: Any, step: int) -> dict[str, np.ndarray]:
        """`reconstruction`: for each clip the rows input, masked, one step (the MAE picture), full sampling, some
        frames of each; `sampling`: input, masked and result side by side as video."""
        if self.open_validation is None:
            return {}
        if self._shown is None:
            stream = self.open_validation(PICTURE_CLIPS, True)
            self._shown = next(iter(stream), None)
            stream.close()
        batch = self._shown
        if batch is None:
            return {}
        clips, mask = self._prepare(batch, self.distributed.device, self.settings.mask)
        render = self.settings.render
        first: Any = None
        last: Any = None
        for last in model.sample_steps(
            clips,
            mask,
            seeds=batch.seeds,
            sampler=render.sampler,
            steps=render.steps,
            eta=render.eta,
            borrow_statistics=self.model.target.borrows,
        ):
            first = first or last
        norm = self.settings.model.pixel_norm
        source, one, full = (denormalize_pixels(x, norm).cpu() for x in (clips, first.clips(), last.clips()))
        hidden = hide(source, mask, self.model.tubelet, self.model.patch)
        rows = [source, hidden, one, full]  # each uint8 (B, T, C, H, W)
        pictures = {"reconstruction": frame_sheet(rows)}
        if source.shape[1] > 1:
            side = torch.cat([source[0], hidden[0], full[0]], dim=3)  # (T, C, H, 3W)
            pictures["sampling"] = side.permute(0, 2, 3, 1).numpy()
        return pictures

    def info(self) -> dict[str, Any]:
        """For model.json."""
        return dict(self.describe)


def estimate_space(model: DiffMAE, stream: Iterable[Batch]) -> None:
    """Give the model the statistics of patches that its `space` needs, from the first clips of a stream.

    The stream is that of one process: every rank that reads it comes to the same statistics.
    """

    def patches() -> Iterator[Tensor]:
        clips = 0
        for batch in stream:
            yield patchify(normalize_pixels(batch.clips, model.settings.pixel_norm), model.tubelet, model.patch)
            clips += len(batch.clips)
            if clips >= SPACE_CLIPS:
                return

    model.space.estimate(patches())


def describe_space(model: DiffMAE) -> str:
    """One line on the components that are noised."""
    space = model.space
    return (
        f"Patches are noised in their first {space.noised} of {space.values} principal components, which hold "
        f"{space.kept:.1%} of their variance."
    )


def choose_mask(mask: MaskSettings, seeds: Tensor) -> MaskSettings | MaskChoice:
    """The mask of a batch, by its first seed: one of a mix, as often as its weight says."""
    if not mask.mix:
        return mask
    choices = (mask, *mask.mix)
    weights = torch.tensor([1.0, *(choice.weight for choice in mask.mix)])
    generator = torch.Generator().manual_seed(int(mask_seeds(seeds[:1])) ^ 1)  # apart from the mask's own
    return choices[int(torch.multinomial(weights, 1, generator=generator))]


def mask_seeds(seeds: Tensor) -> Tensor:
    """Seeds of the masks, apart from the seeds of timestep and noise, so that the two draws are independent."""
    return (seeds * 6364136223846793005 + 1442695040888963407) & (2**62 - 1)


def hide(clips: Tensor, mask: Mask, tubelet: int, patch: int) -> Tensor:
    """Clips uint8 (B, T, C, H, W) with masked patches grey."""
    frames, _, height, width = clips.shape[1:]
    values = mask.grid.cpu()[:, :, None].expand(-1, -1, tubelet * patch * patch * 3).float()  # (B, N, P)
    shape = grid_shape(frames, height, width, tubelet, patch)
    where = unpatchify(values, shape, tubelet, patch)[:, :, :frames].transpose(1, 2) > 0  # (B, T, C, H, W)
    return torch.where(where, torch.full_like(clips, 118), clips)


def frame_sheet(rows: Sequence[Tensor]) -> np.ndarray:
    """One image uint8 (H', W', 3): per clip all rows, up to PICTURE_FRAMES frames each; small frames are enlarged."""
    frames = rows[0].shape[1]
    columns = np.unique(np.linspace(0, frames - 1, min(frames, PICTURE_FRAMES)).round().astype(int))
    stacked = torch.stack(list(rows), dim=1)[:, :, columns]  # (B, rows, columns, C, H, W)
    stacked = torch.nn.functional.pad(stacked, (1, 1, 1, 1), value=255)
    batch, lines, count, channels, height, width = stacked.shape
    sheet = stacked.permute(0, 1, 4, 2, 5, 3).reshape(batch * lines * height, count * width, channels).numpy()
    scale = max(1, 96 // height)
    return sheet.repeat(scale, 0).repeat(scale, 1)
