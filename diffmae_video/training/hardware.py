"""What the machine has and can do: devices, cores, number types, peak arithmetic rate, memory in use."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from diffmae_video.errors import UsageError

# dense bf16 peak of GPUs, FLOP/s, from NVIDIA's data sheets (without sparsity)
_PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CONTROL_GROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own
_FASTER = 1.2  # bf16 must beat fp32 by this factor where only a timing can tell


def core_count() -> int:
    """CPU cores this process may use: those it is bound to, and no more than its control group grants time for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        quota, period = (int(part) for part in (_CONTROL_GROUP / "cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda` or `mps` as a device; `auto` takes the fastest kind present.

    Raises:
        UsageError: the device is not there.
    """
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise UsageError(f"--device {name} is not one of auto, cpu, cuda, mps; choose one of them.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no CUDA device; `diffmae doctor` says why, or take cpu.")
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"Process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                "lower --nproc to that number."
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch sees no Apple GPU here; take cpu.")
    return torch.device(name)


def choose_precision(device: torch.device) -> tuple[str, str]:
    """The number type that `precision = "auto"` means on a device.

    Returns:
        `bf16` where the hardware computes in it, `fp16` (with loss scaling) on older GPUs with matrix units for it,
        else `fp32`; and the reason in a few words.
    """
    if device.type == "cuda" and not torch.cuda.is_available():  # the plan for another machine
        return "bf16", "assumed of a GPU that is not here"
    if device.type == "cuda":
        # not torch.cuda.is_bf16_supported(): that counts emulation as support
        major, minor = torch.cuda.get_device_capability(device)
        card = f"a GPU of compute capability {major}.{minor}"
        if (major, minor) >= (8, 0):
            return "bf16", f"{card} computes in bf16"
        if (major, minor) >= (7, 0):
            return "fp16", f"{card} has matrix units for fp16, none for bf16"
        return "fp32", f"{card} is fastest in fp32"
    if device.type == "cpu":
        return _choose_on_cpu()
    return "fp32", f"always on {device.type}"


def resolve_precision(setting: str, device: torch.device) -> str:
    """`bf16`, `fp16` or `fp32` for a setting that may be `auto`."""
    return choose_precision(device)[0] if setting == "auto" else setting


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in a precision (`auto`, `bf16`, `fp16`, `fp32`)."""
    dtype = _DTYPES[resolve_precision(precision, device)]
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)


def swap_kernels(model: nn.Module, device: torch.device, precision: str) -> None:
    """Let a model that will compute in a precision on a device use the kernels made for them, if there are any."""
    if device.type == "cpu" and resolve_precision(precision, device) == "bf16":
        from diffmae_video.models.kernels import use_cpu_bf16

        use_cpu_bf16(model)


@functools.cache
def _choose_on_cpu() -> tuple[str, str]:
    features = _cpu_features()
    if features.get("architecture") == "x86_64" and torch.backends.mkldnn.is_available():
        for name, shown in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
            if features.get(name):
                return "bf16", f"this processor has {shown}"
        return "fp32", "this processor has neither AMX nor AVX512-BF16"
    ratio = _bf16_speed()
    shown = f"a product of matrices in bf16 runs at {ratio:.2g} times the speed of fp32 here"
    return ("bf16" if ratio >= _FASTER else "fp32"), shown


def _cpu_features() -> dict[str, object]:
    """Names of what the processor can do, and its `architecture`; empty where PyTorch does not tell (before 2.13)."""
    try:
        return dict(torch.cpu.get_capabilities())
    except (AttributeError, RuntimeError):
        return {}


def _bf16_speed() -> float:
    """Speed of bf16 over fp32 in products of small matrices; the best of five rounds in turns, some milliseconds."""
    best = {}
    for _ in range(5):
        for dtype in (torch.float32, torch.bfloat16):
            left = torch.ones(256, 256, dtype=dtype)
            start = time.perf_counter()
            left @ left
            best[dtype] = min(best.get(dtype, float("inf")), time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


@functools.cache
def peak_flops(device: str, precision: str) -> float:
    """FLOP/s of this device: a data-sheet value for known GPUs in bf16, else the best of a few matrix products."""
    place = torch.device(device)
    if place.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(place)
        for known, value in _PEAK_BF16.items():
            if known in name:
                return value
    dtype = _DTYPES[precision]
    size = 512 if place.type == "cpu" else 4096
    left = torch.ones(size, size, dtype=dtype, device=place)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        product = left @ left
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def free_memory(device: torch.device, processes: int = 1) -> float:
    """Bytes that one of `processes` processes on this machine can use: of the GPU's memory, or its share of the main
    memory (and of what the control group grants)."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        limit, used = (int((_CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(0.0, free) / processes


def parse_memory(text: str) -> float:
    """Bytes of `24GiB`, `80 GB` or `512MiB`.

    Raises:
        UsageError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"--device-memory {text} is no size; write it as 24GiB.")
    return float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1)


def peak_memory(device: torch.device) -> float:
    """GiB: the most the GPU has held, or what this process holds now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def peak_resident() -> float:
    """GiB: the most memory that this process has held since it started."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**30  # type: ignore[attr-defined]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


def describe_machine(device: torch.device) -> dict[str, str]:
    """Names for the report: device, cores, memory, PyTorch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "cores": str(core_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "torch": torch.__version__,
    }
