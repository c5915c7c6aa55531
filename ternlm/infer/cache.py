"""Keys and values of the tokens so far, as the `attend` that the model is given: prefill and decode alike.

Buffers of a fixed size hold every layer's keys and values, row by row from position 0, without gaps. Rows may be of
unequal length; where a forward pass brings a row fewer tokens than others, what its padding wrote lies behind the
row's end, is never attended to, and is overwritten by its next tokens.

Shapes: L layers, B rows, T new tokens, S stored tokens, N query heads, K key/value heads, G = N / K, H head dim.
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
        self._keys_LBSKH = torch.empty(shape, dtype=dtype, device=device)
        self._values_LBSKH = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = [0] * num_rows
        self._rows_B1 = torch.arange(num_rows, device=device)[:, None]
        self._positions_BT = self._rows_B1
        self._mask_BTS: Tensor | None = None

    def place(self, counts: Sequence[int]) -> Tensor:
        """Make room for new tokens, counts[b] of row b padded to the largest count; return positions, (B, T)."""
        (_, num_rows, capacity), device = self._keys_LBSKH.shape[:3], self._keys_LBSKH.device
        T, longest = max(counts), max(self.lengths)
        if len(counts) != num_rows or longest + T > capacity:
            raise ValueError(
                f"{len(counts)} rows of up to {longest} + {T} tokens don't fit the cache's {num_rows} rows of "
                f"{capacity}"
            )
        starts_B = torch.tensor(self.lengths, device=device)
        self._positions_BT = starts_B[:, None] + torch.arange(T, device=device)
        self._end = longest + T
        # Nothing stored before: plain causal attention says it all, and is faster without a mask.
        self._mask_BTS = None
        if longest:
            self._mask_BTS = torch.arange(self._end, device=device) <= self._positions_BT[..., None]
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return self._positions_BT

    def attend(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int) -> Tensor:
        """Store the new keys and values where `place` put them and attend to all of the row before and with them."""
        keys_BSKH, values_BSKH = self._keys_LBSKH[layer], self._values_LBSKH[layer]
        keys_BSKH[self._rows_B1, self._positions_BT] = k_BTKH
        values_BSKH[self._rows_B1, self._positions_BT] = v_BTKH
        if self._mask_BTS is None:
            return _attend_causally(q_BTNH, k_BTKH, v_BTKH)
        return _attend_masked(q_BTNH, keys_BSKH[:, : self._end], values_BSKH[:, : self._end], self._mask_BTS)


def _attend_causally(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)


def _attend_masked(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor) -> Tensor:
    """Attend with the query heads of a group as further queries of its one key/value head, which is read once."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    G = N // K
    q_BKQH = q_BTNH.view(B, T, K, G, H).permute(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    out_BKQH = F.scaled_dot_product_attention(
        q_BKQH, k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2), attn_mask=mask_BTS.repeat(1, G, 1)[:, None]
    )
    return out_BKQH.view(B, K, G, T, H).permute(0, 3, 1, 2, 4).reshape(B, T, N, H)
