"""The memory of keys and values in blocks. What reads it: `paged` by PyTorch's operators, `native` by functions in C.

Shapes: K key/value heads, H head dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.infer.pages import BLOCK


@dataclass(frozen=True)
class Piece:
    """New tokens of a sequence, `count` from place `start` on; its blocks have room for them."""

    blocks: Sequence[int]
    start: int
    count: int


class KeyValues:
    """Keys and values of all layers.

    A row of a layer's memory holds a block of one head, (BLOCK, H); a block's rows are the first head's keys, its
    values, the second head's keys and so on. So a head's sequence, taken block by block, lies as products read it.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._rows = 2 * config.kv_heads  # of a block
        shape = (config.num_hidden_layers, self._rows * num_blocks, BLOCK * config.head_size)
        self.layers = list(_zeros(shape, dtype, device))
        self._highest = -1  # block that was ever written to

    def note(self, blocks: np.ndarray) -> None:
        """Take note of blocks that are going to be written to."""
        self._highest = max(self._highest, int(blocks.max()))

    def reserve(self) -> None:
        """Take all of the memory now instead of piece by piece as it's first written to."""
        for layer in self.layers:
            layer.zero_()

    def clear(self, blocks: Sequence[int] | None = None) -> None:
        """Let blocks, or all that were ever written to, be zeros: what isn't finite would spoil whoever gets its place
        next."""
        index = None if blocks is None else torch.tensor(blocks, dtype=torch.int64, device=self.device)
        for layer in self.layers:
            if index is None:
                layer[: (self._highest + 1) * self._rows] = 0
            else:
                layer.unflatten(0, (-1, self._rows))[index] = 0


class Cache(Protocol):
    """How a forward pass stores and reads keys and values. Before each `place`, then `attend` is for the model."""

    memory: KeyValues

    def place(self, pieces: Sequence[Piece], num_rows: int = 0) -> Tensor:
        """Say which tokens the next pass goes over, behind each other; return their positions, (1, T).

        num_rows: T, where that is to be more than there are tokens; what becomes of the others means nothing.
        """

    def attend(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int) -> Tensor:
        """Store the new keys and values where `place` put them; attend each piece to its sequence so far."""


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros, since what is masked is still multiplied: by 0, which doesn't hide the NaN of unset memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)  # no memory before it is written
