"""Runs that the planner's tests speak of: settings as tables, and how much one rank computes of them."""

from small_runs import settings

from ternlm.config import Config
from ternlm.config.layout import Layout, resolve_layout
from ternlm.planner.step_time import StepTime, describe_step, step_time
from ternlm.planner.work import step_work


def counted_flops(config: Config, layout: Layout, stage: int = 0) -> float:
    """Return the operations that one rank of a pipeline stage does in a step, as work.py lists them."""
    work = step_work(config, layout)
    own = work.stages[stage]
    parts = [*work.forward_of(own), *work.backward_of(own)]
    return work.microbatches * sum(count * kernels.flops for count, kernels in parts)


def internlm(devices, sharding=None, rows=2, accumulation=4, **sections):
    """Return the settings of InternLM-7B on so many devices, in the ancestor's batches."""
    changes = {
        "data": {"seq_len": 2048},
        "batch": {"microbatch_sequences": rows},
        "compute": {"compile": "on"},
        "sharding": sharding or {},
        **sections,
    }
    return settings(changes, rows * accumulation * devices, {"preset": "internlm-7b"})


def predict(config, devices, cluster) -> StepTime:
    """Return the time of a step on a cluster."""
    step = describe_step(config, resolve_layout(config, devices), cluster.devices_per_node)
    return step_time(step, cluster)
