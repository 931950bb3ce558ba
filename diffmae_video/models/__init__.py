"""Networks: encoder, decoders, DiffMAE, classifier, and their weights."""

import diffmae_video.compat  # noqa: F401  (timm imports torchvision)
