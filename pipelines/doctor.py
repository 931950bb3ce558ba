"""`diffmae doctor`: is everything here that the stages need?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil

_LOW_DISK_GIB = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `broken` means that a stage will fail because of it."""

    what: str
    found: str
    remedy: str = ""
    broken: bool = False


def examine() -> list[Finding]:
    """Look at the interpreter, packages, devices, codecs and disk; a failing check never hides the others."""
    checks: tuple[Callable[[], list[Finding]], ...] = (_system, _packages, _devices, _codecs, _cures, _disk)
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            remedy = "reinstall the packages: pip install --force-reinstall diffmae-video"
            findings.append(Finding(check.__name__.strip("_"), f"{type(error).__name__}: {error}", remedy, broken=True))
    return findings


def _system() -> list[Finding]:
    from diffmae_video.training.hardware import core_count

    memory, gib, cores = psutil.virtual_memory(), 2**30, core_count()
    return [
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("cores, memory", f"{cores} cores, {memory.total / gib:.1f} GiB ({memory.available / gib:.1f} free)"),
    ]


def _packages() -> list[Finding]:
    needed = ("torch", "torchvision", "av", "pytorchvideo", "webdataset", "timm", "fsspec", "safetensors", "numpy")
    optional = {
        "s3fs": "s3",
        "gcsfs": "gcs",
        "distributed": "dask",
        "open_clip_torch": "clip",
        "wandb": "wandb",
        "trackio": "trackio",
        "mlflow": "mlflow",
    }
    findings = [Finding("diffmae-video", _version("diffmae-video") or "not installed")]
    for name in needed:
        version = _version(name)
        findings.append(Finding(name, version or "missing", "" if version else f"pip install {name}", not version))
    for name, extra in optional.items():
        version = _version(name)
        remedy = "" if version else f"only if wanted: pip install 'diffmae-video[{extra}]'"
        findings.append(Finding(f"{name} (optional)", version or "not installed", remedy))
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    import torch

    from diffmae_video.training.hardware import choose_precision, pick_device

    findings = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            findings.append(Finding(f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"))
    elif shutil.which("nvidia-smi"):
        remedy = "install the CUDA build of torch that fits your driver (pytorch.org, Get Started)"
        findings.append(Finding("cuda", f"a driver is here, but torch {torch.__version__} cannot use it", remedy))
    else:
        findings.append(Finding("cuda", "no GPU", "everything runs on the CPU, slowly"))
    if torch.backends.mps.is_available():
        findings.append(Finding("mps", "Apple GPU"))
    device = pick_device()
    precision, why = choose_precision(device)
    findings.append(Finding("precision = auto", f"{precision} on {device.type} ({why})"))
    return findings


def _codecs() -> list[Finding]:
    import av
    from av.codec.codec import UnknownCodecError

    uses: tuple[tuple[str, Literal["r", "w"], str], ...] = (
        ("h264", "r", "reading most clips"),
        ("libx264", "w", "shards and rendered video"),
        ("hevc", "r", "reading phone clips"),
        ("libdav1d", "r", "reading AV1"),
        ("ffv1", "w", "--lossless"),
        ("aac", "r", "keeping audio"),
    )
    findings = [Finding("FFmpeg (in PyAV)", ", ".join(f"{k} {'.'.join(map(str, v))}" for k, v in _libraries(av)))]
    for name, mode, use in uses:
        try:
            av.Codec(name, mode)
            findings.append(Finding(f"codec {name}", f"present ({use})"))
        except UnknownCodecError:
            needed = name in ("h264", "libx264", "ffv1")
            findings.append(Finding(f"codec {name}", f"absent ({use})", "pip install --force-reinstall av", needed))
    return findings


def _libraries(av: object) -> list[tuple[str, tuple[int, ...]]]:
    versions = getattr(av, "library_versions", {})
    return [(name, tuple(version)) for name, version in versions.items() if name in ("libavcodec", "libavformat")]


def _cures() -> list[Finding]:
    import diffmae_video.compat  # noqa: F401  (before the two below)

    import torchvision

    return [Finding("imports", f"torchvision {torchvision.__version__} and pytorchvideo.transforms import")]


def _disk() -> list[Finding]:
    findings = []
    for name, path in (("disk here", os.getcwd()), ("disk for temporary files", os.environ.get("TMPDIR", "/tmp"))):
        if not os.path.isdir(path):
            continue
        free = shutil.disk_usage(path).free / 2**30
        low = free < _LOW_DISK_GIB
        findings.append(Finding(name, f"{free:.1f} GiB free in {path}", "free some space" if low else "", low))
    return findings
