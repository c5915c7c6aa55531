"""Times collectives between this run's ranks, within a node and across nodes, and fits what the planner takes.

All functions are collective: every rank must call them at the same point. Compute is kernels.py's business.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.distributed as dist

from ternlm.config.section import ConfigError
from ternlm.parallel.launch import Launch
from ternlm.planner.traffic import Traffic

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter")
PAYLOADS = (2**12, 2**18, 2**22, 2**24, 2**26)
"""Bytes of the whole vector: the smallest for the latency, the largest for the rate."""


@dataclass(frozen=True)
class Timed:
    """A collective of one size in one group."""

    traffic: Traffic
    seconds: float

    @property
    def gb_s(self) -> float:
        """What one rank sends in a second."""
        return self.traffic.sent_bytes / self.seconds * 1e-9


@dataclass(frozen=True)
class LinkFigures:
    """What the planner's `Links` take from collectives, and what it leaves out."""

    devices_per_node: int
    nodes: int
    node_gb_s: float = 0.0
    network_gb_s: float = 0.0
    hop_us: float = 0.0
    contention: float = 0.0
    node_latency_us: float = 0.0
    """Of a small collective within a node; the planner counts none."""
    by_operation: tuple[str, ...] = ()
    """For readers: GB/s of each operation in each group, at the largest payload."""


def node_size(launch: Launch) -> int:
    """Return the ranks of a node; raises ConfigError where nodes would differ."""
    if launch.world % launch.node_size:
        raise ConfigError(
            f"{launch.node_size} ranks on a node, {launch.world} in all: every node must have the same number of "
            "ranks; start the ranks with torchrun --nproc-per-node N on all nodes"
        )
    return launch.node_size


def measure_links(launch: Launch, device: torch.device, seconds: float) -> LinkFigures:
    """Time all-reduce, all-gather and reduce-scatter in each group, for about `seconds`. Collective over all ranks."""
    size = node_size(launch)
    nodes = launch.world // size
    if launch.world == 1:
        return LinkFigures(1, 1)
    groups: dict[str, tuple[int, dist.ProcessGroup]] = {}
    if size > 1:
        groups["node"] = size, _own_group([range(n * size, (n + 1) * size) for n in range(nodes)])
    if nodes > 1:
        groups["across"] = nodes, _own_group([range(place, launch.world, size) for place in range(size)])
    share = seconds / (len(groups) * len(OPERATIONS) * len(PAYLOADS))
    timed = {
        name: [
            Timed(Traffic(operation, name, ranks, name == "across", payload), _seconds(work, device, share))
            for operation in OPERATIONS
            for payload in PAYLOADS
            for work in [_collective(operation, payload, ranks, group, device)]
        ]
        for name, (ranks, group) in groups.items()
    }
    # A CPU's cores exchange and compute by turns: nothing is hidden.
    return replace(figures(size, nodes, timed), contention=1.0 if device.type == "cpu" else 0.0)


def figures(size: int, nodes: int, timed: dict[str, list[Timed]]) -> LinkFigures:
    """Return the planner's figures by what was timed: `node` within nodes, `across` one rank of each node in a group.

    All groups across run at once, so that a node's network carries all its ranks' traffic.
    """
    within, across = timed.get("node", []), timed.get("across", [])
    lines = tuple(
        f"{name}, {one.traffic.operation} of {one.traffic.payload_bytes / 2**20:g} MiB: {one.gb_s:.3g} GB/s"
        for name, those in timed.items()
        for one in those
        if one.traffic.payload_bytes == max(PAYLOADS)
    )
    return LinkFigures(
        size,
        nodes,
        node_gb_s=_rate(within),
        network_gb_s=_rate(across) * size,
        hop_us=median([_hop_us(one) for one in _smallest(across)]) if across else 0.0,
        node_latency_us=median([one.seconds * 1e6 for one in _smallest(within)]) if within else 0.0,
        by_operation=lines,
    )


def _rate(timed: Sequence[Timed]) -> float:
    """Return GB/s of large collectives: the median over operations and the two largest sizes; 0 of none."""
    large = [one.gb_s for one in timed if one.traffic.payload_bytes >= sorted(PAYLOADS)[-2]]
    return median(large) if large else 0.0


def _smallest(timed: Sequence[Timed]) -> list[Timed]:
    return [one for one in timed if one.traffic.payload_bytes == min(PAYLOADS)]


def _hop_us(one: Timed) -> float:
    """Return what each of a small collective's hops takes, as `Network.latency` counts them."""
    n = one.traffic.ranks
    return one.seconds * 1e6 / (2 * math.log2(n) if one.traffic.operation == "all_reduce" else n - 1)


def _own_group(ranks: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """Make all groups, as every rank must, and return the one that this rank is in."""
    group, _ = dist.new_subgroups_by_enumeration([list(some) for some in ranks])
    return group


def _collective(
    operation: str, payload: int, ranks: int, group: dist.ProcessGroup, device: torch.device
) -> Callable[[], object]:
    whole = torch.zeros(payload // 4 // ranks * ranks, device=device)
    own = torch.zeros(whole.numel() // ranks, device=device)
    if operation == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if operation == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, own, group=group)
    return lambda: dist.reduce_scatter_tensor(own, whole, group=group)


def _seconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the median time of a collective, of the slowest rank each time. Collective over all ranks."""

    def once() -> float:
        dist.barrier()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = torch.tensor([time.perf_counter() - began], device=device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)  # all ranks then count alike
        return float(took)

    once()
    first = once()
    number = max(3, min(100, int(seconds / max(first, 1e-6))))
    return median([once() for _ in range(number)])
