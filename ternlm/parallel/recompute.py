"""Activation recompute: the first blocks keep only their input, or their matrix products too."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ternlm.config.training import recomputed_blocks
from ternlm.ops.attention import KEPT_OPS, Attend
from ternlm.parallel.ring import RING_OP


def recompute_blocks(blocks: list[nn.Module], fraction: float, keep: str) -> None:
    """Make the first `fraction` of the blocks, rounded up, recompute their activations in backward.

    keep: "nothing", or "matmuls" to store the results of matrix products, of attention and of what context
    parallelism exchanged, so that only cheap operations run twice.
    """
    for block in blocks[: recomputed_blocks(len(blocks), fraction)]:
        block.forward = _recomputed(block.forward, keep)


def _recomputed(forward: Callable[..., Tensor], keep: str) -> Callable[..., Tensor]:
    # A plain function: the compiler doesn't look into a functools.partial of `checkpoint`.
    def recomputed(x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, _keep_matmuls)
        if keep == "matmuls":
            return checkpoint(forward, x_BTD, cos, sin, attend, use_reentrant=False, context_fn=contexts)
        return checkpoint(forward, x_BTD, cos, sin, attend, use_reentrant=False)

    return recomputed


def _keep_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    aten = torch.ops.aten
    matmuls = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default)
    # What went over the network isn't fetched again, though it costs the memory of q, k and v of whole sequences.
    exchanged = torch.ops._c10d_functional.all_to_all_single.default
    kept = op in matmuls or op in KEPT_OPS or op in (RING_OP, exchanged)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
