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


def axis_ranks(layout: Layout, place: Place) -> dict[str, range]:
    """Return, for each axis of more than one rank, the ranks of the group that the rank at `place` is in.

    data: all ranks with this rank's weights, which are cut into shard (among which FSDP gathers), across (groups of
    these over which optimizer states are cut once more) and replicas (which hold the same optimizer states).
    """
    tensor, data_ranks = layout.tensor, layout.data_ranks
    own = place.data * layout.context + place.context
    first = place.pipeline * data_ranks * tensor + place.tensor

    def ranks(start: int, count: int, step: int = 1) -> range:
        """Of data indices."""
        return range(first + start * tensor, first + (start + count * step) * tensor, step * tensor)

    shard, optimizer, stage = layout.shard, layout.optimizer, data_ranks * tensor
    groups = {
        "tensor": range(place.rank - place.tensor, place.rank - place.tensor + tensor),
        "context": ranks(own - place.context, layout.context),
        "shard": ranks(own - own % shard, shard),
        "across": ranks(own - own % optimizer + own % shard, layout.across, shard),
        "replicas": ranks(own % optimizer, data_ranks // optimizer, optimizer),
        "pipeline": range(place.rank % stage, layout.pipeline * stage, stage),
        "data": ranks(0, data_ranks),
        "world": range(layout.world),
    }
    return {axis: members for axis, members in groups.items() if len(members) > 1}


def world_axis(layout: Layout) -> str:
    """Return what to call the group of all ranks: the axis that has them all, else "world"."""
    groups = axis_ranks(layout, layout.place(0))
    whole = (axis for axis in ("pipeline", "replicas", "shard", "tensor") if len(groups.get(axis, ())) == layout.world)
    return next(whole, "world")


def lie_on_several_nodes(ranks: Sequence[int], devices_per_node: int) -> bool:
    """Whether ranks, numbered node by node, lie on more than one node."""
    if isinstance(ranks, range):
        return ranks[0] // devices_per_node != ranks[-1] // devices_per_node
    return len({rank // devices_per_node for rank in ranks}) > 1
