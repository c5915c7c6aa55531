"""The decoder in plain modules: embedding, blocks of attention and SwiGLU, final norm, head.

Parameters have Hugging Face Llama's names. How tokens see each other is the caller's `attend`; how weights are
sharded, recomputed or compiled is `ternlm.parallel`'s business: nothing here knows of either.

Shapes: B batch, T query tokens, S key tokens, D hidden, N query heads, K key/value heads, H head dim, V vocabulary.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.config.model import ModelConfig
from ternlm.model.linear import Linear
from ternlm.model.rope import rope_tables, rotate
from ternlm.ops.attention import Attend

R = TypeVar("R")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Project to heads, rotate, let the caller attend, project back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d, h, bias = config.hidden_size, config.head_size, config.attention_bias
        self.layer, self.head_size = layer, h
        self.q_proj = Linear(d, config.num_attention_heads * h, bias=bias)
        self.k_proj = Linear(d, config.kv_heads * h, bias=bias)
        self.v_proj = Linear(d, config.kv_heads * h, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * h, d, bias=bias)
        self.q_norm = RMSNorm(h, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(h, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads = (-1, self.head_size)
        q_BTNH = self.q_norm(self.q_proj(x_BTD).unflatten(-1, heads))
        k_BTKH = self.k_norm(self.k_proj(x_BTD).unflatten(-1, heads))
        v_BTKH = self.v_proj(x_BTD).unflatten(-1, heads)
        out_BTNH = attend(rotate(q_BTNH, cos, sin), rotate(k_BTKH, cos, sin), v_BTKH, self.layer)
        return self.o_proj(out_BTNH.flatten(-2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, m = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, m, bias=False)
        self.up_proj = Linear(d, m, bias=False)
        self.down_proj = Linear(m, d, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Head(nn.Linear):
    """The output projection; a consumer can take its weight instead of the logits.

    A loss that works in chunks is handed (hidden, weight) inside this module's forward, so that the B x T x V
    logits never exist whole and a sharded weight is gathered once.
    """

    def forward(self, hidden_BTD: Tensor, consume: Callable[[Tensor, Tensor], R] | None = None) -> Tensor | R:
        if consume is None:
            return F.linear(hidden_BTD, self.weight.to(hidden_BTD.dtype))
        return consume(hidden_BTD, self.weight)


class CausalLM(nn.Module):
    """A causal language model: `model(...)` gives the final hidden states, `model.lm_head` the logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, attend: Attend, rope_length: int | Tensor | None = None
    ) -> Tensor:
        """Return the normalised final hidden states, (B, T, D).

        rope_length: context (tokens) that dynamic rope scaling is to assume, one or each token's, (B, T); where not
        given, the largest position of this call + 1. A decoder with a cache must fix it, since cached keys keep their
        rotation.
        """
        x_BTD = self.embed(tokens_BT)
        cos, sin = self.rotations(positions_BT, x_BTD.dtype, rope_length)
        for block in self.model.layers:
            x_BTD = block(x_BTD, cos, sin, attend)
        return self.model.norm(x_BTD)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return the tokens' embeddings in the dtype in which the blocks compute, (B, T, D)."""
        x_BTD = self.model.embed_tokens(tokens_BT)
        if torch.is_autocast_enabled(x_BTD.device.type):
            return x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        return x_BTD.float()  # a frozen embedding may be kept in fewer bits than are computed with

    def rotations(
        self, positions_BT: Tensor, dtype: torch.dtype, rope_length: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the cos and sin that the blocks take; `rope_length` as in `forward`."""
        if rope_length is None:
            # Reading a position back would stall a GPU, so only where the scaling depends on it.
            dynamic = self.config.rope_scaling.kind == "dynamic"
            rope_length = int(positions_BT.max()) + 1 if dynamic else 0
        return rope_tables(self.config, positions_BT, rope_length, dtype)


def build_model(config: ModelConfig) -> CausalLM:
    """Build the model on the current default device; under `torch.device("meta")` nothing is allocated."""
    return CausalLM(config)


def build_empty_model(
    config: ModelConfig, device: torch.device, change: Callable[[CausalLM], None] | None = None
) -> CausalLM:
    """Build the model on `device` with memory that holds anything: its weights are to be initialised or loaded next.

    change: what is done to it before it has memory.
    """
    with torch.device("meta"):
        model = build_model(config)
    if change is not None:
        change(model)
    model.to_empty(device=device)
    if config.tie_word_embeddings:  # to_empty has made two tensors of the one
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
