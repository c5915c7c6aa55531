"""The peak of a device's matrix products, which MFU is measured against: from the table, else by trying."""

import time
from typing import NamedTuple

import torch

from ternlm.planner.devices import peak_tflops


class DevicePeak(NamedTuple):
    """Peak throughput of one device."""

    tflops: float
    source: str
    """Where the figure comes from, in words."""


def device_name(device: torch.device) -> str:
    """Return a device's name, as data sheets are looked up by it; `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_memory_gib(device: torch.device) -> float:
    """Return a device's memory, in GiB, as PyTorch sees it; 0 of a CPU, whose memory isn't its own."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0


def device_peak(device: torch.device, dtype: torch.dtype) -> DevicePeak:
    """Return the peak of matrix products in `dtype`.

    Where the table of data sheets doesn't know the device, a matrix product is timed, which takes up to a
    second: keep the answer.
    """
    if device.type == "cuda":
        name, number_format = device_name(device), _format_on_cuda(dtype)
        known = peak_tflops(name, number_format)
        if known is not None:
            return DevicePeak(known, f"data sheet of {name}, dense {number_format}")
    return measure_peak(device, dtype)


def measure_peak(device: torch.device, dtype: torch.dtype, max_seconds: float = 0.5) -> DevicePeak:
    """Time square matrix products of growing sizes, while they fit into about `max_seconds`.

    The fastest counts: on a machine that others use too, a mean or median would be no peak, and MFU too high; and
    where a number format is emulated, larger products may be slower than small ones.
    """
    rates: dict[int, float] = {}
    size, seconds = 128, 0.0
    while size < 8192 and 8 * 4 * seconds < max_seconds:  # twice the size takes 8 times as long
        size *= 2
        seconds = min(_best_seconds(size, device, dtype) for _ in range(2))
        rates[size] = 2 * size**3 / seconds / 1e12
    best = max(rates, key=rates.__getitem__)
    name = str(dtype).removeprefix("torch.")
    return DevicePeak(rates[best], f"measured {best} x {best} matrix product, {name}, {device.type}")


def _format_on_cuda(dtype: torch.dtype) -> str:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def _best_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the shortest duration of 3 products of (size, size) matrices, after one that isn't counted."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(4):
        _synchronize(device)
        started = time.perf_counter()
        torch.matmul(left, right)
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
