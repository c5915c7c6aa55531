"""How much memory keys and values take, and how much there is."""

import os
from pathlib import Path

import torch

from ternlm.config.model import ModelConfig


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return what a token's keys and values take in all layers, in bytes."""
    return 2 * config.num_hidden_layers * config.kv_heads * config.head_size * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Return what a device has left, in bytes; of a CPU what can be had without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def tokens_that_fit(config: ModelConfig, dtype: torch.dtype, device: torch.device, wanted: int) -> int:
    """Return for how many tokens there is room in half of the free memory, at most `wanted`."""
    fitting = free_bytes(device) // 2 // bytes_per_token(config, dtype)
    return max(min(wanted, fitting), 1)
