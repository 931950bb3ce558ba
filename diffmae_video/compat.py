"""Cures that make torchvision and pytorchvideo importable where a plain import fails; no-ops elsewhere.

Import this module before either of them.
"""

from __future__ import annotations

import importlib
import sys

import torch


def cure_torchvision() -> bool:
    """Declare the two operators whose absence makes a CUDA-built torchvision fail beside a CPU torch.

    torchvision registers shape functions for `nms` and `qnms` at import, which its compiled library defines; without
    that library the import ends with "operator torchvision::nms does not exist".

    Returns:
        Whether anything had to be done.
    """
    if "torchvision" in sys.modules:
        return False
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "qnms(Tensor dets, Tensor scores, float iou_threshold, float score_scale, int score_zero_point) -> Tensor"
    )
    _libraries.append(library)  # operators vanish with their Library
    importlib.import_module("torchvision")
    return True


def cure_pytorchvideo() -> bool:
    """Give pytorchvideo 0.1.5 the module that torchvision renamed in 0.17 (`functional_tensor`).

    Returns:
        Whether anything had to be done.
    """
    name = "torchvision.transforms.functional_tensor"
    if name in sys.modules:
        return False
    try:
        importlib.import_module(name)
        return False
    except ModuleNotFoundError:
        sys.modules[name] = importlib.import_module("torchvision.transforms._functional_tensor")
        return True


_libraries: list[torch.library.Library] = []

cure_torchvision()
cure_pytorchvideo()
