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


def device_peak(device: torch.device, dtype: torch.dtype) -> DevicePeak:
    """Return the peak of matrix products in `dtype`.

    Where the table of data sheets doesn't know the device, a matrix product is timed, which takes up to a
    second: keep the answer.
    """
    if device.type == "cuda":
        name, number_format = torch.cuda.get_device_name(device), _format_on_cuda(dtype)
        known = peak_tflops(name, number_format)
        if known is not None:
            return DevicePeak(known, f"data sheet of {name}, dense {number_format}")
    return measure_peak(device, dtype)


def measure_peak(device: torch.device, dtype: torch.dtype, max_seconds: float = 0.5) -> DevicePeak:
    """Time a square matrix product, as large as lets several of them fit into about `max_seconds`.

    The fastest counts: on a machine that others use too, a mean or median would be no peak, and MFU too high.
    """
    size = 1024  # smaller products don't reach the peak, and a busy machine spoils a short one
    seconds = _best_seconds(size, device, dtype)
    while size < 8192 and 8 * 4 * seconds < max_seconds / 4:  # twice the size takes 8 times as long
        size *= 2
        seconds = _best_seconds(size, device, dtype)
    seconds = min(seconds, _best_seconds(size, device, dtype))
    name = str(dtype).removeprefix("torch.")
    source = f"measured {size} x {size} matrix product, {name}, {device.type}"
    return DevicePeak(2 * size**3 / seconds / 1e12, source)


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
