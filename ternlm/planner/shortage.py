"""What to say when memory runs out: which kind exceeded its prediction, and the cheapest changes that fit.

What was held is measured by `ternlm.train.shortage`. No torch here: plain numbers in, words out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ternlm.config.layout import Layout
from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.advice import cheapest_changes
from ternlm.planner.choice import choice_of
from ternlm.planner.cluster import Cluster
from ternlm.planner.known import find_cluster
from ternlm.planner.memory import GIB, Memory, peak_memory
from ternlm.planner.plan import make_plan
from ternlm.planner.units import human_bytes

ERROR = 0.05
"""Share of the whole peak that a kind may be above its prediction without being named."""
NOMINAL = "a100x8"
"""Whose rates rank the changes where nothing is known of the device; its memory is not taken."""
# What can't be told apart when memory has run out.
_JOINED = {"gathered": "activations", "logits": "activations", "communication": "activations"}
_MEANING = {
    "weights": "weights, as they are cut between their uses",
    "gradients": "gradients that are kept",
    "optimizer": "optimizer states",
    "activations": "activations, logits, gathered weights and buffers",
    "reserve": "what isn't tensors: libraries, the driver, gaps, other processes",
}


@dataclass(frozen=True)
class Held:
    """What one rank held when it asked for more than there was, in bytes."""

    parts: Mapping[str, float]
    """By kind: weights, gradients, optimizer, activations, reserve; none where the run wasn't set up yet."""
    asked: float
    """What it asked for in vain; 0: not known."""
    there: float
    """What there is for this rank."""
    before: float = 0.0
    """What wasn't free when the run began: its own libraries, the driver, other processes."""


def report_shortage(config: Config, layout: Layout, held: Held, cluster: Cluster | None, rank: int) -> str:
    """Return the report of memory that ran out. cluster: None where nothing is known of the device."""
    memory = peak_memory(config, layout, cluster)
    planned = joined(memory)
    beside = max(held.before - planned.get("reserve", 0.0), 0.0)
    planned["reserve"] = planned.get("reserve", 0.0) + beside
    lines = [f"memory ran out on rank {rank}, which has {human_bytes(held.there)}"]
    if held.asked:
        lines[0] += f" and asked for {human_bytes(held.asked)} more"
    if held.parts:
        measured = dict(held.parts)
        measured["activations"] = measured.get("activations", 0.0) + held.asked
        rows = [f"  {human_bytes(measured.get(kind, 0.0)):>9}  {human_bytes(planned.get(kind, 0.0)):>9}  {meaning}"
                for kind, meaning in _MEANING.items()]  # fmt: skip
        lines += [f"  {'held':>9}  {'predicted':>9}  (what it asked for is counted with the activations)", *rows]
        lines.append(_verdict(measured, planned, held.there))
        overrun = max(sum(measured.values()) - sum(planned.values()), 0.0)
    else:
        lines.append(f"the run wasn't set up yet; it was predicted to need {human_bytes(memory.bytes)} at most")
        overrun = 0.0
    lines += advise(config, layout, held.there - beside - overrun, cluster)
    return "\n".join(lines)


def warn_of_shortage(config: Config, layout: Layout, there: float, cluster: Cluster | None) -> str | None:
    """Return what to say before the first step of a run that is predicted to need more than there is; else None."""
    memory = peak_memory(config, layout, cluster)
    if memory.bytes <= there:
        return None
    kinds = sorted(joined(memory).items(), key=lambda item: -item[1])
    most = ", ".join(f"{human_bytes(size)} {_MEANING[kind]}" for kind, size in kinds[:2])
    said = f"this run is predicted to need {human_bytes(memory.bytes)} a rank, of {human_bytes(there)} that are left"
    return "\n".join([f"{said}: most of it {most}", *advise(config, layout, there, cluster)])


def joined(memory: Memory) -> dict[str, float]:
    """Return a prediction's bytes by the kinds of `Held`."""
    parts: dict[str, float] = {}
    for kind, size in memory.parts.items():
        name = _JOINED.get(kind, kind)
        parts[name] = parts.get(name, 0.0) + size
    return parts


def exceeding(measured: Mapping[str, float], planned: Mapping[str, float]) -> list[str]:
    """Return the kinds that are above their prediction by more than `ERROR` of the whole, the worst first."""
    whole = sum(planned.values())
    over = {kind: size - planned.get(kind, 0.0) for kind, size in measured.items()}
    return sorted((kind for kind, size in over.items() if size > ERROR * whole), key=lambda kind: -over[kind])


def advise(config: Config, layout: Layout, room: float, cluster: Cluster | None) -> list[str]:
    """Return lines with the three cheapest changes that fit into `room` bytes, the fastest first."""
    about = "" if cluster else f" (ranked at the rates of {NOMINAL}: measure this machine with `tern calibrate`)"
    known = cluster or find_cluster(NOMINAL)
    reserve = (cluster.reserve_gib, cluster.fragmentation) if cluster else (0.0, 0.0)
    dtype = config.compute.dtype
    update = {"memory_gib": max(room, 0.0) / GIB, "reserve_gib": reserve[0], "fragmentation": reserve[1]}
    limited = known.model_copy(update=update | ({} if dtype == "auto" else {"dtype": dtype}))
    try:
        now = make_plan(config, limited, layout.world, layout=layout)
        changes = cheapest_changes(config, limited, layout.world)
        before = replace(choice_of(config), params=layout.params, grads=layout.grads, optimizer=layout.optimizer)
    except ConfigError as trouble:  # a cluster without a network, say
        return [f"no change could be planned: {trouble}"]
    if not changes:
        return ["no single change makes it fit: `tern plan RECIPE --search` tries them together, on more devices too"]
    found = [f"the cheapest changes that fit, the fastest first{about}:"]
    for choice, plan in changes:
        speed = plan.tokens_per_second / now.tokens_per_second - 1
        typed = " ".join(choice.overrides(before))
        found.append(f"  {typed}  ({human_bytes(plan.memory.bytes)} predicted, {speed:+.0%} tokens/s)")
    return found


def _verdict(measured: Mapping[str, float], planned: Mapping[str, float], there: float) -> str:
    over = exceeding(measured, planned)
    if over:
        return f"above their prediction: {', '.join(over)}" if len(over) > 1 else f"above its prediction: {over[0]}"
    whole = sum(planned.values())
    if whole > there:
        return f"no kind exceeded its prediction: the run needs {human_bytes(whole)}, more than there is"
    return "no kind exceeded its prediction: the rest of the memory is taken by others, or lies between tensors"
