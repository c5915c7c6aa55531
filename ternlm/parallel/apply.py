"""Apply to a built model what its settings ask for, in the one order that works."""

import logging
import shutil
from importlib.util import find_spec

import torch
from torch import nn

from ternlm.config.section import ConfigError
from ternlm.config.training import ComputeConfig
from ternlm.parallel.recompute import recompute_blocks

logger = logging.getLogger(__name__)


def prepare_model(model: nn.Module, blocks: list[nn.Module], compute: ComputeConfig, compile_blocks: bool) -> None:
    """Set up recompute, then compile each block.

    Recompute comes first, so that the compiler sees the recomputed region and partitions it itself; the other way
    round each recompute would run a graph that was compiled to keep everything.
    """
    recompute_blocks(blocks, compute.recompute, compute.recompute_keep)
    if compile_blocks:
        # One block's graph serves all: 8-16 s for the first step, where a whole model takes 40.
        for block in blocks:
            block.compile()


def wants_compile(compute: ComputeConfig, device: torch.device) -> bool:
    """Whether blocks are to be compiled; raises ConfigError where that is asked for and can't be done."""
    if compute.compile == "off":
        return False
    missing = _missing_for_compilation(device)
    if not missing:
        return True
    if compute.compile == "on":
        raise ConfigError(
            f"compute.compile = 'on' needs {missing}, which isn't found; install it or set compute.compile=off"
        )
    logger.info("%s isn't found: blocks run uncompiled, which is 10-15%% slower", missing)
    return False


def _missing_for_compilation(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None if any(map(shutil.which, ("g++", "clang++", "c++"))) else "a C++ compiler (g++)"
    if find_spec("triton") is None:
        return "the package triton"
    return None if any(map(shutil.which, ("cc", "gcc", "clang"))) else "a C compiler (gcc), for triton"
