"""DiffMAE for images and video: pre-training, recognition and inpainting.

The names below are the public Python interface; they load on first use, so that `import diffmae_video` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffmae_video._version import __version__

if TYPE_CHECKING:
    from diffmae_video.config import Settings, load_settings
    from diffmae_video.masking import Mask, make_mask, parse_mask
    from diffmae_video.models.classifier import Classifier
    from diffmae_video.models.diffmae import DiffMAE
    from diffmae_video.models.importers import load_pretrained
    from diffmae_video.models.patches import denormalize_pixels, normalize_pixels
    from diffmae_video.models.weights import load_model, save_model
    from diffmae_video.pipelines.evaluate import evaluate
    from diffmae_video.pipelines.finetune import finetune
    from diffmae_video.pipelines.job import Job
    from diffmae_video.pipelines.pretrain import pretrain
    from diffmae_video.rendering.inpaint import inpaint

_MODULES = {
    "config": ("Settings", "load_settings"),
    "masking": ("Mask", "make_mask", "parse_mask"),
    "models.classifier": ("Classifier",),
    "models.diffmae": ("DiffMAE",),
    "models.importers": ("load_pretrained",),
    "models.patches": ("denormalize_pixels", "normalize_pixels"),
    "models.weights": ("load_model", "save_model"),
    "pipelines.evaluate": ("evaluate",),
    "pipelines.finetune": ("finetune",),
    "pipelines.job": ("Job",),
    "pipelines.pretrain": ("pretrain",),
    "rendering.inpaint": ("inpaint",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Classifier",
    "DiffMAE",
    "Job",
    "Mask",
    "Settings",
    "__version__",
    "denormalize_pixels",
    "evaluate",
    "finetune",
    "inpaint",
    "load_model",
    "load_pretrained",
    "load_settings",
    "make_mask",
    "normalize_pixels",
    "parse_mask",
    "pretrain",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffmae_video' has no attribute '{name}'")
    return getattr(importlib.import_module(f"diffmae_video.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
