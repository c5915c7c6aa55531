"""Kernels as the planner counts them: matrix products by size, attention, bytes read and written. No torch here.

A multiply and an add are two operations.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Matmul(NamedTuple):
    """A product of an m x k and a k x n matrix, so many times."""

    m: int
    n: int
    k: int
    float8: bool = False

    @property
    def flops(self) -> float:
        """Operations."""
        return 2.0 * self.m * self.n * self.k

    @property
    def elements(self) -> float:
        """Of both operands and the result."""
        return float(self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass(frozen=True)
class Kernels:
    """Kernels that run one after another."""

    matmuls: tuple[Matmul, ...] = ()
    attention_flops: float = 0.0
    """Of causal attention forward, with the masked half left out; likewise backward: 2.5 times as many."""
    attention_backward_flops: float = 0.0
    stream_bytes: float = 0.0
    """What all other kernels read and write, those of the loss aside."""
    loss_bytes: float = 0.0
    """What the loss reads and writes beside its products."""
    launches: int = 0

    @property
    def flops(self) -> float:
        """Operations of all of them."""
        return sum(m.flops for m in self.matmuls) + self.attention_flops + self.attention_backward_flops
