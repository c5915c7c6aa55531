"""Number formats: what the matrix products run in, on this device."""

import logging
from contextlib import AbstractContextManager, nullcontext

import torch

from ternlm.config.section import ConfigError
from ternlm.config.training import ComputeConfig
from ternlm.ops.attention import has_fused_kernel

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device meant by `compute.device`; raises ConfigError where it isn't there, or all ranks' the same.

    local_rank: which of the node's devices, where there are several ranks.
    """
    if local_rank is not None and name.startswith("cuda:"):
        raise ConfigError(
            f"compute.device = {name!r} must not name one device for several ranks, which would share it; set "
            "compute.device=cuda, and each takes its own"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda":
            name = f"cuda:{torch.cuda.current_device() if local_rank is None else local_rank}"
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as reason:
        first = str(reason).splitlines()[0]
        raise ConfigError(
            f"compute.device = {name!r} can't be used here ({first}); set compute.device=auto"
        ) from reason
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinning memory and asking for abilities concern the current device
    return device


def choose_dtype(compute: ComputeConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products: the one asked for, or what the device is fast at."""
    if compute.dtype != "auto":
        dtype = _DTYPES[compute.dtype]
        if dtype == torch.bfloat16 and not _fast_bfloat16(device):
            logger.warning("compute.dtype = bfloat16 is emulated on this device and very slow; float32 is faster")
        return dtype
    dtype = torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    logger.info("compute.dtype = auto: %s, since %s is fast at it", str(dtype).removeprefix("torch."), device.type)
    return dtype


def warn_of_slow_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Say so where packed documents can't have the fast attention kernel."""
    if device.type == "cuda" and (dtype == torch.float32 or not has_fused_kernel(device)):
        logger.warning(
            "attention over packed documents builds masks of seq_len x seq_len: the fast kernel takes bfloat16 or "
            "float16 on GPUs of compute capability 8.0 and above"
        )


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which forward runs: weights stay float32, matrix products use `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False
