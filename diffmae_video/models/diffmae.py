"""DiffMAE (arXiv 2304.03283): a masked autoencoder whose decoder denoises the masked patches.

Letters: B batch, C channels, T H W frames and pixels, t p tubelet and patch, N tokens, V visible, M masked (K of them
predicted in a training step), D encoder width, E decoder width, P = t * p * p * C values of a patch.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmae_video import registry
from diffmae_video.config import DiffusionSettings, ModelSettings, RenderSettings
from diffmae_video.diffusion.schedule import Schedule
from diffmae_video.errors import UsageError
from diffmae_video.masking import Mask
from diffmae_video.models.decoder import Decoder
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.layers import seeded
from diffmae_video.models.patches import (
    gather_tokens,
    grid_shape,
    normalize_patches,
    patch_statistics,
    patchify,
    pixel_bounds,
    scatter_tokens,
    unpatchify,
)

SAMPLING = RenderSettings()
"""Sampler and steps of whoever names none."""


class Draw(NamedTuple):
    """Everything random about a training step, drawn outside of it."""

    timestep: Tensor
    """int64 (B,), 0-based."""
    noise: Tensor
    """float (B, K, P); (B, 0, P) for the `mae` objective."""
    keep: Tensor | None
    """int64 (B, K): entries of the masked tokens that are predicted; None for all."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Draw:
        """The same draw on `device`."""
        return Draw(*(x if x is None else x.to(device, non_blocking=non_blocking) for x in self))


class Encoding(NamedTuple):
    """What the decoder needs of the visible patches; it is the same at every diffusion step."""

    mask: Mask
    latents: Tensor
    """(B, V, D) after the last norm, class token first where there is one."""
    features: dict[int, Tensor]
    """Outputs (B, V, D) of the linked encoder blocks."""
    valid: Tensor | None
    """bool like the tokens of `latents`, False on padding."""

    def repeat_interleave(self, times: int) -> Encoding:
        """Every sample `times` times in a row."""
        return Encoding(
            self.mask.repeat_interleave(times),
            self.latents.repeat_interleave(times, 0),
            {block: feature.repeat_interleave(times, 0) for block, feature in self.features.items()},
            None if self.valid is None else self.valid.repeat_interleave(times, 0),
        )


class DiffMAEOutput(NamedTuple):
    """Result of a training step."""

    loss: Tensor
    """Scalar: mean of `per_sample`."""
    per_sample: Tensor
    """(B,) float32."""
    prediction: Tensor
    """(B, K, P) the decoder's output, in the units of the target."""


class SampleStep(NamedTuple):
    """One denoising step of `DiffMAE.sample_steps`; clips are made when asked for."""

    step: int
    """0 for the first."""
    timestep: int
    """Index of the training schedule."""
    x_t: Tensor
    """(B * samples, M, P) the noisy state of the masked patches."""
    x_0: Tensor
    """(B * samples, M, P) the prediction made from it."""
    paste: Callable[[Tensor], Tensor]
    """Masked patches (B * samples, M, P) to clips."""

    def clips(self) -> Tensor:
        """The prediction of x_0 pasted into the clips, (B * samples, C, T, H, W), samples of a clip in a row."""
        return self.paste(self.x_0)

    def noisy_clips(self) -> Tensor:
        """The noisy state x_t likewise; noise goes beyond black and white."""
        return self.paste(self.x_t)


