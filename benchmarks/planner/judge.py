"""What the planner says of published runs, beside what was published, and what its errors have in common.

Predictions come from the constants that TernLM ships and, left out, from fits that haven't seen the row's source or
model. Nothing here is text; see pages.py.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from fit import PRIORS, constants, left_out, predict
from rows import Row

from ternlm.planner.fitted import Constants
from ternlm.planner.known import make_cluster
from ternlm.planner.memory import GIB, peak_memory
from ternlm.planner.step_time import step_time


@dataclass(frozen=True)
class Judged:
    """A published run and what the planner says of it. Errors are predicted / published - 1."""

    row: Row
    tokens_per_second: float
    """Predicted, of one device."""
    shares: dict[str, float]
    """Of the predicted step's time, by part, largest first."""
    memory_gib: float
    """Predicted peak of the fullest device, and its parts."""
    memory_parts_gib: dict[str, float]
    left_out: dict[str, float] = field(default_factory=dict)
    """Predicted tokens/s from fits without the row's `source` or `model`."""

    @property
    def error(self) -> float | None:
        """Of tokens/s, with the shipped constants; None where none were published."""
        measured = self.row.tokens_per_second
        return self.tokens_per_second / measured - 1 if measured else None

    @property
    def memory_error(self) -> float | None:
        """Of peak memory; None where none was published."""
        measured = self.row.memory_gib
        return self.memory_gib / measured - 1 if measured else None

    def left_out_error(self, by: str) -> float | None:
        """Of tokens/s, from a fit without the row's `source` or `model`; None where there was none."""
        measured = self.row.tokens_per_second
        return self.left_out[by] / measured - 1 if measured and by in self.left_out else None


class Spread(NamedTuple):
    """Of absolute errors, with the median of the signed ones as bias."""

    count: int
    median: float
    ninth_decile: float
    worst: float
    bias: float


class Blame(NamedTuple):
    """The one constant whose least change, in widths of its prior, would halve a group's errors."""

    name: str
    factor: float
    """What it would be multiplied with."""
    widths: float
    """How far that is, in widths of its prior."""
    before: float
    """Median absolute error, and what the change would leave of it."""
    after: float


def judge(rows: Sequence[Row], c: Constants, cross_validate: bool) -> list[Judged]:
    """Return each row judged, in their order; cross_validate: with fits that leave out sources and models (minutes)."""
    timed = [row for row in rows if row.tokens_per_second]
    found: dict[str, dict[str, float]] = {}
    if cross_validate:
        by: dict[str, Callable[[Row], str]] = {"source": lambda row: row.source, "model": lambda row: row.model}
        for name, group in by.items():
            for row_id, predicted in left_out(timed, group).items():
                found.setdefault(row_id, {})[name] = predicted
    return [_judge(row, c, found.get(row.id, {})) for row in rows]


def _judge(row: Row, c: Constants, outside: dict[str, float]) -> Judged:
    cluster = make_cluster(row.sheet, row.devices_per_node, row.network_gbit_s, c, row.attention)
    time = step_time(row.step, cluster)
    memory = peak_memory(row.config, row.layout, cluster, row.program)
    shares = {part: seconds / time.seconds for part, seconds in time.parts.items()}
    return Judged(
        row,
        row.tokens / time.seconds / row.layout.world,
        dict(sorted(shares.items(), key=lambda item: -item[1])),
        memory.bytes / GIB,
        {part: size / GIB for part, size in memory.parts.items() if size},
        outside,
    )


def spread(errors: Iterable[float | None]) -> Spread | None:
    """Return how far errors go; None where there are none."""
    known = np.array([error for error in errors if error is not None])
    if not known.size:
        return None
    sizes = np.abs(known)
    return Spread(
        len(known),
        float(np.median(sizes)),
        float(np.quantile(sizes, 0.9)),
        float(sizes.max()),
        float(np.median(known)),
    )


def blame(group: Sequence[Judged], shipped: dict[str, float]) -> Blame | None:
    """Return the constant that would have to change least to halve a group's errors, if any can.

    Each constant's logarithm is moved by the least-squares step that its prior's width allows; what then is left is
    computed anew, not from slopes.
    """
    timed = [judged for judged in group if judged.error is not None]
    before = np.array([math.log1p(judged.error) for judged in timed])  # type: ignore[arg-type]
    best: Blame | None = None
    for name, (_, width) in PRIORS.items():
        moved = constants(shipped | {name: shipped[name] * math.exp(0.01)})
        slopes = np.array([math.log(predict(j.row, moved) / j.tokens_per_second) / 0.01 for j in timed])
        if not (slopes @ slopes):
            continue
        step = float(-(slopes @ before) / (slopes @ slopes + (0.05 / width) ** 2))
        value = shipped[name] * math.exp(step)
        try:
            changed = constants(shipped | {name: value})
        except ValueError:  # not physical: a share above 1
            continue
        after = np.median([abs(predict(j.row, changed) / j.row.tokens_per_second - 1) for j in timed])
        median = float(np.median(np.abs(np.expm1(before))))
        if after < median / 2 and (best is None or abs(step / width) < abs(best.widths)):
            best = Blame(name, math.exp(step), step / width, median, float(after))
    return best


def siblings(one: Judged, all_judged: Sequence[Judged]) -> list[Judged]:
    """Return the other rows of the same source, model, device and recompute."""

    def key(judged: Judged) -> tuple[str, str, str, float]:
        row = judged.row
        return row.source, row.model, row.sheet.name, row.config.compute.recompute

    return [other for other in all_judged if other is not one and other.error is not None and key(other) == key(one)]


def needed_factor(judged: Judged, part: str) -> float | None:
    """Return what a part's time would have to be multiplied with for the prediction to be right; None: it can't."""
    if judged.error is None:
        return None
    # The published step takes (1 + error) times as long as the predicted one.
    factor = 1 + judged.error / judged.shares[part]
    return factor if factor > 0 else None


def flat(c: Constants) -> dict[str, float]:
    """Return the fitted constants under the names that fit.py gives them."""
    table = c.model_dump()
    return {name: table[name] if "." not in name else table[name.split(".")[0]][name.split(".")[1]] for name in PRIORS}
