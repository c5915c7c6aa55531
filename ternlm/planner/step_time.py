"""How long a training step takes: kernels, what is exchanged and not hidden behind them, idle time of the pipeline.

What overlaps is as in TernLM's program: weights of the next layer are gathered and gradients of the last one reduced
while a layer computes; what crosses groups after the step, and what tensor parallelism exchanges, is waited for.
No torch here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ternlm.config.layout import Layout
from ternlm.config.run import Config
from ternlm.planner.cluster import Cluster
from ternlm.planner.kernels import Kernels
from ternlm.planner.step_traffic import step_traffic
from ternlm.planner.times import Network, kernel_seconds
from ternlm.planner.traffic import Traffic, axis_ranks
from ternlm.planner.work import Program, Stage, Work, step_work

KERNELS = ("matmul", "attention", "other", "launch")
_WITHIN = ("tensor", "context", "pipeline", "world")
"""Axes along which a microbatch waits for what is exchanged; likewise those over which states are cut."""
_CUT = ("shard", "replicas", "data")


@dataclass(frozen=True)
class StepTime:
    """A step of the pipeline rank that takes longest."""

    parts: dict[str, float]
    """Seconds by what they go to: a kernel's kind, `all_gather over shard`, bubble, optimizer, overhead."""
    rank: int
    """Which rank of the pipeline."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def exposed(self) -> dict[str, float]:
        """Seconds of communication that nothing hides, by collective."""
        return {name: seconds for name, seconds in self.parts.items() if " over " in name}


@dataclass(frozen=True)
class Step:
    """All that a step's time depends on beside the cluster."""

    layout: Layout
    work: Work
    traffic: tuple[tuple[Traffic, ...], ...]
    """By rank of the pipeline."""
    program: Program
    schedule: str
    stages_per_rank: int


def describe_step(
    config: Config,
    layout: Layout,
    devices_per_node: int,
    program: Program | None = None,
    document_tokens: int | None = None,
) -> Step:
    """Return what a step computes and exchanges in this layout."""
    program = program or Program(fused=config.compute.compile != "off")
    work = step_work(config, layout, program, document_tokens)
    traffic: dict[Stage, tuple[Traffic, ...]] = {}
    for rank, stage in enumerate(work.stages):
        if stage not in traffic:  # those in the middle send alike
            place = rank * layout.data_ranks * layout.tensor
            traffic[stage] = tuple(step_traffic(config, layout.world, place, devices_per_node, layout=layout))
    by_rank = tuple(traffic[stage] for stage in work.stages)
    parallel = config.parallel
    return Step(layout, work, by_rank, program, parallel.pipeline_schedule, parallel.stages_per_rank)


def step_time(step: Step, cluster: Cluster) -> StepTime:
    """Return the time of a step on a cluster."""
    timed = []
    for rank in first_ranks(step):
        own = step.traffic[rank], step.work.update_bytes[rank], step.work.accumulate_bytes[rank]
        timed.append(RankTime(step, cluster, rank).with_states(step.layout, *own))
    return max(timed, key=lambda time: time.seconds)


def first_ranks(step: Step) -> list[int]:
    """Return the ranks of the pipeline that differ in what they do, the first of each kind."""
    stages = step.work.stages
    return [rank for rank, stage in enumerate(stages) if stages.index(stage) == rank]


