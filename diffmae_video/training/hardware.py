"""What the machine can do: peak arithmetic rate and memory in use."""

from __future__ import annotations

import functools
import time

import psutil
import torch

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


@functools.cache
def peak_flops(device: str, precision: str) -> float:
    """FLOP/s of this device: a data-sheet value for known GPUs in bf16, else the best of a few matrix products."""
    place = torch.device(device)
    if place.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(place)
        for known, value in _PEAK_BF16.items():
            if known in name:
                return value
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 512 if place.type == "cpu" else 4096
    left = torch.ones(size, size, dtype=dtype, device=place)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        product = left @ left
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> float:
    """GiB: the most the GPU has held, or what this process holds now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def describe_machine(device: torch.device) -> dict[str, str]:
    """Names for the report: device, cores, memory, PyTorch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "cores": str(psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "torch": torch.__version__,
    }
