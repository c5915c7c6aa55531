"""Apply to a built model what its settings ask for, in the one order that works."""

import logging
import shutil

import torch
from torch import nn

from ternlm.config.section import ConfigError
from ternlm.config.training import ComputeConfig
from ternlm.parallel.recompute import recompute_blocks

logger = logging.getLogger(__name__)


def prepare_model(model: nn.Module, blocks: list[nn.Module], compute: ComputeConfig, device: torch.device) -> None:
    """Set up recompute, then compile each block.

    Recompute comes first, so that the compiler sees the recomputed region and partitions it itself; the other way
    round each recompute would run a graph that was compiled to keep everything.
    """
    recompute_blocks(blocks, compute.recompute, compute.recompute_keep)
    if wants_compile(compute, device):
        # One block's graph serves all: 8-16 s for the first step, where a whole model takes 40.
        for block in blocks:
            block.compile()


def wants_compile(compute: ComputeConfig, device: torch.device) -> bool:
    """Whether blocks are to be compiled; raises ConfigError where that is asked for and can't be done."""
    if compute.compile == "off":
        return False
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if device.type != "cpu" or compiler:
        return True
    if compute.compile == "on":
        raise ConfigError(
            "compute.compile = 'on' needs a C++ compiler on a CPU and none is found; "
            "install g++ or set compute.compile=off"
        )
    logger.info("no C++ compiler found: blocks run uncompiled, which is 10-15%% slower; install g++ for the rest")
    return False
