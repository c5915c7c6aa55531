"""Bytes that a layout of ranks sends in one training step, in closed form.

`monitor.collectives` counts the same of the real program; tests hold the two equal, to the byte. A payload is the whole
tensor that an operation works on: what an all-gather makes, what a reduce-scatter takes, what an all-reduce sums, one
message. No torch here: plain numbers in, plain numbers out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ternlm.config.layout import Layout, Place


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind that one rank takes part in."""

    operation: str
    """all_gather, reduce_scatter, all_reduce, all_to_all, broadcast, reduce, gather, scatter, send, recv."""
    axis: str
    """The mesh axis whose ranks take part."""
    ranks: int
    """How many take part; 2 for send and recv."""
    between_nodes: bool
    """Whether they lie on more than one node."""
    payload_bytes: int
    """Of all of them together."""
    count: int = 1

    @property
    def sent_bytes(self) -> int:
        """What this rank sends when the ranks form a ring, rounded up."""
        n, payload = self.ranks, self.payload_bytes
        if self.operation == "recv":
            return 0
        if self.operation in ("send", "broadcast", "reduce"):
            return payload
        if self.operation == "gather":
            return -(-payload // n)
        passes = 2 if self.operation == "all_reduce" else 1
        return -(-passes * payload * (n - 1) // n)

    @property
    def kind(self) -> tuple[str, str, int, bool]:
        """What two records must share to be added up."""
        return self.operation, self.axis, self.ranks, self.between_nodes


def add_up(traffic: Iterable[Traffic]) -> list[Traffic]:
    """Add up what is of one kind, in the order of first appearance."""
    totals: dict[tuple[str, str, int, bool], Traffic] = {}
    for one in traffic:
        before = totals.get(one.kind)
        totals[one.kind] = (
            one
            if before is None
            else replace(before, payload_bytes=before.payload_bytes + one.payload_bytes, count=before.count + one.count)
        )
    return list(totals.values())


def axis_ranks(layout: Layout, place: Place) -> dict[str, tuple[int, ...]]:
    """Return, for each axis of more than one rank, the ranks of the group that the rank at `place` is in.

    data: all ranks with this rank's weights, which are cut into shard (among which FSDP gathers), across (groups of
    these over which optimizer states are cut once more) and replicas (which hold the same optimizer states).
    """
    tensor, data_ranks = layout.tensor, layout.data_ranks
    own = place.data * layout.context + place.context

    def ranks(data_indices: Iterable[int]) -> tuple[int, ...]:
        return tuple((place.pipeline * data_ranks + i) * tensor + place.tensor for i in data_indices)

    shard, optimizer = layout.shard, layout.optimizer
    first_of_optimizer = own - own % optimizer
    groups = {
        "tensor": tuple(place.rank - place.tensor + i for i in range(tensor)),
        "context": ranks(own - place.context + i for i in range(layout.context)),
        "shard": ranks(own - own % shard + i for i in range(shard)),
        "across": ranks(first_of_optimizer + own % shard + i * shard for i in range(layout.across)),
        "replicas": ranks(own % optimizer + i * optimizer for i in range(data_ranks // optimizer)),
        "pipeline": tuple(place.rank % (data_ranks * tensor) + i * data_ranks * tensor for i in range(layout.pipeline)),
        "data": ranks(range(data_ranks)),
        "world": tuple(range(layout.world)),
    }
    return {axis: members for axis, members in groups.items() if len(members) > 1}


def world_axis(layout: Layout) -> str:
    """Return what to call the group of all ranks: the axis that has them all, else "world"."""
    groups = axis_ranks(layout, layout.place(0))
    whole = (axis for axis in ("pipeline", "replicas", "shard", "tensor") if len(groups.get(axis, ())) == layout.world)
    return next(whole, "world")


def lie_on_several_nodes(ranks: Sequence[int], devices_per_node: int) -> bool:
    """Whether ranks, numbered node by node, lie on more than one node."""
    return len({rank // devices_per_node for rank in ranks}) > 1
