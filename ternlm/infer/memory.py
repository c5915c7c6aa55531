"""How much of the memory that is free an engine takes for keys and values."""

import torch

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError
from ternlm.infer.pages import BLOCK

_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Of what is free; the rest is for what forward passes hold, and for others."""
_MOST = 0.9
"""Of what is free, where a number is asked for: all of it is taken, and forward passes need some, too."""


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes that the keys and values of a token take in all layers."""
    return 2 * config.num_hidden_layers * config.kv_heads * config.head_size * dtype.itemsize


def choose_num_tokens(config: ModelConfig, dtype: torch.dtype, max_running: int, free_bytes: int, device: str) -> int:
    """Return for how many tokens to keep room: as many as the texts that may run can need, if there is memory.

    device: its type. Raises ConfigError where there is memory for less than a block.
    """
    fit = int(free_bytes * _SHARE.get(device, 0.5)) // bytes_per_token(config, dtype)
    wanted = max_running * -(-config.max_position_embeddings // BLOCK) * BLOCK
    num = min(fit // BLOCK * BLOCK, wanted)
    if num < BLOCK:
        raise ConfigError(
            f"{free_bytes / 2**20:,.0f} MiB are free, too little for the keys and values of {BLOCK} tokens; end what "
            "else runs here, or choose a smaller model"
        )
    return num


def check_num_tokens(config: ModelConfig, dtype: torch.dtype, num_tokens: int, free_bytes: int) -> int:
    """Return a number of tokens to keep room for; raises ConfigError where there isn't the memory for it."""
    each = bytes_per_token(config, dtype)
    most = int(free_bytes * _MOST) // each
    if num_tokens > most:
        raise ConfigError(
            f"the keys and values of {num_tokens:,} tokens take {num_tokens * each / 2**30:,.1f} GiB, and "
            f"{free_bytes / 2**30:,.1f} GiB are free: keep room for at most {most:,}"
        )
    return num_tokens
