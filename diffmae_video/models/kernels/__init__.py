"""Kernels for one kind of processor; the model does not know of them: each is swapped in from outside, by one call."""

from __future__ import annotations

from diffmae_video.models.kernels.attention import use_cpu_bf16

__all__ = ["use_cpu_bf16"]
