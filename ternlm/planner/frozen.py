"""Steps that train adapters beside frozen weights: which products they add, and which gradients nobody asks for.

A frozen matrix passes a gradient on to its input and has none of its own. The first block's input has none either: the
embedding is frozen too, and what lies before the first adapter isn't gone through backward. No torch here.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ternlm.config.adapter import AdapterConfig, Target, matrix_shapes
from ternlm.config.model import ModelConfig

CUT_BY_INPUTS: frozenset[Target] = frozenset({"o_proj", "down_proj"})
"""Matrices that tensor parallelism cuts along their inputs; the others along their outputs."""


class Passed(NamedTuple):
    """What of a block takes part in backward."""

    attention: bool = True
    """Attention, and the input of its last product."""
    middle: bool = True
    """The stream between attention and the MLP."""
    inner: bool = True
    """What the MLP's last product takes."""
    start: bool = True
    """The block's input."""

    def input_of(self, name: Target) -> bool:
        """Whether the input of a matrix gets a gradient, where any part of the block does."""
        if name in ("q_proj", "k_proj", "v_proj"):
            return self.start
        return {"o_proj": self.attention, "down_proj": self.inner}.get(name, self.middle)


ALL_PASSED = Passed()


def passed_at_entry(adapter: AdapterConfig) -> Passed:
    """Return what takes part of the block whose input comes from the embedding."""
    targets = set(adapter.targets)
    attention = bool({"q_proj", "k_proj", "v_proj"} & targets)
    middle = attention or "o_proj" in targets
    return Passed(attention, middle, middle or bool({"gate_proj", "up_proj"} & targets), start=False)


class Added(NamedTuple):
    """A block's matrix with an adapter, as one tensor rank has it."""

    name: Target
    outputs: int
    inputs: int
    rank: int


def adapted_matrices(model: ModelConfig, adapter: AdapterConfig, tensor: int = 1) -> Iterator[Added]:
    """Yield a block's matrices that have adapters, in the model's order."""
    for name, (outputs, inputs) in matrix_shapes(model).items():
        if name not in adapter.targets:
            continue
        if name in CUT_BY_INPUTS:
            yield Added(name, outputs, inputs // tensor, adapter.rank)
        else:
            yield Added(name, outputs // tensor, inputs, adapter.rank)


def adapter_forward_params(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Return how many of a block's adapters' weights a token is multiplied with."""
    return sum(one.rank * (one.outputs + one.inputs) for one in adapted_matrices(model, adapter))


def entry_params_passed_over(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Return how many weights of the first block no gradient goes through, its adapters' among them."""
    passed, shapes = passed_at_entry(adapter), matrix_shapes(model)
    over = [name for name in shapes if not passed.input_of(name)]
    base = sum(shapes[name][0] * shapes[name][1] for name in over)
    return base + sum(adapter.rank * shapes[name][1] for name in over if name in adapter.targets)
