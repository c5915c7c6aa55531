"""The most memory a run has held so far."""

import resource
import sys
from typing import NamedTuple

import torch


class PeakMemory(NamedTuple):
    """Largest amount of memory held at one time since the process began."""

    num_bytes: int
    holder: str
    """What held it: `cuda allocator` (tensors on the device) or `process` (resident in main memory)."""


def peak_memory(device: torch.device) -> PeakMemory:
    """Return the peak of CUDA's allocator for a CUDA device, of the whole process for any other."""
    if device.type == "cuda":
        return PeakMemory(torch.cuda.max_memory_allocated(device), "cuda allocator")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return PeakMemory(peak * unit, "process")
