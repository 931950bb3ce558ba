"""DiffMAE for images and video: pre-training, recognition and inpainting."""

from diffmae_video._version import __version__

__all__ = ["__version__"]
