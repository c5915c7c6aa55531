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


_ELSEWHERE = {"activations": "all else: copies for a save, activations, buffers, libraries loaded since"}
_SHORT = {"reserve": "what isn't tensors"}
_GAPS = (
    "other processes take it, or it lies between tensors (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True leaves less "
    "there)"
)


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


def report_shortage(config: Config, layout: Layout, held: Held, cluster: Cluster | None, where: str) -> str:
    """Return the report of memory that ran out in a training step, or before the first.

    where: rank and moment, in words. cluster: None where nothing is known of the device.
    """
    memory = peak_memory(config, layout, cluster)
    planned = joined(memory)
    beside = _beside(held, memory)
    planned["reserve"] = planned.get("reserve", 0.0) + beside
    lines = [_headline(held, where)]
    overrun = 0.0
    if held.parts:
        measured = dict(held.parts)
        measured["activations"] = measured.get("activations", 0.0) + held.asked
        lines.append(f"  {'held':>9}  {'predicted':>9}  (what it asked for is counted with the activations)")
        lines += [
            f"  {human_bytes(measured.get(kind, 0.0)):>9}  {human_bytes(planned.get(kind, 0.0)):>9}  {meaning}"
            for kind, meaning in _MEANING.items()
        ]
        lines.append(_verdict(measured, planned, held.there))
        overrun = max(sum(measured.values()) - sum(planned.values()), 0.0)
    else:
        lines.append(
            f"it was predicted to need {human_bytes(memory.bytes)} at most; {human_bytes(held.before)} weren't free "
            "when it began"
        )
    # What was predicted to fit and didn't must become smaller than it was predicted to be.
    room = min(held.there - beside - overrun, memory.bytes * (1 - ERROR))
    return "\n".join([*lines, *advise(config, layout, room, cluster)])


def report_elsewhere(held: Held, where: str) -> str:
    """Return the report of memory that ran out outside a training step, of which there is no prediction."""
    rows = [
        f"  {human_bytes(held.parts.get(kind, 0.0)):>9}  {_ELSEWHERE.get(kind, said)}"
        for kind, said in _MEANING.items()
    ]
    return "\n".join([_headline(held, where), f"  {'held':>9}", *rows, "the planner predicts training steps alone"])


def warn_of_shortage(config: Config, layout: Layout, held: Held, cluster: Cluster | None) -> str | None:
    """Return what to say before the first step of a run that is predicted to need more than there is; else None.

    held: before anything of the run is there.
    """
    memory = peak_memory(config, layout, cluster)
    left = max(held.there - _beside(held, memory), 0.0)
    if memory.bytes <= left:
        return None
    kinds = sorted(joined(memory).items(), key=lambda item: -item[1])
    most = ", ".join(f"{human_bytes(size)} {_MEANING[kind]}" for kind, size in kinds[:2])
    said = f"this run is predicted to need {human_bytes(memory.bytes)} a rank, of {human_bytes(left)} that are left"
    return "\n".join([f"{said}: most of it {most}", *advise(config, layout, left, cluster)])


def _headline(held: Held, where: str) -> str:
    asked = f" and asked for {human_bytes(held.asked)} more" if held.asked else ""
    return f"memory ran out on {where}; it has {human_bytes(held.there)}{asked}"


def _beside(held: Held, memory: Memory) -> float:
    """Return the bytes that weren't free when the run began, beyond what the prediction holds in reserve."""
    return max(held.before - memory.parts.get("reserve", 0.0), 0.0)


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
        names = ", ".join(_SHORT.get(kind, kind) for kind in over)
        said = f"above {'its' if len(over) == 1 else 'their'} prediction: {names}"
        return f"{said}; {_GAPS}" if over == ["reserve"] else said
    whole = sum(planned.values())
    if whole > there:
        return f"no kind exceeded its prediction: the run needs {human_bytes(whole)}, more than there is"
    return "no kind exceeded its prediction by much: there was no more room than that"
