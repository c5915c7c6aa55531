"""A planned run: its settings and layout on a cluster, with the time and memory that they come to.

All figures are predictions; docs/planner.md publishes how far they were off on runs that others measured. No torch
here.
"""

from dataclasses import dataclass

from ternlm.config.layout import Layout, resolve_layout
from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.cluster import Cluster
from ternlm.planner.flops import Flops, training_flops
from ternlm.planner.memory import GIB, Memory, fits, peak_memory
from ternlm.planner.step_time import Step, StepTime, describe_step, step_time

HOUR, DAY = 3600.0, 86400.0
MEMORY_ERROR = 0.08
"""Share of a device's memory by which a predicted peak may be off: most published ones are off by less."""
_BOUNDS = {
    "matmul": "matrix products",
    "attention": "attention",
    "other": "memory bandwidth",
    "optimizer": "memory bandwidth",
    "launch": "kernel launches",
    "bubble": "the pipeline's idle time",
    "overhead": "what isn't named",
}
"""What limits a part of the step; every other part is communication."""


@dataclass(frozen=True)
class Plan:
    """A run on so many devices of a cluster."""

    config: Config
    cluster: Cluster
    step: Step
    time: StepTime
    memory: Memory
    document_tokens: int
    """Length of the documents that attention may not cross."""

    @property
    def layout(self) -> Layout:
        """The degrees."""
        return self.step.layout

    @property
    def nodes(self) -> int:
        """How many nodes the devices fill."""
        return -(-self.layout.world // self.cluster.devices_per_node)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, of all devices."""
        return self.config.batch.global_sequences * self.config.data.seq_len

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.step_tokens / self.layout.world / self.time.seconds

    @property
    def flops(self) -> Flops:
        """Operations of a step, of one device, in the three conventions."""
        tokens, keep = self.step_tokens, self.config.compute.recompute_keep
        again = self.config.compute.recompute if keep == "nothing" else 0.0
        pairs = tokens * self.document_tokens
        whole = training_flops(self.config.model, tokens, pairs, again, self.config.adapter)
        world = self.layout.world
        return Flops(whole.full / world, whole.causal / world, whole.hardware / world)

    @property
    def tflops(self) -> Flops:
        """Of one device in a second, in the three conventions."""
        flops, each = self.flops, self.time.seconds * 1e12
        return Flops(flops.full / each, flops.causal / each, flops.hardware / each)

    @property
    def mfu(self) -> Flops:
        """The same as a share of the device's peak."""
        tflops, peak = self.tflops, self.cluster.peak_tflops
        return Flops(tflops.full / peak, tflops.causal / peak, tflops.hardware / peak)

    @property
    def fits(self) -> bool:
        """Whether the peak is within a device's memory."""
        return fits(self.memory, self.cluster)

    @property
    def fits_barely(self) -> bool:
        """Whether the peak is within a device's memory, but no further from its limit than predictions err."""
        return self.fits and self.memory.bytes > (1 - MEMORY_ERROR) * self.cluster.memory_gib * GIB

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds of a step by what limits them, the greatest first."""
        totals: dict[str, float] = {}
        for part, seconds in self.time.parts.items():
            limit = _BOUNDS.get(part, "communication")
            totals[limit] = totals.get(limit, 0.0) + seconds
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def make_plan(
    config: Config,
    cluster: Cluster,
    world: int,
    document_tokens: int | None = None,
    layout: Layout | None = None,
) -> Plan:
    """Predict a run on `world` devices.

    document_tokens: mean length of the documents that are packed; whole sequences if not given. layout: what
    `resolve_layout` would return, where the caller has it. Raises ConfigError where the layout isn't legal.
    """
    length = check_document_tokens(config, document_tokens)
    config = in_format(config, cluster)
    layout = layout or resolve_layout(config, world)
    step = describe_step(config, layout, cluster.devices_per_node, document_tokens=length)
    time, memory = step_time(step, cluster), peak_memory(config, layout, cluster)
    return Plan(config, cluster, step, time, memory, length)


def in_format(config: Config, cluster: Cluster) -> Config:
    """Return the settings with `auto` as the cluster's number format; raises ConfigError where they ask for another."""
    dtype = config.compute.dtype
    if dtype == "auto":
        return config.model_copy(update={"compute": config.compute.model_copy(update={"dtype": cluster.dtype})})
    if (dtype == "float32") != (cluster.dtype == "float32"):
        raise ConfigError(
            f"compute.dtype = {dtype!r} can't be planned for with cluster {cluster.name!r}, whose rates are of "
            f"{cluster.dtype}; set compute.dtype={cluster.dtype}, or measure with `tern calibrate --dtype {dtype}`"
        )
    return config


def check_document_tokens(config: Config, document_tokens: int | None) -> int:
    """Return the length that attention goes over; raises ConfigError where it can't be."""
    seq_len = config.data.seq_len
    if document_tokens is None:
        return seq_len
    if not 0 < document_tokens <= seq_len:
        raise ConfigError(
            f"documents of {document_tokens} tokens must have 1 to data.seq_len = {seq_len}: longer ones are cut; "
            "give the mean length after cutting"
        )
    if config.data.packing == "across" and document_tokens < seq_len:
        raise ConfigError(
            f"documents of {document_tokens} tokens make no difference with data.packing = 'across', where attention "
            "crosses documents; leave it out or set data.packing=documents"
        )
    return document_tokens
