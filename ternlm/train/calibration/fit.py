"""From seconds to rates: the few figures by which the planner's formulas (planner/times.py) give what was timed.

Plain numbers in and out; no torch. Fits are of logarithms, so that a small product counts as much as a large one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import mean, median

from ternlm.planner.kernels import Matmul


@dataclass(frozen=True)
class Curve:
    """Rates of large work, and the sizes at which they are halved."""

    tflops: tuple[float, ...]
    halves: tuple[float, ...]
    error: float
    """Median of the timed ones' relative errors."""


def fit_matmuls(timed: Sequence[tuple[Matmul, float]]) -> Curve:
    """Return rate and half_inner, half_outer and operations in an element's time, of products and their seconds."""

    def slower(one: Matmul, halves: Sequence[float]) -> float:
        return (1 + halves[0] / one.k) * (1 + halves[1] / (one.m * one.n)) + halves[2] * one.elements / one.flops

    rows = [([one.flops * 1e-12 / seconds], partial(slower, one)) for one, seconds in timed]
    return _fit(rows, (512.0, 2.0**22, 2.0**10))


def fit_attention(timed: Sequence[tuple[float, float, float, float]]) -> Curve:
    """Return forward and backward rate, half_attention and attention_block.

    timed: operations forward, length of the documents (tokens), seconds forward and backward.
    """

    def slower(document: float, halves: Sequence[float]) -> float:
        return (1 + halves[0] / document) * min(1 + halves[1] / document, 2.0)

    rows = [
        ([flops * 1e-12 / forward, 2.5 * flops * 1e-12 / backward], partial(slower, document))
        for flops, document, forward, backward in timed
    ]
    return _fit(rows, (4096.0, 4096.0))


_Rows = Sequence[tuple[Sequence[float], Callable[[Sequence[float]], float]]]


def _fit(rows: _Rows, largest: Sequence[float]) -> Curve:
    """Return the halves, each from 0 to its largest, and the rates that give all rows' rates best.

    rows: measured rates, and by how much the halves slow them. The best of a grid of halves, which then narrows.
    """
    step = 4.0
    grids = [[0.0, *(top * step**-power for power in range(7))] for top in largest]
    for _ in range(12):
        halves = min(product(*grids), key=lambda option: _spread(rows, option))
        step **= 0.7
        grids = [
            sorted({0.0, *(min(value * factor, top) for factor in (1 / step, 1.0, step))})
            for value, top in zip(halves, largest, strict=True)
        ]
    logs = _logs(rows, halves)
    rates = [mean(column) for column in zip(*logs, strict=True)]
    errors = [abs(math.expm1(log - rate)) for row in logs for log, rate in zip(row, rates, strict=True)]
    return Curve(tuple(map(math.exp, rates)), tuple(halves), median(errors))


def _logs(rows: _Rows, halves: Sequence[float]) -> list[list[float]]:
    return [[math.log(rate * slower(halves)) for rate in rates] for rates, slower in rows]


def _spread(rows: _Rows, halves: Sequence[float]) -> float:
    """Return how far rates of large work, as each row implies them, lie from each other."""
    columns = list(zip(*_logs(rows, halves), strict=True))
    return sum((value - mean(column)) ** 2 for column in columns for value in column)


def solve_stream(
    large: tuple[float, float, int], small: tuple[float, float, int], longest_us: float = 1e4
) -> tuple[float, float]:
    """Return GB/s and microseconds for each kernel, by two blocks' (seconds, bytes, kernels) beside their products.

    Where the larger one would have no time left for its bytes, the kernels' share of it is left out.
    """
    (t1, b1, n1), (t2, b2, n2) = large, small
    determinant = b1 * n2 - b2 * n1
    per_byte, per_kernel = (t1 * n2 - t2 * n1) / determinant, (b1 * t2 - b2 * t1) / determinant
    if per_byte <= 0 or per_kernel < 0:
        per_byte, per_kernel = max(t1, 1e-9) / b1, 0.0
    return 1e-9 / per_byte, min(per_kernel * 1e6, longest_us)
