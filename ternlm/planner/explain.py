"""How each part of a plan was got: what there is to do, and the rate at which it goes. No torch here."""

from typing import NamedTuple

from ternlm.planner.kernels import Kernels
from ternlm.planner.plan import Plan
from ternlm.planner.step_time import part_name
from ternlm.planner.step_traffic import chunk_tokens
from ternlm.planner.times import Network
from ternlm.planner.traffic import axis_ranks
from ternlm.planner.units import human_bytes, human_count, human_flops, human_seconds
from ternlm.planner.work import kept_bytes


class Explained(NamedTuple):
    """One part of a prediction."""

    name: str
    amount: float
    """Seconds or bytes."""
    how: str


def explain_time(plan: Plan) -> list[Explained]:
    """Return the parts of a step, in the order of `StepTime.parts`, with how each was got."""
    return [Explained(name, seconds, _how_long(plan, name)) for name, seconds in plan.time.parts.items()]


def explain_memory(plan: Plan) -> list[Explained]:
    """Return the kinds of memory, the greatest first, with how each was got."""
    parts = sorted(plan.memory.parts.items(), key=lambda item: -item[1])
    return [Explained(kind, size, _how_much(plan, kind)) for kind, size in parts if size]


def whole_step(plan: Plan) -> Kernels:
    """Return all kernels of a step of the pipeline rank that the time is of, each product once for its kind."""
    work, stage = plan.step.work, plan.step.work.stages[plan.time.rank]
    m = work.microbatches
    counted = [(m * n, kernels) for n, kernels in (*work.forward_of(stage), *work.backward_of(stage))]
    return Kernels(
        tuple(one for count, kernels in counted for one in kernels.matmuls * count),
        sum(count * kernels.attention_flops for count, kernels in counted),
        sum(count * kernels.attention_backward_flops for count, kernels in counted),
        sum(count * kernels.stream_bytes for count, kernels in counted),
        sum(count * kernels.loss_bytes for count, kernels in counted),
        sum(count * kernels.launches for count, kernels in counted),
    )


def _how_long(plan: Plan, name: str) -> str:
    if " over " in name:
        return _how_exchanged(plan, name)
    rates, work, kernels = plan.cluster.rates, plan.step.work, whole_step(plan)
    seconds = plan.time.parts[name]
    if name == "matmul":
        flops = sum(one.flops for one in kernels.matmuls)
        return (
            f"{human_flops(flops)} in {len(kernels.matmuls):,} products; large ones have {rates.matmul_tflops:.3g} "
            f"TFLOPS, these {flops / seconds / 1e12:.3g}"
        )
    if name == "attention":
        flops = kernels.attention_flops + kernels.attention_backward_flops
        return (
            f"{human_flops(flops)}, masked half left out, over documents of {plan.document_tokens:,} tokens; long ones "
            f"have {rates.attention_tflops:.3g} TFLOPS forward, {rates.attention_backward_tflops:.3g} backward"
        )
    if name == "other":
        adding = work.microbatches * work.accumulate_bytes[plan.time.rank]
        fresh = work.microbatches * work.fresh_bytes[plan.time.rank] * bool(rates.fresh_gb_s)
        return (
            f"norms, rotation, activation, residuals: {human_bytes(kernels.stream_bytes)} read and written at "
            f"{rates.norms_gb_s or rates.memory_gb_s:,.0f} GB/s; loss: {human_bytes(kernels.loss_bytes)} at "
            f"{rates.loss_gb_s or rates.memory_gb_s:,.0f} GB/s"
            + f"; adding up gradients: {human_bytes(adding)} at {rates.memory_gb_s:,.0f} GB/s" * bool(adding)
            + f"; tensors that the system maps anew: {human_bytes(fresh)} at {rates.fresh_gb_s:.3g} GB/s" * bool(fresh)
        )
    if name == "launch":
        if rates.serial_us:
            return f"{kernels.launches:,} kernels, {rates.serial_us:.3g} us each to start"
        return f"{kernels.launches:,} kernels, at least {rates.launch_us:.3g} us from one to the next"
    if name == "optimizer":
        moved = work.update_bytes[plan.time.rank]
        rate = rates.update_gb_s or rates.memory_gb_s
        return f"{human_bytes(moved)} of weights, gradients and states, at {rate:,.0f} GB/s"
    if name == "bubble":
        return _how_idle(plan)
    if name == "overhead":
        share = f"{plan.cluster.overhead:.1%} of all that is above"
        return share + f", and {rates.step_ms:.3g} ms a step" * bool(rates.step_ms)
    return "by no single rate"


