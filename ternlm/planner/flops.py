"""Floating-point operations of a model, in the conventions that people publish.

A multiply and an add are two operations. Only matrix products count: the blocks' seven matrices and the
head, 2 per weight and token, and attention's two, 4 x heads x head size per layer and query-key pair. Not
counted, as usual: the input embedding (a lookup), norms, biases, activations, the optimizer. A backward pass
costs twice its forward, but for frozen matrices, which have no gradient of their own. No torch here: plain numbers in,
plain numbers out.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ternlm.config.adapter import AdapterConfig
from ternlm.config.model import ModelConfig
from ternlm.config.training import recomputed_blocks
from ternlm.planner.frozen import adapter_forward_params, entry_params_passed_over, passed_at_entry


@dataclass(frozen=True)
class Flops:
    """Operations of the same work, counted three ways.

    full: every token attends to its whole segment, before and after it (Megatron-LM, PaLM, InternLM);
    causal: half of that attention, which is what a causal kernel computes of a long segment;
    hardware: full, plus the forward pass of the blocks that are recomputed in backward.
    """

    full: float
    causal: float
    hardware: float


def matmul_params(config: ModelConfig) -> int:
    """Return how many weights a token is multiplied with: the blocks' matrices and the head, tied or not."""
    return config.num_hidden_layers * _layer_matmul_params(config) + config.vocab_size * config.hidden_size


def squared_lengths(lengths: Iterable[Iterable[int]]) -> int:
    """Return the query-key pairs of packed rows: the sum over segments of length squared."""
    return sum(length * length for row in lengths for length in row)


def forward_flops(config: ModelConfig, tokens: int, pairs: int) -> Flops:
    """Count a forward pass with the head on every token.

    pairs: `squared_lengths` of the segments that attention may not cross; tokens x seq_len where documents
    are not kept apart.
    """
    matmuls = 2.0 * matmul_params(config) * tokens
    attention = _attention_flops_per_pair(config) * config.num_hidden_layers * pairs
    full = matmuls + attention
    return Flops(full=full, causal=matmuls + attention / 2, hardware=full)


def training_flops(
    config: ModelConfig, tokens: int, pairs: int, recompute: float = 0.0, adapter: AdapterConfig | None = None
) -> Flops:
    """Count forward and backward passes; arguments as for `forward_flops`.

    recompute: share of the blocks whose whole forward runs again in backward, rounded up to whole blocks; 0
    where recomputed blocks keep the results of their matrix products. adapter: of a run that trains nothing else.
    """
    forward = forward_flops(config, tokens, pairs)
    blocks = recomputed_blocks(config.num_hidden_layers, recompute)
    block = 2.0 * _layer_matmul_params(config) * tokens + _attention_flops_per_pair(config) * pairs
    if adapter:
        added = 2.0 * adapter_forward_params(config, adapter) * tokens
        full, causal = _adapter_flops(config, adapter, tokens, pairs)
        return Flops(full, causal, full + blocks * (block + added))
    return Flops(full=3 * forward.full, causal=3 * forward.causal, hardware=3 * forward.full + blocks * block)


def training_flops_per_token(config: ModelConfig, seq_len: int, recompute: float = 0.0) -> Flops:
    """Count forward and backward of one token in undivided sequences.

    `full` is 6 N + 12 x layers x heads x head size x seq_len, where N is `matmul_params`.
    """
    return training_flops(config, tokens=1, pairs=seq_len, recompute=recompute)


def ancestor_flops_per_token(config: ModelConfig, seq_len: int, recompute: bool, mlp_ratio: float = 8 / 3) -> float:
    """Return what InternLM's training framework of 2023 counted, to compare with its published TFLOPS.

    Full attention over seq_len whatever the packing; the MLP's width before rounding, hidden size x
    mlp_ratio; recompute of any block counted as recompute of every one, but not of the head; no GQA.
    """
    hidden, passes = config.hidden_size, 4 if recompute else 3
    layer = (8 + 4 * 1.5 * mlp_ratio) * hidden**2 + 4 * seq_len * hidden
    return passes * config.num_hidden_layers * layer + 6 * hidden * config.vocab_size


def _adapter_flops(config: ModelConfig, adapter: AdapterConfig, tokens: int, pairs: int) -> tuple[float, float]:
    """Return `full` and `causal` of a step that trains adapters: DoRA's lengths of rows, once a pass, not counted."""
    layers, attends = config.num_hidden_layers, _attention_flops_per_pair(config) * pairs
    added = 2.0 * adapter_forward_params(config, adapter) * tokens * layers
    passed_over = 2.0 * entry_params_passed_over(config, adapter) * tokens
    matmuls = 2 * (2.0 * matmul_params(config) * tokens) + 3 * added - passed_over
    attention = attends * (3 * layers - 2 * (not passed_at_entry(adapter).attention))
    return matmuls + attention, matmuls + attention / 2


def _layer_matmul_params(config: ModelConfig) -> int:
    queries = config.num_attention_heads * config.head_size
    keys = config.kv_heads * config.head_size
    return config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)


def _attention_flops_per_pair(config: ModelConfig) -> float:
    """Forward operations of one layer for one query-key pair: in each head q.k and the weighted sum of v."""
    return 4.0 * config.num_attention_heads * config.head_size
