"""The most memory a run has held so far."""

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")  # proc(5): Linux alone has it


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held at one time since the process began.

    Of a CUDA device, what its allocator held; else what the whole process held in main memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage's figure survives exec: it may be that of the process that started this one. VmHWM doesn't.
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # getrusage(2): bytes on macOS, KiB elsewhere