class DiffMAE(nn.Module):
    """Encoder of visible patches, decoder that denoises masked ones, and the objective between them.

    Args:
        model: sizes, decoder, objective and target.
        diffusion: noise schedule.
        seed: of the initial weights.
        teacher: frozen network with `.width`, images in [0, 1] (B, C, H, W) -> tokens (B, h * w, width) of a square
            grid, or a map (B, width, h, w); built from `model.teacher` when None. Not used without `model.teacher`.
    """

    def __init__(
        self, model: ModelSettings, diffusion: DiffusionSettings | None = None, seed: int = 0, teacher: Any = None
    ) -> None:
        super().__init__()
        self.settings, self.diffusion = model, diffusion or DiffusionSettings()
        self.info: dict[str, Any] = {}
        self.tubelet, self.patch = model.tubelet, model.patch
        self.schedule = Schedule.make(self.diffusion.schedule, self.diffusion.timesteps, self.diffusion.rho)
        self.register_buffer("signal", self.schedule.signal.float(), persistent=False)
        self.register_buffer("sigma", self.schedule.sigma.float(), persistent=False)
        self.encoder = Encoder(model, seed)
        self.patch_values = values = model.tubelet * model.patch**2 * 3
        noisy = model.objective != "mae"
        with seeded(seed + 1):
            self.decoder = Decoder(
                model,
                self.encoder.width,
                self.encoder.depth,
                self.encoder.shape,
                outputs=values,
                inputs=values if noisy else None,
                timestep=model.timestep if noisy else "none",
            )
        self.feature_decoder = None
        if model.teacher is not None:
            from diffmae_video.models.targets import FeatureDecoder

            self.feature_decoder = FeatureDecoder(model, self.encoder, teacher, seed + 2)
            model = model.model_copy(update={"teacher": model.teacher.model_copy(update={"width": self._width()})})
            self.settings = model  # a saved model knows the teacher's width, and loads without the teacher

    # --- training ---------------------------------------------------------------------------------------------------

    def draw(self, seeds: Tensor | Sequence[int], mask: Mask) -> Draw:
        """Timestep, noise and predicted subset of each sample, from a generator seeded with its seed.

        A sample's draw does not depend on the rest of the batch. Noise is drawn where the mask lives.
        """
        mask = self._mask(mask)
        device, values = mask.masked.device, self.patch_values
        counts = [mask.masked.shape[1]] * mask.batch
        if mask.masked_valid is not None:
            counts = mask.masked_valid.sum(1).tolist()
        wanted = max(1, math.ceil(max(counts) * self.settings.loss_tokens))
        drawn = 0 if self.settings.objective == "mae" else min(max(counts), wanted)
        make = torch.empty if mask.masked_valid is None else torch.zeros  # zero on padding
        noise = make(mask.batch, drawn, values, device=device)
        timesteps, keeps = [], []
        for row, (seed, count) in enumerate(zip(torch.as_tensor(seeds).tolist(), counts, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            timesteps.append(torch.randint(len(self.schedule), (), generator=generator))
            if self.settings.loss_tokens < 1:
                order = torch.randperm(count, generator=generator)[:wanted]
                keeps.append(F.pad(order, (0, wanted - len(order)), value=max(counts) - 1))  # (K,), pads are invalid
            if drawn:
                on_device = generator if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
                noise[row, :count].normal_(generator=on_device)  #                             (K, P)
        keep = torch.stack(keeps).to(device) if keeps else None
        return Draw(torch.stack(timesteps).to(device), noise, keep)

    def forward(self, clips: Tensor, mask: Mask, draw: Draw) -> DiffMAEOutput:
        """Loss on masked patches.

        Args:
            clips: float (B, C, T, H, W), normalised (`patches.normalize_pixels`).
            mask: of the clips' token grid; the `ddpm` objective hides everything whatever it says.
            draw: from `draw` with the same mask.
        """
        mask = self._mask(mask)
        patches = patchify(clips, self.tubelet, self.patch)  #                (B, N, P)
        index, valid = mask.masked, mask.masked_valid  #                      (B, M)
        if draw.keep is not None:
            index = index.gather(1, draw.keep)  #                             (B, K)
            valid = None if valid is None else valid.gather(1, draw.keep)
        clean = gather_tokens(patches, index)  #                              (B, K, P)
        if self.settings.target == "norm_pixel":
            clean = normalize_patches(clean)
        noisy = target = None
        if self.settings.objective != "mae":
            signal = self.signal[draw.timestep].view(-1, 1, 1)
            sigma = self.sigma[draw.timestep].view(-1, 1, 1)
            noisy = (signal * clean).addcmul_(sigma, draw.noise)  #           (B, K, P)
            if torch.is_autocast_enabled(noisy.device.type):  # as its only reader would: half of it then lives on
                noisy = noisy.to(torch.get_autocast_dtype(noisy.device.type))
        if self.settings.target == "noise":
            target = draw.noise
        elif self.settings.target == "velocity":
            target = signal * draw.noise - sigma * clean
        else:
            target = clean
        encoding = self._encode_patches(patches, mask, noisy)
        del patches  # before the decoder, where a step holds most
        prediction = self._decode(noisy, draw.timestep, encoding, index, valid)
        per_sample = _masked_mean(_SquaredError.apply(prediction, target), valid)  # (B,)
        if self.feature_decoder is not None:
            per_sample = per_sample + self.feature_decoder.loss(clips, encoding, index, valid)
        return DiffMAEOutput(per_sample.mean(), per_sample, prediction)

    # --- inference --------------------------------------------------------------------------------------------------

    def encode(self, clips: Tensor, mask: Mask) -> Encoding:
        """Encode the visible patches of clips (B, C, T, H, W); once is enough for all diffusion steps."""
        mask = self._mask(mask)
        if self.settings.objective == "ddpm":  # its encoder reads noisy patches: there is nothing to keep
            return Encoding(mask, clips.new_empty(len(clips), 0, self.encoder.width), {}, None)
        return self._encode_patches(patchify(clips, self.tubelet, self.patch), mask, None)

    def denoise(self, noisy: Tensor, timestep: Tensor, encoding: Encoding) -> Tensor:
        """Clean masked patches x_0 (B, M, P) from noisy ones (B, M, P) at timestep (B,), in the target's pixel space.

        The `mae` objective ignores both.
        """
        mask = encoding.mask
        if self.settings.objective == "ddpm":
            encoding = self._encode_patches(None, mask, noisy)
        prediction = self._decode(noisy, timestep, encoding, mask.masked, mask.masked_valid).float()
        if self.settings.target == "noise":
            signal, sigma = self.signal[timestep].view(-1, 1, 1), self.sigma[timestep].view(-1, 1, 1)
            return (noisy - sigma * prediction) / signal
        if self.settings.target == "velocity":
            signal, sigma = self.signal[timestep].view(-1, 1, 1), self.sigma[timestep].view(-1, 1, 1)
            return signal * noisy - sigma * prediction
        return prediction

    def sample(self, clips: Tensor, mask: Mask, *, samples: int = 1, **options: Any) -> Tensor:
        """Fill the masked patches of clips; visible (and known) pixels come back bit for bit.

        Arguments are those of `sample_steps`, whose last step this is.

        Returns:
            (B, C, T, H, W), or (B, samples, C, T, H, W) for several samples.
        """
        last = deque(self.sample_steps(clips, mask, samples=samples, **options), maxlen=1)[0]
        filled = last.clips()
        return filled if samples == 1 else filled.unflatten(0, (-1, samples))

    @torch.no_grad()
    def sample_steps(
        self,
        clips: Tensor,
        mask: Mask,
        *,
        seeds: Sequence[int] | Tensor,
        sampler: str = SAMPLING.sampler,
        steps: int = SAMPLING.steps,
        eta: float = SAMPLING.eta,
        spacing: str = "angle",
        samples: int = 1,
        known: Tensor | None = None,
        clip_x0: bool = True,
        borrow_statistics: bool = False,
    ) -> Iterator[SampleStep]:
        """Fill the masked patches of clips step by step.

        Args:
            clips: float (B, C, T, H, W), normalised; what stands under the mask is not read.
            mask: of the clips' token grid.
            seeds: B integers; sample k of clip b depends on (seeds[b], k) alone, not on the batch.
            sampler: a name of `registry.samplers`: `ddpm`, `ddim`, `dpm++`.
            steps: denoising steps, 1 to the schedule's length. The `mae` objective takes one whatever this says.
            eta: stochasticity of samplers that have one (DDIM).
            spacing: where the steps lie on the schedule: `angle` or `even`, see `Schedule.respace`.
            samples: per clip, from one encoding.
            known: bool (B, 1 or C, T, H, W), True = pixels inside masked patches that are known: they guide every step.
            clip_x0: keep each prediction within black and white.
            borrow_statistics: let a `norm_pixel` model take mean and deviation of each hidden patch from the clip.

        Yields:
            A `SampleStep` after each prediction: the first is the masked autoencoder's answer, the last the sample.

        Raises:
            UsageError: a `norm_pixel` model without `borrow_statistics`, or an unknown sampler.
        """
        try:
            sampling = registry.samplers.get(sampler)
        except ValueError as error:
            raise UsageError(f"render.sampler = {error}.") from error
        normed = self.settings.target == "norm_pixel"
        if normed and not borrow_statistics:
            raise UsageError(
                "This model predicts patches normalised by their own mean and deviation, which a hidden patch does not "
                "tell: use a model with target = 'pixel', or allow borrowing the statistics, which leaks ground truth."
            )
        if self.settings.objective == "ddpm":  # nothing is visible to it: the visible pixels guide it as known ones
            seen = ~mask.pixels(self.tubelet, self.patch)[:, None, : clips.shape[2]]  # (B, 1, T, H, W)
            known = seen if known is None else seen | known
        mask = self._mask(mask)
        shape = grid_shape(*clips.shape[2:], self.tubelet, self.patch)
        patches = patchify(clips, self.tubelet, self.patch).repeat_interleave(
            samples, 0
        )  # (B', N, P), B' = B * samples
        encoding = self.encode(clips, mask).repeat_interleave(samples)
        mask = encoding.mask
        given = None if known is None else self._gather_known(known, clips, mask, samples)  # bool (B', M, P)
        under = gather_tokens(patches, mask.masked)  #                                        (B', M, P)
        mean, std = patch_statistics(under) if normed else (0.0, 1.0)
        low, high = (bound.to(clips.device) for bound in pixel_bounds(self.settings.pixel_norm, self.patch_values))

        def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
            x0 = self.denoise(noisy, timestep, encoding) * std + mean
            if clip_x0:
                x0 = x0.clamp(low, high)
            if given is not None:
                x0 = torch.where(given, under, x0)
            return (x0 - mean) / std

        def clip_of(x0: Tensor) -> Tensor:
            return self._paste(patches, mask, x0 * std + mean, shape, clips, known, samples)

        generators = [_generator(seed, k) for seed in torch.as_tensor(seeds).tolist() for k in range(samples)]
        noise = [torch.randn(under.shape[1:], generator=g) for g in generators]  # on the CPU: the same on any device
        x = torch.stack(noise).to(clips.device)  #                            (B', M, P)
        options: dict[str, Any] = {"generator": generators, "spacing": spacing}
        if "eta" in inspect.signature(sampling).parameters:
            options["eta"] = eta
        for step in sampling(denoise, x, self.schedule, 1 if self.settings.objective == "mae" else steps, **options):
            yield SampleStep(*step, clip_of)

    # --- shared -----------------------------------------------------------------------------------------------------

    def _width(self) -> int:
        return self.feature_decoder.decoder.head.out_features

    def _mask(self, mask: Mask) -> Mask:
        if self.settings.objective != "ddpm":
            return mask
        every = torch.arange(mask.grid.shape[1], device=mask.grid.device).expand(mask.batch, -1)
        return Mask(torch.ones_like(mask.grid), mask.shape, every, every)

    def _encode_patches(self, patches: Tensor | None, mask: Mask, noisy: Tensor | None) -> Encoding:
        clean = self.settings.objective != "ddpm"
        seen = gather_tokens(patches, mask.visible) if clean else noisy  #     (B, V, P)
        links = list(() if self.decoder.latent_embed is not None else self.decoder.links)
        if self.feature_decoder is not None and links:
            links += self.feature_decoder.decoder.links
        keep = [link for link in links if link != self.encoder.depth - 1]
        latents, features = self.encoder.forward_patches(seen, mask.shape, mask.visible, mask.visible_valid, keep)
        features[self.encoder.depth - 1] = latents  # the last block is read after the encoder's norm
        valid = mask.visible_valid
        if valid is not None and latents.shape[1] > valid.shape[1]:
            valid = F.pad(valid, (1, 0), value=True)
        return Encoding(mask, latents, features, valid)

    def _decode(
        self, noisy: Tensor | None, timestep: Tensor, encoding: Encoding, index: Tensor, valid: Tensor | None
    ) -> Tensor:
        mask = encoding.mask
        return self.decoder(
            noisy,
            timestep,
            index,
            valid,
            mask.shape,
            encoding.latents,
            encoding.features,
            mask.visible,
            encoding.valid,
        )

    def _gather_known(self, known: Tensor, clips: Tensor, mask: Mask, samples: int) -> Tensor:
        known = patchify(known.expand_as(clips), self.tubelet, self.patch).repeat_interleave(samples, 0)
        return gather_tokens(known, mask.masked)

    def _paste(
        self,
        patches: Tensor,
        mask: Mask,
        x0: Tensor,
        shape: tuple[int, int, int],
        clips: Tensor,
        known: Tensor | None,
        samples: int,
    ) -> Tensor:
        filled = scatter_tokens(patches, mask.masked, x0, mask.masked_valid)
        filled = unpatchify(filled, shape, self.tubelet, self.patch)  #       (B', C, T, H, W)
        original = clips.repeat_interleave(samples, 0)
        if clips.shape[2] == 1 and filled.shape[2] > 1:  # an image: the tubelet's frames are two views of one
            filled = filled.mean(2, keepdim=True)
        hidden = mask.pixels(self.tubelet, self.patch)[:, None, : clips.shape[2]]  # (B', 1, T, H, W)
        if known is not None:
            hidden = hidden & ~known.repeat_interleave(samples, 0)
        return torch.where(hidden, filled, original)

    # --- timm's vocabulary ------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must not touch."""
        names = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return names | {
            name
            for name, _ in self.named_parameters()
            if "decoder.positions." in name or name.endswith(("mask_token", "cls_token"))
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer of each parameter of the encoder; the decoder counts as the head."""
        return self.encoder.group_matcher(coarse, prefix="encoder.")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks of encoder and decoder in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable


class _SquaredError(torch.autograd.Function):
    """Mean squared error (B, K) of predictions and targets (B, K, P), in at least float32.

    Patches are the largest tensors of a step. Here one pass makes the error and its norm, one the error again and the
    gradient, and on CPUs both go through the tokens in pieces that stay in the cache: no error of all patches is held.
    """

    PIECE = 256  # tokens: 1.5 MiB of errors for patches of 2 x 16 x 16

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(prediction, target)
        norms = [torch.linalg.vector_norm(error, dim=1) for error in _SquaredError.errors(prediction, target)]
        return torch.cat(norms).view(prediction.shape[:2]).square() / prediction.shape[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        prediction, target = ctx.saved_tensors
        scales = (grad * (2 / prediction.shape[2])).view(-1, 1).split(_SquaredError.piece(prediction))
        errors = _SquaredError.errors(prediction, target)
        pieces = [(error * scale).to(prediction.dtype) for error, scale in zip(errors, scales, strict=True)]
        return torch.cat(pieces).view_as(prediction), None

    @staticmethod
    def errors(prediction: Tensor, target: Tensor) -> Iterator[Tensor]:
        """prediction - target of some tokens (k, P) after the other."""
        wide = torch.promote_types(target.dtype, torch.float32)
        piece = _SquaredError.piece(prediction)
        for ours, true in zip(prediction.flatten(0, 1).split(piece), target.flatten(0, 1).split(piece), strict=True):
            yield ours - true.to(wide)

    @staticmethod
    def piece(prediction: Tensor) -> int:
        """How many tokens at a time."""
        cached = prediction.device.type == "cpu" and not torch.compiler.is_compiling()
        return _SquaredError.PIECE if cached else prediction.shape[0] * prediction.shape[1]


def _masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.mean(1)
    return (values * valid).sum(1) / valid.sum(1).clamp(min=1)


def _generator(seed: int, k: int) -> torch.Generator:
    """Generator of sample k of a clip: sample 0 is the clip's own seed, the others are spread by an odd constant."""
    return torch.Generator().manual_seed((seed + k * 0x9E3779B97F4A7C15) % 2**63)