class RankTime:
    """One pipeline rank's step: at first all but what depends on how states are cut."""

    def __init__(self, step: Step, cluster: Cluster, rank: int) -> None:
        self.own, self.cluster, self.rank = step, cluster, rank
        self.work, self.stage = step.work, step.work.stages[rank]
        # Weights and activations that are gathered in one byte each instead of two.
        self.smaller = 0.5 if step.program.float8_messages else 1.0
        self.parts: dict[str, float] = {}
        self.forward, self.backward = self._kernels(self.stage)
        m = self.work.microbatches
        for times in (self.forward, self.backward):
            for part, seconds in times.items():
                _add(self.parts, part, m * seconds)
        if cluster.rates.fresh_gb_s:
            _add(self.parts, "other", m * self.work.fresh_bytes[rank] / (cluster.rates.fresh_gb_s * 1e9))
        self.waited = self._waited(t for t in step.traffic[rank] if t.axis in _WITHIN)
        self._bubble()

    def with_states(
        self, layout: Layout, traffic: Sequence[Traffic], update_bytes: float, accumulate_bytes: float
    ) -> StepTime:
        """Return the whole step, with states cut as in `layout`; of traffic, what isn't of states is passed over."""
        parts, network = dict(self.parts), self._network(layout)
        forward, backward = (sum(times.values()) for times in (self.forward, self.backward))
        # What is exchanged within a microbatch lengthens it, and with it what hides the rest.
        busy = self.work.microbatches * (forward + backward) + self.waited
        room = {"f": busy * forward / (forward + backward), "b": busy * backward / (forward + backward)}
        for name, seconds in self._sharded(layout, network, [t for t in traffic if t.axis in _CUT], room):
            _add(parts, name, seconds)
        for t in (t for t in traffic if t.axis == "across"):
            _add(parts, part_name(t), network.seconds(t) + network.latency(t))
        rates = self.cluster.rates
        _add(parts, "optimizer", update_bytes / ((rates.update_gb_s or rates.memory_gb_s) * 1e9))
        _add(parts, "other", self.work.microbatches * accumulate_bytes / (rates.memory_gb_s * 1e9))
        whole = sum(parts.values())
        _add(parts, "overhead", whole * self.cluster.overhead + self.cluster.rates.step_ms * 1e-3)
        return StepTime(parts, self.rank)

    def _network(self, layout: Layout) -> Network:
        return Network(self.cluster, axis_ranks(layout, layout.place(self.rank * layout.data_ranks * layout.tensor)))

    def _kernels(self, stage: Stage) -> tuple[dict[str, float], dict[str, float]]:
        """Return a microbatch's time forward and backward by part."""
        work, rates = self.work, self.cluster.rates

        def add_up(counted: Sequence[tuple[int, Kernels]]) -> dict[str, float]:
            timed = [(count, kernel_seconds(kernels, rates, work.document_tokens)) for count, kernels in counted]
            return {part: sum(count * times[part] for count, times in timed) for part in KERNELS}

        return add_up(work.forward_of(stage)), add_up(work.backward_of(stage))

    def _waited(self, traffic: Iterable[Traffic]) -> float:
        """Add what is exchanged in the midst of a microbatch; return how long it takes."""
        whole, network = 0.0, self._network(self.own.layout)
        attention = self.work.microbatches * (self.forward["attention"] + self.backward["attention"])
        for t in traffic:
            seconds = self._seconds(network, t)
            if t.axis == "tensor" and self.own.program.hidden_tensor:
                seconds *= self.cluster.links.tensor_exposed
            elif t.axis == "context" and t.operation == "send":  # on its way round while attention computes
                seconds, attention = max(seconds - attention, 0.0), max(attention - seconds, 0.0)
            seconds += t.count * 2e-6 * self.cluster.links.hop_us if t.between_nodes else 0.0
            _add(self.parts, part_name(t), seconds)
            whole += seconds
        return whole

    def _sharded(
        self, layout: Layout, network: Network, traffic: Iterable[Traffic], room: Mapping[str, float]
    ) -> Iterator[tuple[str, float]]:
        """Yield what isn't hidden of gathered weights and reduced gradients; all times are of the whole step.

        room: computation that may hide it, forward and backward.
        """
        links, m = self.cluster.links, self.work.microbatches
        own = self._microbatches_behind()
        behind = {(phase, far): seconds for phase, seconds in room.items() for far in (False, True)}
        for t in traffic:
            busy = self._seconds(network, t)
            if t.operation == "all_gather" and self.own.program.broadcasts:
                calls = Traffic(t.operation, t.axis, t.ranks, t.between_nodes, 0, self.stage.blocks * 9)
                busy += network.latency(calls, links.broadcast_hop_us)
            else:
                yield part_name(t), network.latency(t)
            phases = "b" if t.operation != "all_gather" else "fb" if layout.reshard else "f"
            # Once a step, behind one microbatch, unless it happens in each.
            once = t.axis == "replicas" or (not layout.reshard and (phases == "f" or layout.grads == 1))
            for phase in phases:
                need = busy / len(phases)
                hidden = min(need, room[phase] * (own / m if once else 1), behind[phase, t.between_nodes])
                behind[phase, t.between_nodes] -= hidden
                slowed = links.contention * t.sent_bytes / len(phases) / (links.node_gb_s * 1e9)
                yield part_name(t), need - hidden + min(slowed, hidden)

    def _microbatches_behind(self) -> float:
        """Return behind how many microbatches what a rank exchanges once a step is hidden.

        One, unless stages take turns: then the next stage's microbatches run meanwhile, as many as there are ranks.
        """
        p, each = self.own.layout.pipeline, self.own.stages_per_rank
        if p == 1 or self.own.schedule != "interleaved":
            return 1.0
        return min(1.0 + p * (each - 1) / each, self.work.microbatches)

    def _seconds(self, network: Network, t: Traffic) -> float:
        return network.seconds(t) * (self.smaller if t.operation == "all_gather" else 1.0)

    def _bubble(self) -> None:
        """Add the pipeline's idle time: filling and emptying it with the other ranks' stages."""
        p = self.own.layout.pipeline
        if p == 1:
            return
        others = [sum(sum(times.values()) for times in self._kernels(stage)) for stage in self.work.stages]
        mean = sum(others) / p + self.waited / self.work.microbatches
        idle = (p - 1) * mean / self.own.stages_per_rank
        if self.own.schedule == "zero_bubble":  # weight gradients, a third of the work, fill it
            idle /= 3
        _add(self.parts, "bubble", idle)


def _add(parts: dict[str, float], part: str, seconds: float) -> None:
    if seconds:
        parts[part] = parts.get(part, 0.0) + seconds


def part_name(t: Traffic) -> str:
    """Return under which part of a step its time stands."""
    return f"{'send' if t.operation == 'recv' else t.operation} over {t.axis}"
