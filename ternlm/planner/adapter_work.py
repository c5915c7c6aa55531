"""What adapters add to a block's kernels, and what frozen matrices leave out of them. No torch here."""

from collections.abc import Iterator
from dataclasses import replace

from ternlm.config.adapter import AdapterConfig, Target, matrix_shapes
from ternlm.config.model import ModelConfig
from ternlm.planner.frozen import CUT_BY_INPUTS, Added, Passed, adapted_matrices
from ternlm.planner.kernels import Kernels, Matmul


class AdapterWork:
    """A block's adapters on one tensor rank."""

    def __init__(self, model: ModelConfig, adapter: AdapterConfig, tensor: int, tokens: int, element: int) -> None:
        self.adapter, self.tokens, self.element = adapter, tokens, element
        self.added = list(adapted_matrices(model, adapter, tensor))
        self.shapes: dict[Target, tuple[int, int]] = {}
        for name, (outputs, inputs) in matrix_shapes(model).items():
            by_inputs = name in CUT_BY_INPUTS
            self.shapes[name] = (outputs, inputs // tensor) if by_inputs else (outputs // tensor, inputs)
        last = "down_proj" in adapter.targets
        self.needs_last_result = last and adapter.kind == "dora"
        """Whether backward needs the result of a block's last product: else a recomputed block leaves that out."""

    def with_forward(self, block: Kernels, fused: bool) -> Kernels:
        """Return a block's forward pass with its adapters'; the product that is last in the program stays last."""
        matmuls = list(block.matmuls)
        added = [product for one in self.added for product in self._forward(one)]
        last = [] if self.adapter.targets and self.added[-1].name == "down_proj" else [matmuls.pop()]
        if self.adapter.kind == "dora":
            matmuls += [product for one in self.added for product in self._lengths(one)]
        moved = block.stream_bytes + sum(self._moved(one, forward=True, fused=fused) for one in self.added)
        moved += self._unpacked(list(self.added), fused)
        launches = block.launches + len(self.added) * self._launches(fused)
        return replace(block, matmuls=(*matmuls, *added, *last), stream_bytes=moved, launches=launches)

    def input_gradients(self, passed: Passed) -> tuple[Matmul, ...]:
        """Return the products that pass gradients on through frozen matrices."""
        shapes = [shape for name, shape in self.shapes.items() if passed.input_of(name)]
        return tuple(Matmul(self.tokens, inputs, outputs) for outputs, inputs in shapes)

    def with_backward(self, block: Kernels, passed: Passed, fused: bool) -> Kernels:
        """Return a block's backward pass with its adapters'."""
        added = [product for one in self.added for product in self._backward(one, passed)]
        moved = block.stream_bytes + sum(self._moved(one, forward=False, fused=fused) for one in self.added)
        moved += self._unpacked([one for one in self.added if passed.input_of(one.name)], fused)
        launches = block.launches + len(self.added) * self._launches(fused)
        return replace(block, matmuls=(*block.matmuls, *added), stream_bytes=moved, launches=launches)

    def _forward(self, one: Added) -> Iterator[Matmul]:
        yield Matmul(self.tokens, one.rank, one.inputs)
        yield Matmul(self.tokens, one.outputs, one.rank)

    def _backward(self, one: Added, passed: Passed) -> Iterator[Matmul]:
        yield Matmul(self.tokens, one.rank, one.outputs)
        yield Matmul(one.outputs, one.rank, self.tokens)
        yield Matmul(one.rank, one.inputs, self.tokens)
        if passed.input_of(one.name):
            yield Matmul(self.tokens, one.inputs, one.rank)

    def _lengths(self, one: Added) -> Iterator[Matmul]:
        """The products of which DoRA makes the lengths of rows."""
        yield Matmul(one.outputs, one.rank, one.inputs)
        yield Matmul(one.rank, one.rank, one.inputs)
        yield Matmul(one.outputs, one.rank, one.rank)

    def _moved(self, one: Added, forward: bool, fused: bool) -> float:
        """Return what is read and written to join an adapter's result, or its input's gradient, to the matrix's."""
        dora = self.adapter.kind == "dora"
        # The scaled update and the sum, and DoRA's product; each as it is read and written, or in one kernel.
        passes = (3 if fused else 5 + 2 * dora) if forward else (2 if fused else 2 + 5 * dora)
        moved = float(passes * self.element * self.tokens * (one.outputs if forward else one.outputs + one.inputs))
        if dora and forward:  # lengths of rows, in float32
            moved += (4.0 if fused else 14.0) * one.outputs * one.inputs
        return moved

    def _unpacked(self, matrices: list[Added], fused: bool) -> float:
        """Return what is read and written to make weights of 4 bits anew: indices, levels, scaled, in the format."""
        each = self.element + 0.5 if fused else 20.5 + self.element
        weights = sum(one.outputs * one.inputs for one in matrices)
        return each * weights * (self.adapter.base == "nf4")

    def _launches(self, fused: bool) -> int:
        number = 3 if fused else 4
        return number + (8 if self.adapter.kind == "dora" else 0) + (5 if self.adapter.base == "nf4" else 0)
