"""Hybrid sharding: over how many data ranks weights, gradients and optimizer states are cut, on PyTorch's FSDP2.

FSDP gathers, and reduce-scatters, among `layout.shard` consecutive data ranks, and all-reduces each shard over the
rest. Where the optimizer's states are cut wider than that, `ternlm.parallel.pieces` does what lies across.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ternlm.parallel.mesh import Mesh


def shard_model(
    model: nn.Module, units: Sequence[nn.Module], mesh: Mesh, dtype: torch.dtype, reduce_dtype: torch.dtype
) -> None:
    """Cut the model's parameters over data ranks, in place; each unit is gathered by itself, in order, the rest once.

    dtype: of the gathered weights. Gradients are sums over the data ranks, not means.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    settings: dict[str, Any] = dict(mesh=mesh.fsdp, mp_policy=policy)
    for unit in units:
        fully_shard(unit, reshard_after_forward=mesh.layout.reshard, **settings)
    # The rest is needed first in backward or last in forward: giving it back in between would only cost a gather.
    fully_shard(model, reshard_after_forward=False, **settings)
    for module in _sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: nn.Module, mesh: Mesh, last: bool) -> None:
    """Say before a microbatch's forward whether its gradients, with those waiting, are to be reduced in backward.

    last: of the step. Where gradients are whole (`sharding.grads = 1`) only the last microbatch reduces; else each
    reduces inside its group, and the last across the groups. Weights that aren't given back stay until the last.
    """
    if mesh.fsdp is None or not isinstance(model, FSDPModule):
        return
    layout = mesh.layout
    model.set_requires_gradient_sync(last or layout.grads > 1)
    model.set_requires_all_reduce(last)
    if not layout.reshard:
        model.set_reshard_after_backward(last)


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
