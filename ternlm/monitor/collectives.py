"""Records every collective that this process starts: operation, mesh axis, ranks, bytes.

It sees the operators of torch.distributed before any backend does, so it works alike on real ranks and in a simulation
of one. What a compiled block sends it doesn't see: count with compilation off.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from ternlm.parallel.mesh import Mesh
from ternlm.planner.traffic import Traffic, add_up, lie_on_several_nodes, world_axis


class _Rule(NamedTuple):
    operation: str
    tensors: int
    """Which argument's tensors make the payload."""
    per_rank: bool = False
    """Whether they are one rank's part of it."""


# torch.distributed's operators: those that `dist.all_reduce` and the like call, and the functional ones of compiled
# blocks and DTensor.
_RULES = {
    "c10d::_allgather_base_": _Rule("all_gather", 1, per_rank=True),
    "c10d::allgather_": _Rule("all_gather", 1, per_rank=True),
    "c10d::allgather_coalesced_": _Rule("all_gather", 1, per_rank=True),
    "c10d::allgather_into_tensor_coalesced_": _Rule("all_gather", 1, per_rank=True),
    "c10d::_reduce_scatter_base_": _Rule("reduce_scatter", 1),
    "c10d::reduce_scatter_": _Rule("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": _Rule("reduce_scatter", 1),
    "c10d::allreduce_": _Rule("all_reduce", 0),
    "c10d::allreduce_coalesced_": _Rule("all_reduce", 0),
    "c10d::alltoall_base_": _Rule("all_to_all", 1),
    "c10d::alltoall_": _Rule("all_to_all", 1),
    "c10d::broadcast_": _Rule("broadcast", 0),
    "c10d::reduce_": _Rule("reduce", 0),
    "c10d::gather_": _Rule("gather", 1, per_rank=True),
    "c10d::scatter_": _Rule("scatter", 0, per_rank=True),
    "c10d::send": _Rule("send", 0),
    "c10d::recv_": _Rule("recv", 0),
    "_c10d_functional::all_gather_into_tensor": _Rule("all_gather", 0, per_rank=True),
    "_c10d_functional::all_gather_into_tensor_out": _Rule("all_gather", 0, per_rank=True),
    "_c10d_functional::all_gather_into_tensor_coalesced": _Rule("all_gather", 0, per_rank=True),
    "_c10d_functional::reduce_scatter_tensor": _Rule("reduce_scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_out": _Rule("reduce_scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_coalesced": _Rule("reduce_scatter", 0),
    "_c10d_functional::all_reduce": _Rule("all_reduce", 0),
    "_c10d_functional::all_reduce_": _Rule("all_reduce", 0),
    "_c10d_functional::all_reduce_coalesced": _Rule("all_reduce", 0),
    "_c10d_functional::all_reduce_coalesced_": _Rule("all_reduce", 0),
    "_c10d_functional::all_to_all_single": _Rule("all_to_all", 0),
    "_c10d_functional::broadcast": _Rule("broadcast", 0),
    "_c10d_functional::broadcast_": _Rule("broadcast", 0),
    "_dtensor::shard_dim_alltoall": _Rule("all_to_all", 0),
}
_WITHOUT_PAYLOAD = {
    "c10d::barrier",
    "c10d::monitored_barrier_",
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
}
_NAMESPACES = {"c10d", "_c10d_functional", "_dtensor"}


# Operators that send and receive inside themselves, where nothing is seen; whether it is their backward.
_RINGS = {"ternlm::ring_attention": False, "ternlm::ring_attention_backward": True}


class CollectiveRecorder(TorchDispatchMode):
    """While active, records the collectives that this process starts.

    mesh: names the groups; others are "other". devices_per_node: ranks count node by node. listen: called with each
    record, as it happens.
    """

    def __init__(self, mesh: Mesh, devices_per_node: int = 8, listen: Callable[[Traffic], None] | None = None) -> None:
        super().__init__()
        self.records: list[Traffic] = []
        self._mesh = mesh
        self._axes = axis_names(mesh)
        self._devices_per_node = devices_per_node
        self._listen = listen

    @property
    def totals(self) -> list[Traffic]:
        """The records, added up by kind."""
        return add_up(self.records)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operator, and record it where it is a collective."""
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a DTensor turns into plain tensors and functional collectives first
        result = func(*args, **(kwargs or {}))
        if isinstance(func, OpOverload):
            name = func._schema.name
            if func.namespace in _NAMESPACES:
                self._record(func, args, kwargs or {})
            elif name in _RINGS:
                self._record_ring(args[2] if _RINGS[name] else args[1], _RINGS[name])
        return result

    def _record(self, func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> None:
        name = func._schema.name
        if name in _WITHOUT_PAYLOAD:
            return
        rule = _RULES.get(name)
        if rule is None:
            raise NotImplementedError(f"{name} is a collective that monitor/collectives.py doesn't know; add its rule")
        given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        group = _group_of(given)
        ranks = dist.get_process_group_ranks(group)
        if len(ranks) == 1:
            return  # nothing is sent
        payload = sum(t.numel() * t.element_size() for t in tree_leaves(args[rule.tensors]) if isinstance(t, Tensor))
        payload *= len(ranks) if rule.per_rank else 1
        axis = self._axes.get(group.group_name, "other")
        if rule.operation in ("send", "recv"):
            peer = given["dst"] if rule.operation == "send" else given["src"]
            ranks = [dist.get_rank(), ranks[peer]]
        between = lie_on_several_nodes(ranks, self._devices_per_node)
        self._keep(Traffic(rule.operation, axis, len(ranks), between, payload))

    def _record_ring(self, k_BTKH: Tensor, backward: bool) -> None:
        """Record keys and values passing on from rank to rank, and the way of their float32 gradients back."""
        assert self._mesh.context is not None
        ranks, own = dist.get_process_group_ranks(self._mesh.context), self._mesh.context.rank()
        sizes = [2 * k_BTKH.numel() * k_BTKH.element_size()] + ([2 * k_BTKH.numel() * 4] if backward else [])
        for operation, peer in (("send", ranks[(own + 1) % len(ranks)]), ("recv", ranks[own - 1])):
            between = lie_on_several_nodes((ranks[own], peer), self._devices_per_node)
            for size in sizes * (len(ranks) - 1):
                self._keep(Traffic(operation, "context", 2, between, size))

    def _keep(self, traffic: Traffic) -> None:
        self.records.append(traffic)
        if self._listen:
            self._listen(traffic)


def axis_names(mesh: Mesh) -> dict[str, str]:
    """Return the axis of each process group's name."""
    names: dict[str, str] = {dist.group.WORLD.group_name: world_axis(mesh.layout)} if dist.group.WORLD else {}
    for axis in ("pipeline", "context", "tensor", "shard", "across", "replicas"):
        group = getattr(mesh, axis)
        if group is not None:
            names[group.group_name] = axis
    if mesh.fsdp is not None and mesh.fsdp.ndim == 2:
        names[mesh.fsdp.get_group(0).group_name] = "replicas"
    return names


def _group_of(arguments: Mapping[str, Any]) -> dist.ProcessGroup:
    # Private names: an operator is given its group as a TorchScript object, or by name.
    group = arguments["process_group"] if "process_group" in arguments else arguments["group_name"]
    if isinstance(group, str):
        return torch._C._distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)
