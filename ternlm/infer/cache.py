"""Keys and values of the tokens so far, as the `attend` that the model is given: prefill and decode alike.

Buffers of a fixed size hold every layer's keys and values, row by row from position 0, without gaps. Rows may be of
unequal length; where a forward pass brings a row fewer tokens than others, what its padding wrote lies behind the
row's end, is never attended to, and is overwritten by its next tokens.

Shapes: L layers, B rows, T new tokens, S stored tokens, N query heads, K key/value heads, G = N / K, H head dim,
Q = G * T.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ternlm.config.model import ModelConfig


class KVCache:
    """Keys and values of a batch of rows. Before each forward pass call `place`, then hand `attend` to the model.

    capacity: most tokens that a row can hold.
    """

    def __init__(
        self, config: ModelConfig, num_rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, num_rows, capacity, config.kv_heads, config.head_size)
        # Zeros, since what is masked is still multiplied: by 0, which doesn't hide the NaN of unset memory.
        self._keys_LBSKH = torch.zeros(shape, dtype=dtype, device=device)
        self._values_LBSKH = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * num_rows
        self._rows_B1 = torch.arange(num_rows, device=device)[:, None]

    def place(self, counts: Sequence[int]) -> Tensor:
        """Make room for new tokens, counts[b] of row b padded to the largest count; return their positions, (B, T)."""
        (_, num_rows, capacity), device = self._keys_LBSKH.shape[:3], self._keys_LBSKH.device
        T, self._start = max(counts), max(self.lengths)
        self._end = self._start + T
        if len(counts) != num_rows or self._end > capacity:
            raise ValueError(
                f"{len(counts)} rows of up to {self._start} + {T} tokens don't fit the cache of {num_rows} rows of "
                f"{capacity}"
            )
        starts_B = torch.tensor(self.lengths, device=device)
        self._positions_BT = starts_B[:, None] + torch.arange(T, device=device)
        self._mask_BTS = None
        # Kernels are faster without a mask; a prefill needs none, nor do rows that all add one token at one place.
        if self._start and (T > 1 or min(self.lengths) < self._start):
            self._mask_BTS = torch.arange(self._end, device=device) <= self._positions_BT[..., None]
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return self._positions_BT

    def attend(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int) -> Tensor:
        """Store the new keys and values where `place` put them; attend to all of the row up to each query."""
        keys_BSKH, values_BSKH = self._keys_LBSKH[layer], self._values_LBSKH[layer]
        keys_BSKH[self._rows_B1, self._positions_BT] = k_BTKH
        values_BSKH[self._rows_B1, self._positions_BT] = v_BTKH
        if self._start == 0:
            return _attend_causally(q_BTNH, k_BTKH, v_BTKH)
        return _attend_stored(q_BTNH, keys_BSKH[:, : self._end], values_BSKH[:, : self._end], self._mask_BTS)


def _attend_causally(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)


def _attend_stored(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor | None) -> Tensor:
    """Attend with a group's G query heads as so many more queries of its key/value head, which is then read once."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKQH = q_BTNH.unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    mask = mask_BTS.repeat(1, N // K, 1)[:, None] if mask_BTS is not None else None
    k_BKSH, v_BKSH = k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)
    out_BKQH = F.scaled_dot_product_attention(q_BKQH, k_BKSH, v_BKSH, attn_mask=mask)
    return out_BKQH.unflatten(2, (N // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)
