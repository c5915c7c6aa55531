"""How long a training step takes: kernels, what is exchanged and not hidden behind them, idle time of the pipeline.

What overlaps is as in TernLM's program: weights of the next layer are gathered and gradients of the last one reduced
while a layer computes; what crosses groups after the step, and what tensor parallelism exchanges, is waited for.
No torch here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ternlm.config.layout import Layout
from ternlm.config.run import Config
from ternlm.planner.cluster import Cluster
from ternlm.planner.step_traffic import step_traffic
from ternlm.planner.times import Network, kernel_seconds
from ternlm.planner.traffic import Traffic, axis_ranks
from ternlm.planner.work import Program, Stage, Work, step_work

KERNELS = ("matmul", "attention", "other", "launch")


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
    ranks = range(step.layout.pipeline)
    timed = [_RankTime(step, cluster, rank).step() for rank in ranks if _is_first_of_kind(step, rank)]
    return max(timed, key=lambda time: time.seconds)


def _is_first_of_kind(step: Step, rank: int) -> bool:
    return step.work.stages.index(step.work.stages[rank]) == rank


class _RankTime:
    """One pipeline rank's step."""

    def __init__(self, step: Step, cluster: Cluster, rank: int) -> None:
        self.own, self.cluster, self.rank = step, cluster, rank
        self.work, self.stage, self.layout = step.work, step.work.stages[rank], step.layout
        place = step.layout.place(rank * step.layout.data_ranks * step.layout.tensor)
        # Weights and activations that are gathered in one byte each instead of two.
        self.smaller = 0.5 if step.program.float8_messages else 1.0
        self.network = Network(cluster, axis_ranks(step.layout, place))
        self.parts: dict[str, float] = {}
        self.forward, self.backward = self._kernels(self.stage)

    def step(self) -> StepTime:
        """Return the parts of this rank's step."""
        m, links = self.work.microbatches, self.cluster.links
        for times in (self.forward, self.backward):
            for part, seconds in times.items():
                self._add(part, m * seconds)
        traffic = self.own.traffic[self.rank]
        waited = self._waited(t for t in traffic if t.axis in ("tensor", "context", "pipeline", "world"))
        forward, backward = (sum(times.values()) for times in (self.forward, self.backward))
        # What is exchanged within a microbatch lengthens it, and with it what hides the rest.
        busy = m * (forward + backward) + waited
        share = forward / (forward + backward)
        self._sharded([t for t in traffic if t.axis in ("shard", "replicas", "data")], busy * share, busy * (1 - share))
        for t in (t for t in traffic if t.axis == "across"):
            self._add(_name(t), self.network.seconds(t) + self.network.latency(t))
        self._bubble(waited)
        memory = self.cluster.rates.memory_gb_s * 1e9
        self._add("optimizer", self.work.update_bytes[self.rank] / memory)
        self._add("other", m * self.work.accumulate_bytes[self.rank] / memory)
        whole = sum(self.parts.values())
        self._add("overhead", whole * self.cluster.overhead + self.cluster.rates.step_ms * 1e-3)
        assert links is not None
        return StepTime(self.parts, self.rank)

    def _kernels(self, stage: Stage) -> tuple[dict[str, float], dict[str, float]]:
        """Return a microbatch's time forward and backward by part."""
        work, rates = self.work, self.cluster.rates

        def add_up(*counted: tuple[float, dict[str, float]]) -> dict[str, float]:
            return {part: sum(count * times[part] for count, times in counted) for part in KERNELS}

        block, block_back, again, ends, ends_back = (
            kernel_seconds(kernels, rates, work.document_tokens)
            for kernels in (work.forward, work.backward, work.again, stage.ends_forward, stage.ends_backward)
        )
        return (
            add_up((stage.blocks, block), (1, ends)),
            add_up((stage.blocks, block_back), (stage.recomputed, again), (1, ends_back)),
        )

    def _waited(self, traffic: Iterable[Traffic]) -> float:
        """Add what is exchanged in the midst of a microbatch; return how long it takes."""
        whole, attention = 0.0, self.work.microbatches * (self.forward["attention"] + self.backward["attention"])
        for t in traffic:
            seconds = self._seconds(t)
            if t.axis == "tensor" and self.own.program.hidden_tensor:
                seconds *= self.cluster.links.tensor_exposed
            elif t.axis == "context" and t.operation == "send":  # on its way round while attention computes
                seconds, attention = max(seconds - attention, 0.0), max(attention - seconds, 0.0)
            seconds += t.count * 2e-6 * self.cluster.links.hop_us if t.between_nodes else 0.0
            self._add(_name(t), seconds)
            whole += seconds
        return whole

    def _sharded(self, traffic: Sequence[Traffic], forward: float, backward: float) -> None:
        """Add what isn't hidden of gathered weights and reduced gradients; all times are of the whole step."""
        links, m = self.cluster.links, self.work.microbatches
        own = self._microbatches_behind()
        behind = {(phase, far): s for phase, s in (("f", forward), ("b", backward)) for far in (False, True)}
        for t in traffic:
            busy = self._seconds(t)
            if t.operation == "all_gather" and self.own.program.broadcasts:
                calls = Traffic(t.operation, t.axis, t.ranks, t.between_nodes, 0, self.stage.blocks * 9)
                busy += self.network.latency(calls, links.broadcast_hop_us)
            else:
                self._add(_name(t), self.network.latency(t))
            phases = "b" if t.operation != "all_gather" else "fb" if self.layout.reshard else "f"
            # Once a step, behind one microbatch, unless it happens in each.
            once = t.axis == "replicas" or (not self.layout.reshard and (phases == "f" or self.layout.grads == 1))
            for phase in phases:
                need, room = busy / len(phases), (forward if phase == "f" else backward) * (own / m if once else 1)
                hidden = min(need, room, behind[phase, t.between_nodes])
                behind[phase, t.between_nodes] -= hidden
                slowed = links.contention * t.sent_bytes / len(phases) / (links.node_gb_s * 1e9)
                self._add(_name(t), need - hidden + min(slowed, hidden))

    def _microbatches_behind(self) -> float:
        """Return behind how many microbatches what a rank exchanges once a step is hidden.

        One, unless stages take turns: then the next stage's microbatches run meanwhile, as many as there are ranks.
        """
        p, each = self.layout.pipeline, self.own.stages_per_rank
        if p == 1 or self.own.schedule != "interleaved":
            return 1.0
        return min(1.0 + p * (each - 1) / each, self.work.microbatches)

    def _seconds(self, t: Traffic) -> float:
        return self.network.seconds(t) * (self.smaller if t.operation == "all_gather" else 1.0)

    def _bubble(self, waited: float) -> None:
        """Add the pipeline's idle time: filling and emptying it with the other ranks' stages."""
        p = self.layout.pipeline
        if p == 1:
            return
        others = [sum(sum(times.values()) for times in self._kernels(stage)) for stage in self.work.stages]
        mean = sum(others) / p + waited / self.work.microbatches
        idle = (p - 1) * mean / self.own.stages_per_rank
        if self.own.schedule == "zero_bubble":  # weight gradients, a third of the work, fill it
            idle /= 3
        self._add("bubble", idle)

    def _add(self, part: str, seconds: float) -> None:
        if seconds:
            self.parts[part] = self.parts.get(part, 0.0) + seconds


def _name(t: Traffic) -> str:
    return f"{'send' if t.operation == 'recv' else t.operation} over {t.axis}"
