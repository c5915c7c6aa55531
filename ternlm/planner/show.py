"""What `tern plan` prints of one plan, and the same as plain numbers. No torch here."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from ternlm.config.layout import Layout
from ternlm.config.run import Config
from ternlm.planner.explain import explain_memory, explain_time
from ternlm.planner.length import Length
from ternlm.planner.memory import GIB
from ternlm.planner.plan import DAY, MEMORY_ERROR, Plan
from ternlm.planner.units import human_count, human_seconds

NEAR_LIMIT = f"within the planner's error of {MEMORY_ERROR:.0%} of the limit: try it for some steps first."
SHOWN = 5e-4
"""Share of a step from which a part has a line of its own."""


def plan_tables(plan: Plan, length: Length) -> Group:
    """Return what is printed. length: of the run."""
    return Group(*_heading(plan), _time(plan), _memory(plan), *_verdict(plan), length_words(length))


def plan_figures(plan: Plan, length: Length) -> dict[str, Any]:
    """Return every figure in seconds, bytes, operations and pieces, as JSON can hold it."""
    adapter, model = plan.config.adapter, plan.config.model
    return {
        "cluster": plan.cluster.name,
        "devices_per_node": plan.cluster.devices_per_node,
        "devices": plan.layout.world,
        "nodes": plan.nodes,
        "layout": {**asdict(plan.layout), "data": plan.layout.data},
        "step_tokens": plan.step_tokens,
        "step_seconds": plan.time.seconds,
        "seconds": plan.time.parts,
        "tokens_per_second_per_device": plan.tokens_per_second,
        "flops": asdict(plan.flops),
        "tflops": asdict(plan.tflops),
        "mfu": asdict(plan.mfu),
        "trained_parameters": adapter.num_params(model) if adapter else model.num_params,
        "memory_bytes": plan.memory.parts,
        "device_memory_bytes": plan.cluster.memory_gib * GIB,
        "fits": plan.fits,
        "fits_barely": plan.fits_barely,
        "bounds": plan.bounds,
        "run": asdict(length),
    }


def length_words(length: Length) -> str:
    """Say how long a run takes, and what it costs where the cluster has a price."""
    text = f"{human_count(length.tokens)} tokens take {length.seconds / DAY:,.2f} days, {length.device_hours:,.0f}"
    priced = "" if length.dollars is None else f", {length.dollars:,.0f} dollars"
    growing = f", with {length.growing_steps:,.0f} steps of smaller batches" * bool(length.growing_steps)
    return f"{text} device-hours{priced}{growing}, without checkpoints and failures"


def layout_words(layout: Layout) -> str:
    """Write the degrees, in one line."""
    degrees = {"pipeline": layout.pipeline, "data": layout.data, "context": layout.context, "tensor": layout.tensor}
    cuts = f"weights/gradients/optimizer over {layout.params}/{layout.grads}/{layout.optimizer}"
    return " x ".join(f"{name} {degree}" for name, degree in degrees.items()) + f", {cuts}"


def _heading(plan: Plan) -> list[str]:
    config, layout, work = plan.config, plan.layout, plan.step.work
    return [
        f"{layout.world:,} x {plan.cluster.device} ({plan.cluster.name}), {plan.cluster.devices_per_node} on a node: "
        + layout_words(layout),
        f"A step: {human_count(plan.step_tokens)} tokens, {work.microbatches} microbatches of "
        f"{config.batch.microbatch_sequences} x {config.data.seq_len:,} a device; the model has "
        f"{human_count(config.model.num_params)} parameters",
        *_adapters(config),
    ]


def _adapters(config: Config) -> list[str]:
    """Say what of the model is trained, where that isn't all."""
    adapter = config.adapter
    if adapter is None:
        return []
    trained, frozen = adapter.num_params(config.model), config.model.num_params
    kept = {"auto": "in the products' format", "nf4": "in 4 bits where they have adapters"}
    return [
        f"Adapters ({adapter.kind}, rank {adapter.rank}) are trained, {human_count(trained)} parameters, "
        f"{trained / frozen:.2%} of the model's number; its own stay as they are, "
        + kept.get(adapter.base, f"in {adapter.base}")
    ]


def _time(plan: Plan) -> Table:
    table = Table("time of a step", show_footer=True, box=box.SIMPLE)
    table.columns[0].footer = "all"
    table.add_column("ms", f"{plan.time.seconds * 1e3:,.1f}", justify="right")
    table.add_column("share", justify="right")
    table.add_column("how it was got", overflow="fold")
    whole, shown = plan.time.seconds, 0.0
    for one in sorted(explain_time(plan), key=lambda one: -one.amount):
        if one.amount >= SHOWN * whole:
            table.add_row(one.name, f"{one.amount * 1e3:,.1f}", f"{one.amount / whole:.1%}", one.how)
            shown += one.amount
    if whole - shown > 1e-9 * whole:
        table.add_row("rest", f"{(whole - shown) * 1e3:,.1f}", f"{1 - shown / whole:.1%}", "parts shorter than this")
    return table


def _memory(plan: Plan) -> Table:
    table = Table("peak memory", show_footer=True, box=box.SIMPLE)
    table.columns[0].footer = "all"
    table.add_column("GiB", f"{plan.memory.bytes / GIB:,.2f}", justify="right")
    table.add_column("how it was got", f"of {plan.cluster.memory_gib:g} GiB", overflow="fold")
    for one in explain_memory(plan):
        table.add_row(one.name, f"{one.amount / GIB:,.2f}", one.how)
    return table


def _verdict(plan: Plan) -> list[str]:
    tflops, mfu = plan.tflops, plan.mfu
    limit, seconds = next(iter(plan.bounds.items()))
    free = plan.cluster.memory_gib - plan.memory.bytes / GIB
    fit = f"Fits, with {free:.1f} GiB to spare." if plan.fits else f"Does NOT fit: {-free:.1f} GiB too much."
    if plan.fits_barely:
        fit = f"Fits, with {free:.1f} GiB to spare, but {NEAR_LIMIT}"
    return [
        f"{human_seconds(plan.time.seconds)} a step, {plan.tokens_per_second:,.0f} tokens/s a device, "
        f"{plan.tokens_per_second * plan.layout.world:,.0f} in all",
        f"TFLOPS a device {tflops.full:.1f}, MFU {mfu.full:.1%} (full attention); {tflops.causal:.1f}, "
        f"{mfu.causal:.1%} (causal half); {tflops.hardware:.1f}, {mfu.hardware:.1%} (recompute counted, HFU); "
        f"peak {plan.cluster.peak_tflops:g}",
        f"{fit} Bound by {limit}: {seconds / plan.time.seconds:.0%} of the step.",
    ]
