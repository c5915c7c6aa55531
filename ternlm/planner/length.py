"""How long a run takes and what it costs, with the smaller batches that it may begin with. No torch here.

Checkpoints, validation and failures aren't counted.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ternlm.config.run import Config
from ternlm.planner.plan import HOUR, Plan
from ternlm.planner.step_time import describe_step, step_time


class Stretch(NamedTuple):
    """Steps of one size, one after another."""

    sequences: int
    steps: float


@dataclass(frozen=True)
class Length:
    """A run, or what is left of one."""

    tokens: float
    steps: float
    growing_steps: float
    """Those whose batch isn't the full one yet."""
    seconds: float
    device_hours: float
    dollars: float | None
    """None where the cluster has no price."""


def stretches(config: Config, first: int = 0, tokens: float | None = None) -> Iterator[Stretch]:
    """Yield the steps from number `first` on, counted from 0: to the run's last, or to so many tokens."""
    batch, step = config.batch, first
    end, left = (config.train.steps, math.inf) if tokens is None else (math.inf, tokens)
    while step < end and left > 0:
        sequences = batch.sequences_at(step)
        each = sequences * config.data.seq_len
        steps = min(end - step, left / each)
        if batch.rampup and sequences < batch.global_sequences:
            size = batch.rampup.every - step % batch.rampup.every
            if size < steps:
                yield Stretch(sequences, size)
                step, left = step + size, left - size * each
                continue
        yield Stretch(sequences, steps)
        return


def tokens_from(config: Config, first: int = 0) -> float:
    """Return the tokens of a run from the step number `first` on, counted from 0."""
    return sum(one.steps * one.sequences for one in stretches(config, first)) * float(config.data.seq_len)


def run_length(plan: Plan, tokens: float, first: int = 0) -> Length:
    """Return how long so many tokens take from the step number `first` on, counted from 0."""
    full, seconds, steps, growing = plan.config.batch.global_sequences, 0.0, 0.0, 0.0
    for one in stretches(plan.config, first, tokens):
        seconds += one.steps * (plan.time.seconds if one.sequences == full else _step_seconds(plan, one.sequences))
        steps += one.steps
        growing += one.steps * (one.sequences < full)
    hours = seconds / HOUR * plan.layout.world
    price = plan.cluster.dollars_per_hour
    return Length(tokens, steps, growing, seconds, hours, hours * price if price else None)


def _step_seconds(plan: Plan, sequences: int) -> float:
    """Return the time of a step of another size."""
    batch = plan.config.batch.model_copy(update={"global_sequences": sequences, "rampup": None})
    config, cluster = plan.config.model_copy(update={"batch": batch}), plan.cluster
    step = describe_step(config, plan.layout, cluster.devices_per_node, plan.step.program, plan.document_tokens)
    return step_time(step, cluster).seconds
