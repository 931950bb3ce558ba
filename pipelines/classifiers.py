"""Find and load what recognition works with: classifiers, encoders, and the settings they were trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmae_video.config import Settings, override_settings, read_settings, validate_settings
from diffmae_video.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FIXED_BY_WEIGHTS = (
    *("preset", "width", "depth", "heads", "mlp_ratio", "tubelet", "patch", "class_token", "positions"),
    *("qkv_bias", "layer_norm_eps", "pixel_norm"),
)
"""Fields of `model` that a checkpoint has decided."""


CLIP_FACTS = ("stride", "fps", "clip_seconds", "segments")
"""Fields of `data` that say how a clip lies in time; model.json repeats them for weights that travel alone."""


@dataclass(frozen=True)
class Loaded:
    """A model on its device, ready to use, with the settings that apply to it."""

    model: Any  # Classifier or DiffMAE
    settings: Settings
    info: dict[str, Any]  # what model.json says
    weights_sha256: str
    device: torch.device
    has_settings: bool = True  # how clips were taken in training is known
    denoises: bool = False  # it classifies by denoising

    @property
    def classes(self) -> list[str]:
        """Class names of a classifier; `class 0`, `class 1`, ... where its weights came without names."""
        count = getattr(self.model, "num_classes", 0)
        return list(self.info.get("classes") or []) or [f"class {number}" for number in range(count)]

    @property
    def named(self) -> bool:
        """Whether the class names came with the weights."""
        return bool(self.info.get("classes"))

    @property
    def precision(self) -> str:
        """`bf16`, `fp16` or `fp32`: what `evaluate.precision` means on this device."""
        from diffmae_video.training.hardware import resolve_precision

        return resolve_precision(self.settings.evaluate.precision, self.device)

    def prepare(self, clips: Tensor) -> Tensor:
        """uint8 (B, T, C, H, W) -> float (B, C, T, H, W), scaled as the model wants it."""
        from diffmae_video.models.patches import normalize_pixels

        return normalize_pixels(clips, self.settings.model.pixel_norm)

    def autocast(self) -> Any:
        """The context in which the forward pass runs."""
        from diffmae_video.training.hardware import autocast

        return autocast(self.device, self.precision)

    def probabilities(self, clips: Tensor) -> Tensor:
        """Softmax of the logits of clips uint8 (B, T, C, H, W): (B, K) float32."""
        with self.autocast():
            logits = self.model(self.prepare(clips))
        return logits.float().softmax(dim=-1)


def load(source: str | Path, device: torch.device, overrides: Sequence[str] = (), seed: int | None = None) -> Loaded:
    """Load a run (or weights of ours) with the settings saved beside it, changed by `--set` where weights allow.

    Raises:
        UsageError: a `--set` of what the weights have decided.
    """
    from diffmae_video.models.weights import load_model, saved_sha256
    from diffmae_video.training.hardware import swap_kernels

    model = load_model(source)
    settings = settings_beside(source, model, overrides, seed)
    model.eval().requires_grad_(False)
    known = _settings_file(source).is_file() or "stride" in model.info
    loaded = Loaded(model.to(device), settings, dict(model.info), saved_sha256(source), device, known)
    swap_kernels(model, device, loaded.precision)
    return loaded


def load_classifier(
    source: str | Path, device: torch.device, overrides: Sequence[str] = (), seed: int | None = None
) -> Loaded:
    """Like `load`, for a model that classifies.

    Raises:
        DataError: the weights are those of a pre-training.
    """
    loaded = load(source, device, overrides, seed)
    if not getattr(loaded.model, "num_classes", 0):  # a pre-training knows the classes of its data, too
        raise DataError(f"{source} is no classifier; fine-tune it first with `diffmae finetune --task NAME`.")
    return loaded


def load_denoiser(
    source: str | Path, device: torch.device, overrides: Sequence[str] = (), seed: int | None = None
) -> Loaded:
    """Like `load`, for a pre-training with labels that classifies by denoising.

    Raises:
        DataError: the weights are no pre-training.
        UsageError: it was trained without labels.
    """
    from diffmae_video.evaluation.denoising import DenoisingClassifier
    from diffmae_video.models.diffmae import DiffMAE

    loaded = load(source, device, overrides, seed)
    if not isinstance(loaded.model, DiffMAE):
        raise DataError(f"{source} is a classifier, which cannot denoise; give a pre-training run as --checkpoint.")
    model = DenoisingClassifier(loaded.model, loaded.settings.mask, loaded.settings.evaluate.draws)
    return replace(loaded, model=model, denoises=True)


def settings_beside(source: str | Path, model: Any, overrides: Sequence[str] = (), seed: int | None = None) -> Settings:
    """Settings of the run that made a model: config.toml beside its weights, or what model.json tells.

    MAE-ST's weights have seen clips at 30 frames a second.

    Raises:
        UsageError: settings that are not valid, or a `--set` of what the weights have decided.
    """
    file = _settings_file(source)
    if file.is_file():
        settings = read_settings(file)
    else:
        told = {key: model.info[key] for key in CLIP_FACTS if model.info.get(key)}
        if model.info.get("imported_from") == "mae_st" and "stride" not in told:
            told["fps"] = 30.0
        settings = validate_settings({"model": model.encoder.settings.model_dump(), "data": told}, str(source))
    changed = override_settings(settings, overrides, seed)
    for name in FIXED_BY_WEIGHTS:
        before, after = getattr(settings.model, name), getattr(changed.model, name)
        if before != after:
            raise UsageError(f"--set model.{name}={after}: the weights of {source} have {before}; leave it out.")
    return changed


def _settings_file(source: str | Path) -> Path:
    return (Path(source) if Path(source).is_dir() else Path(source).parent) / "config.toml"
