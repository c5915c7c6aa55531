"""A step's measured time beside the predicted, part by part, and the parts that are further off than a bound.

What measured it is in `ternlm.monitor.step_profile`. No torch here: plain numbers in, plain numbers and words out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ternlm.config.layout import Layout
from ternlm.planner.memory import Memory
from ternlm.planner.units import human_bytes

KERNELS = ("matmul", "attention", "other", "optimizer", "idle")
"""Parts of one rank alone; in every other it exchanges something with others."""
WAITING = "waiting"
# What a profile can't tell apart: a device without work waits for the host, or for what isn't named. In a pipeline, a
# rank that waits for a message is idle.
_JOINED = {"launch": "idle", "overhead": "idle", "bubble": "pipeline", "send over pipeline": "pipeline"}
_LOOK_AT = {
    "matmul": "the device's clocks and temperature, other processes on it, and compute.dtype",
    "attention": "which kernel runs (a warning at the start names a slow one), and how long the documents are",
    "other": "compute.compile, and memory bandwidth that other processes take",
    "optimizer": "memory bandwidth that other processes take",
    "idle": "the host: compute.compile, a larger batch.microbatch_sequences, its other processes",
    "pipeline": "whether the stages are equally long, their hosts, and the links between them",
    WAITING: "the rank that the others wait for: its clocks, its host, its links",
}


@dataclass(frozen=True)
class Part:
    """One part of a step, in seconds."""

    name: str
    planned: float
    measured: float
    rank: int | None
    """Where it took longest; of `waiting`: the rank that waited least, hence the one that others wait for; of an
    exchange: None."""

    @property
    def off(self) -> float:
        """How much longer it took than predicted."""
        return self.measured - self.planned


@dataclass(frozen=True)
class Comparison:
    """One step's parts."""

    parts: tuple[Part, ...]
    """The greatest first."""
    measured: float
    """Seconds of the whole step, of the slowest of the ranks that are compared."""
    bound: float
    """Share of the predicted step by which a part may be off."""

    @property
    def planned(self) -> float:
        """Seconds of the whole step."""
        return sum(part.planned for part in self.parts)

    @property
    def deviating(self) -> list[Part]:
        """Parts that are off by more than the bound, the worst first."""
        found = [part for part in self.parts if abs(part.off) > self.bound * self.planned]
        return sorted(found, key=lambda part: -abs(part.off))

    def metrics(self) -> dict[str, float]:
        """Return the metrics `step/*` and `planned/*`, in seconds."""
        found = {"step/profiled_s": self.measured, "planned/step_s": self.planned}
        for part in self.parts:
            name = part.name.replace(" ", "_")
            found[f"step/{name}_s"], found[f"planned/{name}_s"] = part.measured, part.planned
        return found

    def alarms(self) -> list[str]:
        """Return a sentence for each deviating part, the worst first."""
        return [self._alarm(part) for part in self.deviating]

    def table(self) -> str:
        """Return all parts as lines of text, in milliseconds."""
        rows = [("part", "measured", "predicted", "off, of the step")]
        for part in self.parts:
            share = f"{part.off / self.planned:+.1%}"
            rows.append((part.name, f"{part.measured * 1e3:.1f}", f"{part.planned * 1e3:.1f}", share))
        off = f"{self.measured / self.planned - 1:+.1%}"
        rows.append(("step (ms)", f"{self.measured * 1e3:.1f}", f"{self.planned * 1e3:.1f}", off))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in range(1, 4)) for row in rows
        )

    def _alarm(self, part: Part) -> str:
        share = abs(part.off) / self.planned
        longer = "longer" if part.off > 0 else "shorter"
        said = (
            f"{part.name} took {part.measured * 1e3:.4g} ms, {share:.0%} of a step {longer} than the "
            f"{part.planned * 1e3:.4g} ms predicted"
        )
        said += f" (rank {part.rank})" if part.rank is not None else ""
        if part.off < 0:
            return f"{said}; the cluster file underrates this machine: measure it with `tern calibrate`"
        links = "the links of that axis (`tern calibrate` measures them) and whether another job shares them"
        return f"{said}; look at {_LOOK_AT.get(part.name, links)}"


def memory_alarm(measured: float, memory: Memory, bound: float) -> str | None:
    """Return a sentence where tensors have taken more bytes than predicted, by more than `bound` of that; else None.

    measured: the most that they have taken on a rank. What is held in reserve is left out of the prediction.
    """
    planned = memory.bytes - memory.parts.get("reserve", 0.0)
    if measured <= planned * (1 + bound):
        return None
    kinds = sorted(memory.parts.items(), key=lambda item: -item[1])
    most = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in kinds[:3] if kind != "reserve")
    return (
        f"tensors have taken up to {human_bytes(measured)}, {measured / planned - 1:.0%} more than the "
        f"{human_bytes(planned)} predicted (most of it {most}); leave more free than the planner says"
    )


def comparable(parts: Mapping[str, float], pipeline: bool = False) -> dict[str, float]:
    """Return seconds by the parts that a profile can tell apart, of predicted and of measured ones.

    pipeline: whether there is one; then a rank without work may wait for a message or for its host, nobody knows.
    """
    found: dict[str, float] = {}
    for name, seconds in parts.items():
        name = _JOINED.get(name, name)
        name = "pipeline" if pipeline and name == "idle" else name
        found[name] = found.get(name, 0.0) + seconds
    return found


def compare(
    planned: Mapping[str, float],
    profiles: Sequence[Mapping[str, float]],
    layout: Layout,
    pipeline_rank: int,
    bound: float,
) -> Comparison:
    """Compare a predicted step with what all ranks measured of one.

    planned: seconds by part, of a rank of `pipeline_rank`, as `StepTime` has them. profiles: seconds by part of every
    rank, in order. What a rank computes counts where it took longest. In an exchange a rank also waits for those that
    come late to it; the shortest time of it counts as the exchange's own, the rest as `waiting`, in the mean.
    """
    pipeline = layout.pipeline > 1
    own = {rank: comparable(profiles[rank], pipeline) for rank in _members(layout, pipeline_rank)}
    expected = comparable(planned, pipeline)
    names = set(expected).union(*own.values())
    parts, waited = [], dict.fromkeys(own, 0.0)
    for name in names:
        times = {rank: parts.get(name, 0.0) for rank, parts in own.items()}
        longest = max(times, key=lambda rank: times[rank])
        rank, seconds = longest if name in KERNELS else None, times[longest]
        if rank is None:
            seconds = min(times.values())
            for other, time in times.items():
                waited[other] += time - seconds
        parts.append(Part(name, expected.get(name, 0.0), seconds, rank))
    if any(waited.values()):
        least = min(waited, key=lambda rank: waited[rank])
        parts.append(Part(WAITING, 0.0, sum(waited.values()) / len(waited), least))
    parts.sort(key=lambda part: (-max(part.planned, part.measured), part.name))
    return Comparison(tuple(parts), max(sum(times.values()) for times in own.values()), bound)


def _members(layout: Layout, pipeline_rank: int) -> Iterable[int]:
    return (rank for rank in range(layout.world) if layout.place(rank).pipeline == pipeline_rank)
