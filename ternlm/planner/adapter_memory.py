"""What a block with adapters keeps for its backward pass, in bytes. No torch here.

Frozen matrices keep no input, and frozen norms no result, since they have no gradient of their own; adapters do.
"""

from ternlm.config.run import Config
from ternlm.planner.frozen import adapted_matrices, passed_at_entry
from ternlm.planner.work import element_bytes, kept_bytes


class AdapterMemory:
    """A block on one tensor rank."""

    def __init__(self, config: Config, tensor: int) -> None:
        assert config.adapter is not None
        self.adapter, self.model, self.tensor = config.adapter, config.model, tensor
        self.element, self.kept = element_bytes(config), kept_bytes(config)
        self.added = list(adapted_matrices(config.model, config.adapter, tensor))
        self.dora = config.adapter.kind == "dora"
        model = config.model
        self.heads, self.kv_heads = model.num_attention_heads / tensor, model.kv_heads / tensor
        self.inner = model.intermediate_size / tensor

    @property
    def num_params(self) -> int:
        """Parameters of the adapters."""
        return sum(self.adapter.num_params_of((one.outputs, one.inputs)) for one in self.added)

    @property
    def packed_bytes(self) -> float:
        """Of the matrices in 4 bits, with a float32 scale for each block of weights."""
        if self.adapter.base != "nf4":
            return 0.0
        size, total = self.adapter.block_size, 0
        for one in self.added:
            blocks = -(-one.outputs * one.inputs // size)
            total += -(-blocks * size // 2) + 4 * blocks
        return float(total)

    @property
    def passing_bytes(self) -> float:
        """What is made of the largest matrix for a moment: its weights out of 4 bits, or copied for DoRA's lengths."""
        largest = max(one.outputs * one.inputs for one in self.added)
        unpacked = (8.0 + self.element * (self.element < 4)) * (self.adapter.base == "nf4")
        wide = 4.0 * (self.kept < 4 or self.adapter.base == "nf4")
        return largest * max(unpacked, wide * self.dora)

    @property
    def product_bytes(self) -> float:
        """Results of the adapters' products, per token."""
        return float(sum(self.element * (one.rank + one.outputs) for one in self.added))

    def block_bytes(self, sequence: int, fused: bool) -> float:
        """Return what a block keeps, per token. sequence: over how many ranks the residual stream is cut."""
        hidden, names = self.model.hidden_size, set(self.adapter.targets)
        # In float32 a norm's input, or in the products' format where it is made again from that.
        norms = 2 * self._norm(sequence, fused)
        inputs = hidden * self.element * (bool(names & {"q_proj", "k_proj", "v_proj"}) + bool(names - _OTHERS))
        mlp = ((2 if fused else 3) + ("down_proj" in names)) * self.inner * self.element
        adapters = sum(one.rank + one.outputs * self.dora for one in self.added) * self.element
        return norms + inputs + self._attention() + mlp + adapters

    def entry_bytes(self, sequence: int, fused: bool) -> float:
        """Return what the first block keeps less than others, per token."""
        passed = passed_at_entry(self.adapter)
        return (2 - passed.middle) * self._norm(sequence, fused) + (not passed.attention) * self._attention()

    def _norm(self, sequence: int, fused: bool) -> float:
        return (self.model.hidden_size * (self.element if fused else 4) + 4) / sequence

    def _attention(self) -> float:
        """Its inputs, its result, which is the last product's input, and the sums of its rows."""
        width = 2 * (self.heads + self.kv_heads) * self.model.head_size
        kept = width * self.element + 4 * self.heads
        if self.model.qk_norm:
            kept += 2 * width + 4 * (self.heads + self.kv_heads)
        return kept


_OTHERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"})
