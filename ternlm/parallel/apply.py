"""Apply to a built model what its settings and layout ask for, in the one order that works."""

import logging
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from ternlm.config.parallel import ParallelConfig, ShardingConfig
from ternlm.config.section import ConfigError
from ternlm.config.training import ComputeConfig
from ternlm.parallel.mesh import Mesh
from ternlm.parallel.recompute import recompute_blocks
from ternlm.parallel.sharding import shard_model
from ternlm.parallel.tensor import cut_tensors

logger = logging.getLogger(__name__)


def lay_out(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    roots: Sequence[tuple[nn.Module, Sequence[nn.Module]]],
    mesh: Mesh,
    dtype: torch.dtype,
    settings: tuple[ComputeConfig, ParallelConfig, ShardingConfig],
    compile_blocks: bool,
) -> None:
    """Cut for tensor parallelism, set up recompute, compile each block, cut over data ranks.

    model: this rank's part. roots: what is called from outside, the model or its stages, each with the units that
    FSDP gathers one at a time.
    Tensor parallelism comes first, since it changes shapes; FSDP last, since its gathers can't be part of a graph.
    """
    compute, parallel, sharding = settings
    if mesh.tensor is not None:
        cut_tensors(model, mesh.tensor, parallel.sequence)
    prepare_blocks(blocks, compute, compile_blocks)
    if mesh.fsdp is not None:
        reduce_dtype = torch.float32 if sharding.reduce_dtype == "float32" else torch.bfloat16
        for root, units in roots:
            shard_model(root, units, mesh, dtype, reduce_dtype)


def prepare_blocks(blocks: Sequence[nn.Module], compute: ComputeConfig, compile_blocks: bool) -> None:
    """Set up recompute, then compile each block.

    Recompute comes first, so that the compiler sees the recomputed region and partitions it itself; the other way
    round each recompute would run a graph that was compiled to keep everything.
    """
    recompute_blocks(list(blocks), compute.recompute, compute.recompute_keep)
    if compile_blocks:
        # One block's graph serves all: 8-16 s for the first step, where a whole model takes 40. Of the forward
        # alone: FSDP's hooks run around it.
        for block in blocks:
            trained = all(parameter.requires_grad for parameter in block.parameters())
            block.forward = torch.compile(block.forward) if trained else _compiled_keeping_less(block.forward)


def _compiled_keeping_less(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a block of adapters so that its backward makes activations anew that a product needs, such as SwiGLU's.

    The default keeps them. On SmolLM2-135M with adapters this held 0.2 GiB less of 0.57, in the same time; elsewhere it
    isn't tried.
    """
    compiled = torch.compile(forward)

    def run(*args: Any) -> Tensor:
        with functorch_config.patch(ban_recompute_materialized_backward=False):
            return compiled(*args)

    return run


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
    found: Callable[[str], object] = shutil.which
    if device.type == "cpu":
        return None if any(map(found, ("g++", "clang++", "c++"))) else "a C++ compiler (g++)"
    if find_spec("triton") is None:
        return "the package triton"
    return None if any(map(found, ("cc", "gcc", "clang"))) else "a C compiler (gcc), for triton"
