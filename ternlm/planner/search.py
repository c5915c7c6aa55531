"""The fastest layouts of a run on a cluster, found best first: few of the hundred thousands are looked at whole.

Meshes (degrees, schedule, microbatch) are taken in the order of bounds.py's least times; memory decides afterwards what
must be recomputed and cut. No torch here.
"""

import heapq
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.bounds import MeshBound
from ternlm.planner.choice import Choice, choice_of, meshes, recomputes, shardings
from ternlm.planner.cluster import Cluster
from ternlm.planner.memory import GIB, peak_memory
from ternlm.planner.plan import Plan, check_document_tokens, in_format, make_plan


@dataclass
class Found:
    """What a search came to."""

    best: list[tuple[Choice, Plan]] = field(default_factory=list)
    """The fastest that fit, the fastest first: of each mesh the fastest recompute and way to cut states."""
    illegal: Counter[str] = field(default_factory=Counter)
    """How many meshes were refused, by reason: the first message of its kind."""
    too_large: int = 0
    """Meshes whose states and activations fit nowhere, however cut and recomputed."""
    least: tuple[float, Choice] | None = None
    """The least memory, in bytes, that any of these needs."""
    slower: int = 0
    """Legal meshes that weren't looked at whole: even if memory were endless, they'd be slower than all of the best."""
    examined: int = 0
    """Layouts whose time was predicted."""


class Search:
    """Finds the best layouts of one run."""

    def __init__(self, config: Config, cluster: Cluster, world: int, document_tokens: int | None = None) -> None:
        self.config, self.cluster, self.world = in_format(config, cluster), cluster, world
        self.document_tokens = check_document_tokens(config, document_tokens)
        self.found = Found()
        self._messages: dict[str, str] = {}

    def run(self, count: int = 10) -> Found:
        """Return the `count` fastest; raises ConfigError, with the nearest miss, where nothing fits."""
        found = self.found
        queue = [(self._mesh_bound(mesh), order, mesh) for order, mesh in enumerate(self._legal_meshes())]
        heapq.heapify(queue)
        while queue and queue[0][0] < self._to_beat(count):
            _, _, mesh = heapq.heappop(queue)
            best = self._best_of(mesh, self._to_beat(count))
            if best and not self._same_under_another_name(best):
                found.best = sorted([*found.best, best], key=lambda one: one[1].time.seconds)[:count]
        found.slower = len(queue)
        if not found.best:
            raise ConfigError(self._nothing_fits())
        return found

    def _same_under_another_name(self, found: tuple[Choice, Plan]) -> bool:
        """Whether context parallelism and larger microbatches only come to what is there without."""
        choice, plan = found
        return choice.context > 1 and any(
            other.time.seconds == plan.time.seconds and other.memory.bytes == plan.memory.bytes
            for simpler, other in self.found.best
            if simpler.context < choice.context
        )

    def _to_beat(self, count: int) -> float:
        best = self.found.best
        return best[count - 1][1].time.seconds if len(best) >= count else math.inf

    def _legal_meshes(self) -> Iterator[Choice]:
        for mesh in meshes(self.config, self.world, self.cluster.devices_per_node):
            problem = self._problem(self._smallest(mesh)) and self._problem(mesh)
            problem = problem or mesh.settings_problem(self.config)
            if problem:
                self._refuse(problem)
                continue
            tried = [self._smallest(one) for one in self._recomputes(mesh)]
            least, smallest = min(((self._memory(one), one) for one in tried), key=lambda found: found[0])
            if least <= self.cluster.memory_gib * GIB:
                yield mesh
                continue
            self.found.too_large += 1
            if self.found.least is None or least < self.found.least[0]:
                self.found.least = least, smallest

    def _recomputes(self, mesh: Choice) -> Iterator[Choice]:
        """Yield the mesh with each legal recompute."""
        return (one for one in recomputes(mesh) if not one.recompute or mesh.pipeline_schedule != "zero_bubble")

    def _smallest(self, mesh: Choice) -> Choice:
        """Return the mesh with states cut over all ranks that may be."""
        ranks = self.world // mesh.pipeline // mesh.tensor
        grads = 1 if mesh.pipeline_schedule == "zero_bubble" else ranks
        return replace(mesh, params=grads, grads=grads, optimizer=ranks)

    def _memory(self, choice: Choice) -> float:
        """Return bytes."""
        return peak_memory(choice.in_config(self.config), choice.layout(self.world), self.cluster).bytes

    def _problem(self, choice: Choice) -> str | None:
        return choice.layout_problem(self.config, self.world)

    def _refuse(self, message: str) -> None:
        kind = re.sub(r"\d+", "#", message.partition(";")[0])
        self.found.illegal[self._messages.setdefault(kind, message)] += 1

    def _bound(self, choice: Choice) -> MeshBound:
        return MeshBound(self.config, choice, self.cluster, self.world, self.document_tokens)

    def _mesh_bound(self, mesh: Choice) -> float:
        """Return a time that no recompute and no way to cut the states of a mesh beats."""
        bound = self._bound(mesh)
        return min(bound.seconds(cut.layout(self.world)) for cut in shardings(mesh, self.world))

    def _best_of(self, mesh: Choice, to_beat: float) -> tuple[Choice, Plan] | None:
        """Return the fastest recompute and way to cut states of a mesh that fit; None where they don't beat a time."""
        candidates: list[tuple[float, int, Choice]] = []
        for choice in self._recomputes(mesh):
            bound = self._bound(choice)
            for cut in shardings(choice, self.world):
                seconds = bound.seconds(cut.layout(self.world))
                if seconds < to_beat:
                    candidates.append((seconds, len(candidates), cut))
        best: tuple[Choice, Plan] | None = None
        for seconds, _, cut in sorted(candidates):
            if best and seconds >= best[1].time.seconds:
                break
            if self._memory(cut) > self.cluster.memory_gib * GIB or self._problem(cut):
                continue
            plan = self._plan(cut)
            self.found.examined += 1
            if best is None or plan.time.seconds < best[1].time.seconds * (1 - 1e-9):
                best = cut, plan
        return best

    def _plan(self, choice: Choice) -> Plan:
        config, layout = choice.in_config(self.config), choice.layout(self.world)
        return make_plan(config, self.cluster, self.world, self.document_tokens, layout)

    def _nothing_fits(self) -> str:
        found = self.found
        if found.least is None:
            reasons = "; ".join(f"{message} ({count} of them)" for message, count in found.illegal.most_common(3))
            return f"no layout of {self.world} devices is legal: {reasons}"
        least, choice = found.least
        where = " ".join(choice.overrides(choice_of(self.config), self.world)) or "the degrees of the recipe"
        return (
            f"no layout of {self.world} devices of {self.cluster.memory_gib:g} GiB fits: the least is "
            f"{least / GIB:.1f} GiB, at {where}; take more devices, ones with more memory, "
            "shorter sequences or a smaller model"
        )
