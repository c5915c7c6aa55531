"""Hold what steps take against what the planner predicts of them, part by part, while a run trains."""

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ternlm.data.batch import Batch
from ternlm.monitor.memory import peak_memory
from ternlm.monitor.step_profile import StepProfile
from ternlm.planner.cluster import Cluster
from ternlm.planner.compare import Comparison, compare, memory_alarm
from ternlm.planner.flops import squared_lengths
from ternlm.planner.plan import Plan, make_plan
from ternlm.train.loop import Every
from ternlm.train.run import Run

logger = logging.getLogger(__name__)

Told = tuple[dict[str, float], int, int]
"""A rank's seconds by part, tokens and squared lengths of documents."""
WARM_UP = 2
"""Steps of a process that compile and fill caches; they say nothing about the rest."""


class PlanWatch:
    """Profiles a step now and then and warns of parts that are off. Collective: every rank must have one."""

    def __init__(self, run: Run, cluster: Cluster) -> None:
        """Raises ConfigError where the cluster's rates aren't of the run's number format."""
        self._run, self._cluster = run, cluster
        compute = run.config.compute.model_copy(update={"dtype": str(run.dtype).removeprefix("torch.")})
        self._config = run.config.model_copy(update={"compute": compute})
        self._profile = StepProfile(run.mesh)
        # Not the mesh's control group: a save may be using that, in a thread of its own.
        timeout = timedelta(minutes=run.config.parallel.timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if run.mesh.layout.world > 1 else None
        self._batches: Sequence[Batch] = ()
        self._first = run.progress.step + WARM_UP + 1
        plan = self._plan()
        self._memory, self._told_memory = plan.memory, False
        logger.info(
            "predicted on %s: a step of %.4g s, %.0f tokens/s a device, %.1f GiB at most; compared every %d steps",
            cluster.name,
            plan.time.seconds,
            plan.tokens_per_second,
            plan.memory.bytes / 2**30,
            run.config.monitor.plan_every_steps,
        )

    def every(self, due: Callable[[int], bool]) -> Every:
        """Return what the loop is to do at steps of which `due` says so, the first ones of a process left out."""
        return Every(lambda step: step >= self._first and due(step), self._end, self._begin)

    def close(self) -> None:
        """End a step that was cut short."""
        self._profile.close()

    def _begin(self, microbatches: list[Batch]) -> None:
        self._batches = microbatches
        if not microbatches:  # the step is passed over, on every rank
            return
        try:
            self._profile.start()
        except RuntimeError as trouble:  # another profiler is active, or the driver has none
            logger.warning("step %d can't be profiled: %s", self._run.progress.step + 1, trouble)

    def _end(self) -> dict[str, float]:
        if not self._batches:
            return {}
        run = self._run
        found = self.compare(self._read())
        if found is None:
            return {}
        alarms = found.alarms()
        if run.device.type == "cuda":  # what a process on a CPU holds isn't tensors alone
            (peak,) = run.mesh.agree([float(peak_memory(run.device))])
            memory = memory_alarm(peak, self._memory, run.config.monitor.plan_bound)
            if memory and not self._told_memory:  # the peak is of the whole run: once will do
                alarms.append(memory)
                self._told_memory = True
        if run.mesh.is_first:
            logger.info("step %d, measured and predicted:\n%s", run.progress.step, found.table())
            for alarm in alarms:
                logger.warning("step %d isn't as predicted: %s", run.progress.step, alarm)
        return {**found.metrics(), "planned/peak_gib": self._memory.bytes / 2**30}

    def _read(self) -> dict[str, float]:
        """Return the step's seconds by part; nothing where they can't be read, which is no reason to end a run."""
        try:
            return self._profile.stop()
        except (OSError, ValueError, LookupError, RuntimeError) as trouble:  # a full disk, a trace that is broken
            logger.warning("step %d was profiled in vain: %s", self._run.progress.step, trouble)
            return {}

    def compare(self, measured: dict[str, float]) -> Comparison | None:
        """Compare what this rank and the others measured of the newest step with its prediction. Collective.

        None where a rank measured nothing.
        """
        run = self._run
        tokens = sum(sum(map(sum, batch.lengths)) for batch in self._batches)
        squares = sum(squared_lengths(batch.lengths) for batch in self._batches)
        told = self._gather((measured, tokens, squares))
        if not all(parts for parts, _, _ in told):
            return None
        lengths = sum(squares for _, _, squares in told) / sum(tokens for _, tokens, _ in told)
        plan = self._plan(round(lengths))
        bound = run.config.monitor.plan_bound
        return compare(plan.time.parts, [parts for parts, _, _ in told], plan.layout, plan.time.rank, bound)

    def _gather(self, own: Told) -> list[Told]:
        """Return what every rank has to tell, in their order. Collective."""
        if self._group is None:
            return [own]
        told: list[Any] = [None] * self._run.mesh.layout.world
        dist.all_gather_object(told, own, group=self._group)
        return told

    def _plan(self, document_tokens: int | None = None) -> Plan:
        """Predict a step; document_tokens: the mean length that attention goes over."""
        layout, across = self._run.mesh.layout, self._config.data.packing == "across"
        return make_plan(self._config, self._cluster, layout.world, None if across else document_tokens, layout)