def _how_exchanged(plan: Plan, name: str) -> str:
    layout = plan.layout
    place = layout.place(plan.time.rank * layout.data_ranks * layout.tensor)
    network = Network(plan.cluster, axis_ranks(layout, place))
    found = [t for t in plan.step.traffic[plan.time.rank] if part_name(t) == name]
    busy = sum(network.seconds(t) for t in found)
    rates = " and ".join(dict.fromkeys(f"{network.rate_gb_s(t):.3g} GB/s" for t in found))
    where = " and ".join(dict.fromkeys("between nodes" if t.between_nodes else "inside a node" for t in found))
    ranks = " and ".join(dict.fromkeys(f"{t.ranks:,}" for t in found))
    sent, count = sum(t.sent_bytes for t in found), sum(t.count for t in found)
    return (
        f"{human_bytes(sent)} sent in {count:,} calls among {ranks} ranks {where}, at {rates}: links "
        f"busy for {human_seconds(busy)}, of which this isn't hidden"
    )


def _how_idle(plan: Plan) -> str:
    p, parallel = plan.layout.pipeline, plan.config.parallel
    text = f"{p - 1} stages wait to be filled and emptied, with {plan.step.work.microbatches} microbatches"
    if parallel.stages_per_rank > 1:
        text += f", in slices of 1/{parallel.stages_per_rank}"
    if parallel.pipeline_schedule == "zero_bubble":
        text += "; weight gradients fill two thirds"
    return text


def _how_much(plan: Plan, kind: str) -> str:
    config, layout, program = plan.config, plan.layout, plan.step.program
    element = plan.step.work.element_bytes
    if kind in ("weights", "optimizer", "gradients"):
        of, over = {
            "weights": (f"{program.weight_bytes:.3g} bytes", layout.shard),
            "optimizer": (f"{program.state_bytes:.3g} bytes", layout.optimizer),
            "gradients": ("4 bytes while microbatches add up", layout.grads),
        }[kind]
        own = plan.memory.parameters if kind == "weights" else plan.memory.trained
        if kind == "weights" and config.adapter:
            return _how_frozen(plan)
        text = f"{of} for each of {human_count(own)} parameters" + f", over {over} ranks" * (over > 1)
        return text + ("; and those of the module in work" if kind == "gradients" else "")
    again, keep = config.compute.recompute, config.compute.recompute_keep
    return {
        "gathered": f"weights in {element} bytes, as the products take them"
        + (", of the module in work" if layout.reshard else ""),
        "activations": f"what {plan.memory.under_way:.3g} x {config.batch.microbatch_sequences} sequences of "
        f"{config.data.seq_len // layout.context:,} tokens keep for backward"
        + (f", {again:.0%} of the blocks recomputed, keeping {keep}" if again else ", nothing recomputed"),
        "logits": f"of {min(chunk_tokens(config), plan.step.work.microbatch_tokens):,} tokens at a time, "
        f"{config.model.vocab_size // layout.tensor:,} each",
        "communication": "buffers of what is exchanged, and neighbours' messages" * (layout.pipeline > 1)
        or "buffers of what is gathered and reduced",
        "reserve": f"{plan.cluster.reserve_gib:.3g} GiB of driver and communication library, and "
        f"{plan.cluster.fragmentation:.0%} between tensors",
    }[kind]


def _how_frozen(plan: Plan) -> str:
    config, layout, memory = plan.config, plan.layout, plan.memory
    adapter, over = config.adapter, f", over {layout.shard} ranks" * (layout.shard > 1)
    assert adapter is not None
    text = (
        f"{kept_bytes(config)} bytes for each of {human_count(memory.parameters - memory.trained)} frozen parameters "
    )
    text += f"and 4 for each of {human_count(memory.trained)} of the adapters" + over
    if not memory.packed:
        return text
    bits = 4 + 32 / adapter.block_size
    return f"{bits:.3g} bits for each of {human_count(memory.packed)} frozen weights, whole on each rank; {text}"
