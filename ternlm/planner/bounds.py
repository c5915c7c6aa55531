"""A mesh's time from below, for every way to cut its states: what a search orders meshes by.

Exact but for what is added later: latencies, and rows that pad a cut. No torch here.
"""

from collections.abc import Iterator
from dataclasses import replace

from ternlm.config.layout import Layout
from ternlm.config.run import Config
from ternlm.config.stages import own_stages
from ternlm.planner.choice import Choice
from ternlm.planner.cluster import Cluster
from ternlm.planner.step_time import RankTime, describe_step, first_ranks
from ternlm.planner.step_traffic import reduced_bytes
from ternlm.planner.traffic import Traffic, axis_ranks, lie_on_several_nodes
from ternlm.planner.work import accumulate_bytes, held_parameters, trained_parameters, update_bytes


class MeshBound:
    """The least time of steps that differ only in how states are cut."""

    def __init__(self, config: Config, mesh: Choice, cluster: Cluster, world: int, document_tokens: int) -> None:
        self.config, self.world = mesh.in_config(config), world
        self.devices = cluster.devices_per_node
        # The finest cut: what tensor ranks sum of whole parameters is each one's piece, adapters' above all.
        layout = replace(mesh.layout(world), params=1, grads=1, optimizer=mesh.layout(world).data_ranks)
        step = describe_step(self.config, layout, self.devices, document_tokens=document_tokens)
        self.microbatches, self.element = step.work.microbatches, step.work.element_bytes
        self.ranks = [RankTime(step, cluster, rank) for rank in first_ranks(step)]
        self.parameters = {rank.rank: self._parameters(rank.rank, step.layout) for rank in self.ranks}
        self.reduced = reduced_bytes(config)

    def floor(self) -> float:
        """Return a time that no way to cut states beats, without looking at any: as if states cost nothing."""
        return max(rank.with_states(rank.own.layout, [], 0.0, 0.0).seconds for rank in self.ranks)

    def seconds(self, layout: Layout) -> float:
        """Return a time that a step with states cut as in `layout` doesn't beat."""
        return max(self._rank_seconds(rank, layout) for rank in self.ranks)

    def _rank_seconds(self, rank: RankTime, layout: Layout) -> float:
        own, root, trained = self.parameters[rank.rank]
        traffic = list(self._traffic(rank.rank, layout, own, root, trained))
        adding = accumulate_bytes(trained, layout, self.element) * (self.microbatches > 1)
        return rank.with_states(layout, traffic, update_bytes(trained, layout, self.element), adding).seconds

    def _parameters(self, rank: int, layout: Layout) -> tuple[float, float, float]:
        """Return how many parameters a rank has, how many are gathered once a microbatch, and how many are trained."""
        model, stages = self.config.model, own_stages(self.config, layout.pipeline, rank)
        table, hidden = model.vocab_size * model.hidden_size / layout.tensor, model.hidden_size
        root = sum(table * stage.first + hidden * stage.last for stage in stages)
        trained = trained_parameters(self.config, layout, stages)
        return held_parameters(self.config, layout, stages), root, trained

    def _traffic(self, rank: int, layout: Layout, own: float, root: float, trained: float) -> Iterator[Traffic]:
        """Yield what cutting the states exchanges, with no count: latencies are left out."""
        axes = axis_ranks(layout, layout.place(rank * layout.data_ranks * layout.tensor))

        def one(operation: str, axis: str, payload: float) -> Traffic:
            ranks = axes[axis]
            return Traffic(
                operation, axis, len(ranks), lie_on_several_nodes(ranks, self.devices), int(payload), count=0
            )

        m, piece = self.microbatches, trained / layout.shard
        if layout.shard > 1:
            gathered = (2 * own - root) * m if layout.reshard else own
            yield one("all_gather", "shard", gathered * self.element)
            yield one("reduce_scatter", "shard", trained * self.reduced * (m if layout.grads > 1 else 1))
        if layout.across > 1:
            yield one("reduce_scatter", "across", piece * 4)
            yield one("all_gather", "across", piece * 4)
        if "replicas" in axes:
            yield one("all_reduce", "replicas", piece / layout.across * (self.reduced if layout.across == 1 else 4))
