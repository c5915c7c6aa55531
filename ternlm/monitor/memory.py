"""The most memory a run has held so far."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held at one time since the process began.

    Of a CUDA device, what its allocator held; else what the whole process held in main memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # getrusage(2): bytes on macOS, KiB elsewhere
