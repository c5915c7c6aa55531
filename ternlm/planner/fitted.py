"""The planner's constants: few, physical, fitted to published runs by benchmarks/planner/fit.py (see docs/planner.md).

They turn a data sheet into what kernels and links really do. Nothing in them is of one run. No torch here.
"""

import functools
from pathlib import Path

from ternlm.config.load import load_section
from ternlm.config.section import Section, setting


class Family(Section):
    """Of devices of one generation."""

    matmul: float = setting(..., "share of the peak that large matrix products have", gt=0, le=1)
    attention: float = setting(..., "share of the peak that attention over long documents has, forward", gt=0, le=1)
    attention_backward: float = setting(..., "the same backward, counted as 2.5 forwards", gt=0, le=1)


class Constants(Section):
    """What is true of all devices and programs."""

    ampere: Family = setting(..., "A100, A800")
    hopper: Family = setting(..., "H100, H200, H800; taken for blackwell too, of which no run was at hand")
    power: float = setting(..., "rates of products and attention go with (power limit / full power) to this", ge=0)
    float8: float = setting(..., "rate of products in float8 over that in bfloat16, casts included", gt=1)
    flash1: float = setting(..., "rate of attention with FlashAttention 1 over that with 2", gt=0, le=1)
    biased: float = setting(..., "the same for attention with a bias for each distance (ALiBi)", gt=0, le=1)
    half_inner: float = setting(..., "summed dimension at which a product has half its rate", unit="elements", gt=0)
    half_waves: float = setting(..., "waves of 128 x 256 tiles at which a product has half its rate", gt=0)
    half_attention: float = setting(..., "document at which attention has half its rate", unit="tokens", gt=0)
    memory: float = setting(..., "share of the memory's rate that streaming kernels have", gt=0, le=1)
    launch_us: float = setting(..., "least time between the starts of two kernels", unit="microseconds", gt=0)
    node: float = setting(..., "share of the rate of links inside a node that collectives have", gt=0, le=1)
    network: float = setting(..., "share of the rate between nodes that collectives have", gt=0, le=1)
    contention: float = setting(
        ...,
        "of the time that traffic would take on a node's links: by so much it slows the kernels that hide it",
        ge=0,
        le=1,
    )
    nodes_to_half: float = setting(..., "nodes in one group at which the network's rate is halved", unit="nodes", gt=0)
    hop_us: float = setting(..., "of each rank in a ring between nodes, not hidden", unit="microseconds", gt=0)
    broadcast_hop_us: float = setting(
        ..., "the same where owners broadcast tensor by tensor", unit="microseconds", gt=0
    )
    tensor_exposed: float = setting(..., "share of overlapped tensor-parallel traffic that isn't hidden", ge=0, le=1)
    reserve_gib: float = setting(..., "memory that isn't for tensors", unit="GiB", ge=0)
    fragmentation: float = setting(..., "memory lost between tensors, as a share of theirs", ge=0)
    overhead: float = setting(..., "share of a step that goes to everything else", ge=0)


@functools.cache
def fitted_constants() -> Constants:
    """Return the constants that TernLM comes with."""
    return load_section(Constants, Path(__file__).with_name("fitted.toml"))
