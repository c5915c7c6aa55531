"""What GGUF calls the parts of a model, for reading and writing alike, and how it orders the rows of q and k."""

import numpy as np

# Architectures that are our decoder, and whether the rows of q and k are ordered for a rotation of neighbours.
INTERLEAVED = {"llama": True, "internlm2": True, "qwen2": False, "qwen3": False}

_PARTS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Return what GGUF calls a parameter of the model."""
    part, suffix = name.rsplit(".", 1)
    if part in _PARTS:
        return f"{_PARTS[part]}.{suffix}"
    _, _, layer, part = part.split(".", 3)
    return f"blk.{layer}.{_LAYER_PARTS[part]}.{suffix}"


def is_rotated(name: str) -> bool:
    """Whether a parameter of the model makes what is rotated: q's and k's weights and biases."""
    return ".q_proj." in name or ".k_proj." in name


def rows_from_interleaved(num_rows: int, head_size: int) -> np.ndarray:
    """Return where each of our rows is among interleaved ones.

    We rotate a head's first half with its second; there each row is followed by the one that it is rotated with.
    """
    return np.arange(num_rows).reshape(-1, head_size // 2, 2).swapaxes(1, 2).ravel()


def rows_to_interleaved(num_rows: int, head_size: int) -> np.ndarray:
    """Return where each interleaved row is among ours: the inverse of `rows_from_interleaved`."""
    return np.arange(num_rows).reshape(-1, 2, head_size // 2).swapaxes(1, 2).ravel()
