"""How much memory a device has, and how much of it a run holds or has held."""

import os
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")  # proc(5): Linux alone has it
_SYSTEM = Path("/proc/meminfo")
_GROUP_USE = Path("/sys/fs/cgroup/memory.current")
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # cgroups, version 2: a container's limit, or "max"


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held at one time since the process began.

    Of a CUDA device, what its allocator held; else what the whole process held in main memory, on Linux to about a
    hundred pages (proc(5)).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage's figure survives exec: it may be that of the process that started this one. VmHWM doesn't.
    peak = _status("VmHWM")
    if peak is None:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = used if sys.platform == "darwin" else used * 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return peak


def device_memory(device: torch.device, sharers: int = 1) -> int:
    """Return the bytes of a CUDA device, else those of main memory that this process may take.

    sharers: processes that share main memory evenly.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    shared = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _GROUP_LIMIT.is_file() and (text := _GROUP_LIMIT.read_text().strip()).isdecimal():
        shared = min(shared, int(text))
    address_space = _address_space()  # of each process
    return shared // sharers if address_space is None else min(shared // sharers, address_space)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be taken now, whoever holds the others; where the system doesn't tell, half of all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = device_memory(device) // 2
    if _SYSTEM.exists():
        lines = (line.split() for line in _SYSTEM.read_text().splitlines())
        free = next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), free)
    if _GROUP_LIMIT.is_file() and _GROUP_USE.is_file() and (limit := _GROUP_LIMIT.read_text().strip()).isdecimal():
        free = min(free, max(int(limit) - int(_GROUP_USE.read_text()), 0))
    return free


def held_memory(device: torch.device) -> int:
    """Return the bytes that are held now.

    Of a CUDA device, tensors'; else all of the process, counted as what limits it is: its address space where that is
    limited, else what lies in main memory.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    held = _status("VmRSS" if _address_space() is None else "VmSize")
    return peak_memory(device) if held is None else held


def memory_of_others(device: torch.device) -> int:
    """Return the bytes of a CUDA device that hold no tensors of this process.

    The driver's, the communication library's and other processes', and what lies between tensors.
    """
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_allocated(device)


def _address_space() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _status(name: str) -> int | None:
    """Return an entry of this process's status in bytes; None where the system has none."""
    if not _STATUS.exists():
        return None
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line[0] == f"{name}:"), None)
