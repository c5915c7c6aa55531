"""What a cluster can do: the rates of one device and of the links, as the planner's arithmetic takes them.

A cluster comes from a file that `tern calibrate` wrote, or is made of data sheets and fitted constants (known.py). Says
nothing of a run. No torch here: plain numbers in, plain numbers out.
"""

from typing import Literal

from pydantic import model_validator

from ternlm.config.section import Section, setting

NumberFormat = Literal["bfloat16", "float16", "float32"]


class Rates(Section):
    """How fast one device works through a step's kernels. Rates are of large ones; halves say what is large."""

    matmul_tflops: float = setting(..., "matrix products of any size in the run's number format", unit="TFLOPS", gt=0)
    matmul_float8_tflops: float = setting(0.0, "the same in float8, casts included; 0: not known", unit="TFLOPS", ge=0)
    half_inner: float = setting(0.0, "summed dimension at which a product has half its rate", unit="elements", ge=0)
    half_outer: float = setting(0.0, "result's size at which a product has half its rate", unit="elements", ge=0)
    operands_g_s: float = setting(
        0.0,
        "operands and results of products, on top, where nothing hides them; 0: hidden",
        unit="10^9 elements/s",
        ge=0,
    )
    attention_tflops: float = setting(..., "causal attention forward, masked half not counted", unit="TFLOPS", gt=0)
    attention_backward_tflops: float = setting(..., "the same backward, counted as 2.5 forwards", unit="TFLOPS", gt=0)
    half_attention: float = setting(0.0, "document at which attention has half its rate", unit="tokens", ge=0)
    attention_block: float = setting(
        0.0, "keys that attention takes at a time, the masked among them too; 0: none are", unit="tokens", ge=0
    )
    memory_gb_s: float = setting(..., "kernels that only read and write memory", unit="GB/s", gt=0)
    norms_gb_s: float = setting(0.0, "norms, rotation and the like in a block; 0: memory_gb_s", unit="GB/s", ge=0)
    loss_gb_s: float = setting(0.0, "the loss, of its logits; 0: memory_gb_s", unit="GB/s", ge=0)
    update_gb_s: float = setting(0.0, "norm, clipping and the optimizer; 0: memory_gb_s", unit="GB/s", ge=0)
    fresh_gb_s: float = setting(
        0.0, "memory that a step takes anew from the system, on a CPU; 0: costs nothing", unit="GB/s", ge=0
    )
    launch_us: float = setting(0.0, "least time between the starts of two kernels", unit="microseconds", ge=0)
    serial_us: float = setting(0.0, "what each kernel adds where the host computes itself", unit="microseconds", ge=0)
    step_ms: float = setting(0.0, "of each step whatever its size: batches, metrics, Python", unit="milliseconds", ge=0)


class Links(Section):
    """How fast devices exchange data. Latencies are of each further rank in a ring."""

    node_gb_s: float = setting(0.0, "what one device sends to others of its node, each way", unit="GB/s", ge=0)
    network_gb_s: float = setting(0.0, "what a whole node sends to others, each way", unit="GB/s", ge=0)
    hop_us: float = setting(0.0, "part of a ring's latency that isn't hidden, for each rank", unit="microseconds", ge=0)
    broadcast_hop_us: float = setting(0.0, "the same where owners send tensor by tensor", unit="microseconds", ge=0)
    tensor_exposed: float = setting(1.0, "share of overlapped tensor-parallel traffic that isn't hidden", ge=0, le=1)
    contention: float = setting(
        0.0,
        "of the time that traffic would take on a node's links: by so much it slows the kernels that hide it",
        ge=0,
        le=1,
    )
    nodes_to_half: float = setting(
        0.0, "nodes in one group at which the network's rate is halved; 0: stays", unit="nodes", ge=0
    )


class Cluster(Section):
    """Devices of one kind, so many on a node."""

    name: str = setting(..., "for reports", min_length=1)
    device: str = setting(..., "as PyTorch names it", min_length=1)
    devices_per_node: int = setting(1, "devices that the fast links join", gt=0)
    memory_gib: float = setting(..., "of one device", unit="GiB", gt=0)
    reserve_gib: float = setting(0.0, "memory that isn't for tensors: driver, communication", unit="GiB", ge=0)
    fragmentation: float = setting(0.0, "memory lost between tensors, as a share of theirs", ge=0)
    peak_tflops: float = setting(..., "of one device, which MFU is measured against", unit="TFLOPS", gt=0)
    dtype: NumberFormat = setting(
        "bfloat16", "number format that the rates are of; bfloat16 and float16 are taken for alike"
    )
    dollars_per_hour: float = setting(0.0, "price of one device for an hour; 0: not known", unit="dollars", ge=0)
    source: str = setting("", "where the figures are from")
    rates: Rates = setting(..., "of one device")
    links: Links = setting(Links, "between devices")
    overhead: float = setting(0.0, "share of a step that goes to everything that isn't named", ge=0)

    @model_validator(mode="after")
    def _check(self) -> "Cluster":
        if self.devices_per_node > 1 and not self.links.node_gb_s:
            raise ValueError(
                f"links.node_gb_s = 0 with devices_per_node = {self.devices_per_node}: nothing could be exchanged; "
                "give what one device sends to another of its node, in GB/s"
            )
        return self
