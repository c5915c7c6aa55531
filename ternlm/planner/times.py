"""How long kernels and collectives take on a cluster. No torch here: plain numbers in, plain numbers out."""

import math
from collections.abc import Mapping

from ternlm.config.section import ConfigError
from ternlm.planner.cluster import Cluster, Links, Rates
from ternlm.planner.kernels import Kernels, Matmul
from ternlm.planner.traffic import Traffic


def kernel_seconds(kernels: Kernels, rates: Rates, document_tokens: int) -> dict[str, float]:
    """Return the time of kernels one after another: `matmul`, `attention`, `other`, and `launch` if that is longer.

    document_tokens: the length that attention goes over.
    """
    matmul = sum(matmul_seconds(one, rates) for one in kernels.matmuls)
    attention = kernels.attention_flops / (rates.attention_tflops * 1e12)
    attention += kernels.attention_backward_flops / (rates.attention_backward_tflops * 1e12)
    attention *= (1 + rates.half_attention / document_tokens) * min(1 + rates.attention_block / document_tokens, 2.0)
    other = kernels.stream_bytes / ((rates.norms_gb_s or rates.memory_gb_s) * 1e9)
    other += kernels.loss_bytes / ((rates.loss_gb_s or rates.memory_gb_s) * 1e9)
    waiting = max(kernels.launches * rates.launch_us * 1e-6 - matmul - attention - other, 0.0)
    waiting += kernels.launches * rates.serial_us * 1e-6
    return {"matmul": matmul, "attention": attention, "other": other, "launch": waiting}


def matmul_seconds(one: Matmul, rates: Rates) -> float:
    """Return the time of one product: its operations at a rate that falls with a short sum and with a small result.

    Where the device says so, its operands and result take time of their own.
    """
    rate = rates.matmul_tflops
    if one.float8 and rates.matmul_float8_tflops:
        rate = rates.matmul_float8_tflops
    slower = (1 + rates.half_inner / one.k) * (1 + rates.half_outer / (one.m * one.n))
    seconds = one.flops / (rate * 1e12) * slower
    return seconds + one.elements / (rates.operands_g_s * 1e9) if rates.operands_g_s else seconds


class Network:
    """The links that groups of ranks have, numbered node by node."""

    def __init__(self, cluster: Cluster, groups: Mapping[str, range]) -> None:
        """groups: of one rank, by axis, as `axis_ranks` returns them."""
        self.links: Links = cluster.links
        self.devices = cluster.devices_per_node
        self.spans = {axis: self._span(ranks) for axis, ranks in groups.items()}

    def seconds(self, traffic: Traffic) -> float:
        """Return how long the links are busy with all of a record's collectives, if nothing else uses them."""
        return traffic.sent_bytes / (self.rate_gb_s(traffic) * 1e9)

    def latency(self, traffic: Traffic, hop_us: float | None = None) -> float:
        """Return the seconds that nothing hides: each collective's way round the ranks, over several nodes."""
        if not traffic.between_nodes:
            return 0.0
        n = traffic.ranks
        hops = 2 * math.log2(n) if traffic.operation == "all_reduce" else n - 1  # trees and rings
        return traffic.count * hops * (self.links.hop_us if hop_us is None else hop_us) * 1e-6

    def rate_gb_s(self, traffic: Traffic) -> float:
        """Return what one rank sends in a second.

        A ring that leaves a node does so at the node's whole rate if it has all its devices; else as many rings share
        that rate as there are devices for each of its own. Raises ConfigError where the cluster has no network.
        """
        if not traffic.between_nodes:
            return self.links.node_gb_s
        if not self.links.network_gb_s:
            raise ConfigError(
                f"links.network_gb_s = 0 and axis {traffic.axis} lies on several nodes: nothing could be exchanged; "
                f"give what a node sends to others, in GB/s, or keep the run on one node, which has {self.devices} "
                "devices in this cluster; if it has more, set devices_per_node, or run `tern calibrate` under torchrun"
            )
        members, nodes = self.spans.get(traffic.axis, (self.devices, 2))
        if traffic.operation in ("send", "recv"):
            members = 1
        shared = self.links.network_gb_s * members / self.devices
        if self.links.nodes_to_half:
            shared /= 1 + nodes / self.links.nodes_to_half
        return min(shared, self.links.node_gb_s) if members > 1 else shared

    def _span(self, ranks: range) -> tuple[int, int]:
        """Return how many of a group's ranks are on its first node, and on how many nodes it is."""
        first, end = ranks[0] // self.devices, ranks[-1] // self.devices
        on_first = len(range(ranks[0], (first + 1) * self.devices, ranks.step))
        return min(on_first, len(ranks)), len(ranks) if ranks.step >= self.devices else end - first + 1
