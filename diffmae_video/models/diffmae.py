"""DiffMAE (arXiv 2304.03283): a masked autoencoder whose decoder denoises the masked patches."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmae_video import registry
from diffmae_video.config import DiffusionSettings, ModelSettings, RenderSettings
from diffmae_video.diffusion.schedule import Schedule
from diffmae_video.diffusion.targets import Target
from diffmae_video.errors import UsageError
from diffmae_video.masking import Mask
from diffmae_video.models.checkpointing import Checkpointing
from diffmae_video.models.decoder import Decoder, Encoding
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.feature_decoder import FeatureDecoder
from diffmae_video.models.hub import HubModel
from diffmae_video.models.labels import check_labels, drop_labels, guided
from diffmae_video.models.layers import seeded
from diffmae_video.models.objectives import Objective
from diffmae_video.models.patches import gather_tokens, masked_mean, patchify, pixel_bounds
from diffmae_video.models.sampling import Paste, SampleStep, sample_generators
from diffmae_video.models.space import PatchSpace

SAMPLING = RenderSettings()
"""Sampler and steps of whoever names none."""


class Draw(NamedTuple):
    """Everything random about a training step, drawn outside of it."""

    timestep: Tensor
    """int64 (B,), 0-based."""
    noise: Tensor
    """float (B, K, n), n the values that are noised (P without `model.space`); (B, 0, n) for the `mae` objective."""
    keep: Tensor | None
    """int64 (B, K): entries of the masked tokens that are predicted; None for all."""
    label: Tensor | None = None
    """int64 (B,): classes that the decoder is told of, `model.labels` where it is told none; None for none at all."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Draw:
        """The same draw on `device`."""
        return Draw(*(None if x is None else x.to(device, non_blocking=non_blocking) for x in self))  # type: ignore[arg-type]


class DiffMAEOutput(NamedTuple):
    """Result of a training step."""

    loss: Tensor
    """Scalar: mean of `per_sample`."""
    per_sample: Tensor
    """(B,) float32."""
    prediction: Tensor
    """(B, K, P) the decoder's output, in the units of the target."""


