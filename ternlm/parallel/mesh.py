"""The process groups of a layout: one object that everything which communicates is handed.

Mesh axes are (pipeline, outer, shard, tensor), tensor fastest: `outer` x `shard` are the data ranks, which hold the
same weights; `context` groups lie inside them. On one rank there is no group, and nothing communicates.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from ternlm.config.layout import Layout, Place
from ternlm.parallel.spans import exchange

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """This rank's groups in a layout; a group of one rank is None."""

    layout: Layout
    place: Place
    device: torch.device
    pipeline: ProcessGroup | None = None
    context: ProcessGroup | None = None
    tensor: ProcessGroup | None = None
    shard: ProcessGroup | None = None
    """Data ranks that FSDP cuts among."""
    across: ProcessGroup | None = None
    """Data ranks that hold the same FSDP shard and cut its optimizer states among them."""
    replicas: ProcessGroup | None = None
    """Data ranks that hold the same optimizer states."""
    control: ProcessGroup | None = None
    """All ranks, over gloo, for checkpoints that are written while training goes on, which uses the default group."""
    fsdp: DeviceMesh | None = None
    """What `fully_shard` takes: (outer, shard), or (shard,) where FSDP has nothing to reduce across its groups."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.place.rank == 0

    def agree(self, values: Sequence[float]) -> list[float]:
        """Return the greatest of each value over all ranks. Collective: every rank must call it."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all ranks, in double precision. Collective: every rank must call it."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def all_same(self, text: str) -> bool:
        """Whether every rank has the same text. Collective: every rank must call it."""
        number = float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]))
        greatest, least = self.agree([number, -number])
        return greatest == -least

    def tell_pipeline(self, value: T | None) -> T:
        """Return the value of the one rank of this pipeline that has one. Collective over `pipeline`."""
        if self.pipeline is None:
            assert value is not None
            return value
        values: list[T | None] = [None] * self.layout.pipeline
        dist.all_gather_object(values, value, group=self.pipeline)
        return next(told for told in values if told is not None)

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.layout.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with exchange("all_reduce", "world"):
            dist.all_reduce(tensor, op)
            return tensor.tolist()


def one_rank(device: torch.device) -> Mesh:
    """Return the mesh of a process that works alone."""
    return Mesh(Layout(), Place(), device)


def make_mesh(layout: Layout, rank: int, device: torch.device, timeout_minutes: float | None = None) -> Mesh:
    """Make the groups of a layout. Collective: every rank must call it, after `init_process_group`.

    timeout_minutes: of each collective; PyTorch's own for new groups if not given, half an hour on gloo.
    """
    place = layout.place(rank)
    if layout.world == 1:
        return Mesh(layout, place, device)
    outer = layout.data_ranks // layout.shard
    sizes = (layout.pipeline, outer, layout.shard, layout.tensor)
    root = init_device_mesh(device.type, sizes, mesh_dim_names=("pipeline", "outer", "shard", "tensor"))
    ranks = torch.arange(layout.world).view(
        layout.pipeline, outer // layout.across, layout.across, layout.shard, layout.tensor
    )
    by_context = torch.arange(layout.world).view(-1, layout.context, layout.tensor).transpose(1, 2)
    fsdp = None
    if layout.data_ranks > 1:
        # With one dimension FSDP leaves what lies across its groups to others, or there is nothing across.
        fsdp = root["shard"] if layout.across > 1 or outer == 1 else root["outer", "shard"]
    mesh = Mesh(
        layout,
        place,
        device,
        pipeline=root.get_group("pipeline") if layout.pipeline > 1 else None,
        context=_own_group(by_context, rank) if layout.context > 1 else None,
        tensor=root.get_group("tensor") if layout.tensor > 1 else None,
        shard=root.get_group("shard") if layout.shard > 1 else None,
        across=_own_group(ranks.movedim(2, -1), rank) if layout.across > 1 else None,
        replicas=_own_group(ranks.movedim(1, -1), rank) if 1 < layout.across < outer else None,
        control=dist.new_group(backend="fake" if dist.get_backend() == "fake" else "gloo"),
        fsdp=fsdp,
    )
    if timeout_minutes is not None:
        own = (mesh.context, mesh.across, mesh.replicas, mesh.control)
        for group in (*root.get_all_groups(), *(group for group in own if group is not None)):
            _set_pg_timeout(timedelta(minutes=timeout_minutes), group)  # public functions set it for the default alone
    return mesh


def _own_group(ranks: torch.Tensor, rank: int) -> ProcessGroup:
    """Make a group of each row of ranks (last dimension); return the one that `rank` is in."""
    rows = ranks.reshape(-1, ranks.shape[-1]).tolist()
    own, _ = dist.new_subgroups_by_enumeration(rows)
    assert own is not None, f"rank {rank} is in none of {rows}"
    return own