class DiffMAE(HubModel, nn.Module):
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
        self.objective: Objective = registry.objectives.get(model.objective)()
        self.schedule = Schedule.make(self.diffusion.schedule, self.diffusion.timesteps, self.diffusion.rho)
        self.signal: Tensor
        self.sigma: Tensor
        self.register_buffer("signal", self.schedule.signal.float(), persistent=False)
        self.register_buffer("sigma", self.schedule.sigma.float(), persistent=False)
        self.patch_values = values = model.tubelet * model.patch**2 * 3
        self.space = PatchSpace(model.space, values)
        self.target: Target = registry.targets.get(model.target)()
        inputs, timestep = (self.space.noised, model.timestep) if self.objective.noise else (None, "none")
        self.encoder = Encoder(model, seed)
        with seeded(seed + 1):
            self.decoder = Decoder(model, self.encoder, values, inputs, timestep)
        self.feature_decoder: FeatureDecoder | None = None
        if model.teacher is not None:
            self.feature_decoder = FeatureDecoder(model, self.encoder, teacher, seed + 2)
            width = self.feature_decoder.decoder.head.out_features
            model = model.model_copy(update={"teacher": model.teacher.model_copy(update={"width": width})})
            self.settings = model  # a saved model knows the teacher's width, and loads without the teacher

    # --- training ---------------------------------------------------------------------------------------------------

    def draw(self, seeds: Tensor | Sequence[int], mask: Mask, labels: Tensor | None = None) -> Draw:
        """Timestep, noise and predicted subset of each sample, from a generator seeded with its seed.

        A sample's draw does not depend on the rest of the batch. Noise is drawn where the mask lives.

        Args:
            labels: int64 (B,) classes of the samples, -1 for none; a model without `model.labels` is told none, others
                with probability 1 - `model.label_drop`.
        """
        mask = self.objective.mask(mask)
        device, values = mask.masked.device, self.space.noised
        counts = [mask.masked.shape[1]] * mask.batch
        if mask.masked_valid is not None:
            counts = mask.masked_valid.sum(1).tolist()
        wanted = max(1, math.ceil(max(counts) * self.settings.loss_tokens))
        drawn = min(max(counts), wanted) if self.objective.noise else 0
        make = torch.empty if mask.masked_valid is None else torch.zeros  # zero on padding
        noise = make(mask.batch, drawn, values, device=device)
        timesteps, keeps = [], []
        for row, (seed, count) in enumerate(zip(torch.as_tensor(seeds).tolist(), counts, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            timesteps.append(self.schedule.draw(self.diffusion.draw, generator))
            if self.settings.loss_tokens < 1:
                order = torch.randperm(count, generator=generator)[:wanted]
                keeps.append(F.pad(order, (0, wanted - len(order)), value=max(counts) - 1))  # (K,), pads are invalid
            if drawn:
                on_device = generator if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
                noise[row, :count].normal_(generator=on_device)  #                             (K, n)
        keep = torch.stack(keeps).to(device) if keeps else None
        label = None if labels is None or not self.settings.labels else drop_labels(labels, seeds, self.settings)
        return Draw(torch.stack(timesteps), noise, keep, label).to(device)

    def forward(
        self,
        clips: Tensor,
        mask: Mask,
        draw: Draw,
        scored: Tensor | None = None,
        encoding: Encoding | None = None,
    ) -> DiffMAEOutput:
        """Loss on masked patches.

        Args:
            clips: float (B, C, T, H, W), normalised (`patches.normalize_pixels`).
            mask: of the clips' token grid; the `ddpm` objective hides everything whatever it says.
            draw: from `draw` with the same mask.
            scored: bool (B, 1, T, H, W), True = pixels of masked patches whose error counts; all of them without it.
            encoding: of the same clips and mask (`encode`), where it is known; computed without it.
        """
        mask = self.objective.mask(mask)
        patches = patchify(clips, self.tubelet, self.patch)  #                      (B, N, P)
        index, valid = mask.masked, mask.masked_valid  #                            (B, M)
        if draw.keep is not None:
            index = index.gather(1, draw.keep)  #                                   (B, K)
            valid = None if valid is None else valid.gather(1, draw.keep)
        x_0 = self._from_pixels(gather_tokens(patches, index))  #                   (B, K, P)
        noisy, expected = None, x_0
        if self.objective.noise:
            signal, sigma = self._levels(draw.timestep)  #                          (B, 1, 1 or P) each
            noise = F.pad(draw.noise, (0, self.patch_values - self.space.noised)).to(x_0.dtype)  # (B, K, P)
            noisy = torch.addcmul(signal * x_0, sigma, noise)  #                    (B, K, P)
            expected = self.target.expected(x_0, noise, signal, sigma)  #           (B, K, P)
        encoding = encoding or self._encode(patches, noisy, mask)
        encoding = encoding._replace(label=draw.label)
        del patches  # before the decoder, where a step holds most
        prediction = self.decoder(noisy, draw.timestep, index, valid, encoding)  #  (B, K, P)
        if scored is None:
            error = F.mse_loss(prediction, expected, reduction="none").mean(2)  #   (B, K)
            per_sample = masked_mean(error, valid)  #                               (B,)
        else:
            counted = gather_tokens(patchify(scored.expand_as(clips), self.tubelet, self.patch), index)  # (B, K, P)
            counted = counted if valid is None else counted & valid[..., None]
            error = (
                self.space.turn_back(prediction - expected).float().square().where(counted, 0.0)
            )  # (B, K, P), in pixels
            per_sample = error.sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)  #    (B,)
        if self.feature_decoder is not None:
            per_sample = per_sample + self.feature_decoder.loss(clips, encoding, index, valid)
        return DiffMAEOutput(per_sample.mean(), per_sample, prediction)

    # --- inference --------------------------------------------------------------------------------------------------

    def encode(self, clips: Tensor, mask: Mask) -> Encoding:
        """Encode the visible patches of clips (B, C, T, H, W); once is enough for all diffusion steps."""
        mask = self.objective.mask(mask)
        if not self.objective.sees:  # its encoder reads noisy patches: there is nothing to keep
            return Encoding(mask, clips.new_empty(len(clips), 0, self.encoder.width), {}, None)
        return self._encode(patchify(clips, self.tubelet, self.patch), None, mask)

    def denoise(self, noisy: Tensor, timestep: Tensor, encoding: Encoding) -> Tensor:
        """Clean masked patches x_0 (B, M, P) from noisy ones (B, M, P) at timestep (B,), in the space of the target.

        Objectives without noise ignore both.
        """
        mask = encoding.mask
        read = noisy.to(self.decoder.head.weight.dtype)
        if not self.objective.sees:
            encoding = self._encode(None, read, mask)._replace(label=encoding.label)
        answer = self.decoder(read, timestep, mask.masked, mask.masked_valid, encoding)
        answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
        return self.target.x_0(answer, noisy, *self._levels(timestep))

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
        labels: Sequence[int] | Tensor | None = None,
        guidance: float = 1.0,
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
            labels: B classes of what is to be seen, for a model with `model.labels`.
            guidance: x_0 is that without a label, plus this times the difference that the label makes (classifier-free
                guidance, arXiv 2207.12598).

        Yields:
            A `SampleStep` after each prediction: the first is the masked autoencoder's answer, the last the sample.

        Raises:
            UsageError: a `norm_pixel` model without `borrow_statistics`, an unknown sampler or label.
        """
        try:
            sampling = registry.samplers.get(sampler)
        except ValueError as error:
            raise UsageError(f"render.sampler = {error}.") from error
        if self.target.borrows and not borrow_statistics:
            raise UsageError(
                "This model predicts patches normalised by their own mean and deviation, which a hidden patch does not "
                "tell: use a model with target = 'pixel', or allow borrowing the statistics, which leaks ground truth."
            )
        if not self.objective.sees:  # nothing is visible to it: the visible pixels guide it as known ones
            seen = ~mask.pixels(self.tubelet, self.patch)[:, None, : clips.shape[2]]  # (B, 1, T, H, W)
            known = seen if known is None else seen | known
        told = None if labels is None else check_labels(labels, self.settings).to(clips.device)
        encoding = self.encode(clips, mask)._replace(label=told).repeat_interleave(samples)  # B' = B * samples
        paste = Paste(clips, encoding.mask, known, self.tubelet, self.patch)
        low, high = (bound.to(clips.device) for bound in pixel_bounds(self.settings.pixel_norm, self.patch_values))

        def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
            x_0 = guided(self.denoise, noisy, timestep, encoding, guidance)  # (B', M, P)
            pixels = self._to_pixels(x_0, paste.truth)
            pixels = pixels.clamp(low, high) if clip_x0 else pixels
            return self._from_pixels(paste.keep(pixels), paste.truth)

        def to_clips(x: Tensor) -> Tensor:
            return paste(self._to_pixels(x, paste.truth))

        generators = sample_generators(seeds, samples)
        shape = (paste.truth.shape[1], self.space.noised)
        noise = [torch.randn(shape, generator=g) for g in generators]  #      (M, n), on the CPU: for any device
        x_T = F.pad(torch.stack(noise), (0, self.patch_values - shape[1]))  # (B', M, P)
        x_T = x_T.to(clips.device, torch.promote_types(clips.dtype, torch.float32))
        options: dict[str, Any] = {"generator": generators, "spacing": spacing}
        if "eta" in inspect.signature(sampling).parameters:
            options["eta"] = eta
        for step in sampling(denoise, x_T, self.schedule, steps if self.objective.noise else 1, **options):
            yield SampleStep(step.step, step.timestep, step.x_t, step.x_0, to_clips)

    # --- shared -----------------------------------------------------------------------------------------------------

    def _levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and sigma at timestep (B,): (B, 1, 1), or (B, 1, P) where not all values are noised."""
        return self.space.levels(self.signal[timestep].view(-1, 1, 1), self.sigma[timestep].view(-1, 1, 1))

    def _from_pixels(self, patches: Tensor, truth: Tensor | None = None) -> Tensor:
        """Patches in pixels as x_0: in the space of the model, then as the target has it."""
        return self.space.from_pixels(self.target.from_pixels(patches, truth))

    def _to_pixels(self, x_0: Tensor, truth: Tensor) -> Tensor:
        """And back."""
        return self.target.to_pixels(self.space.to_pixels(x_0), truth)

    def _encode(self, patches: Tensor | None, noisy: Tensor | None, mask: Mask) -> Encoding:
        read = self.objective.encoder_input(patches, noisy, mask)  #          (B, V, P)
        links = {*self.decoder.links, *(self.feature_decoder.decoder.links if self.feature_decoder else ())}
        last = self.encoder.depth - 1
        latents, features = self.encoder.forward_patches(
            read, mask.shape, mask.visible, mask.visible_valid, sorted(links - {last})
        )
        features[last] = latents  # the last block is read after the encoder's norm
        valid = mask.visible_valid
        if valid is not None:  # a class token is always real
            valid = F.pad(valid, (latents.shape[1] - valid.shape[1], 0), value=True)
        return Encoding(mask, latents, features, valid)

    # --- timm's vocabulary ------------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must not touch."""
        names = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return names | {
            name
            for name, _ in self.named_parameters()
            if "decoder.positions." in name or name.endswith(("mask_token", "cls_token", "class_position"))
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer of each parameter of the encoder; the decoder counts as the head."""
        return self.encoder.group_matcher(coarse, prefix="encoder.")

    def set_grad_checkpointing(self, enable: Checkpointing = True) -> None:
        """Recompute blocks of encoder and decoder in the backward pass, or with `selective` what is cheap in them."""
        self.encoder.set_grad_checkpointing(enable)
        for decoder in (self.decoder, self.feature_decoder and self.feature_decoder.decoder):
            if decoder is not None:
                decoder.checkpointing = enable
