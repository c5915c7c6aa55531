"""Attention to keys and values in blocks by PyTorch's operators: pieces of many sequences in one forward pass.

A pass goes over the pieces' tokens behind each other, (1, T): long pieces of prompts, and one token of each sequence
that is being continued. Single tokens are attended together, long pieces each for itself.

Shapes: L layers, T new tokens, R sequences that get one token, S stored tokens, N query heads, K key/value heads,
G = N / K, H head dim, P = K * R, Q = G * T.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.infer.key_values import KeyValues, Piece
from ternlm.infer.pages import BLOCK

_MOST_TAKEN = 2**26
"""Bytes of keys and values that are copied out of the memory at a time, unless a single sequence has more."""


@dataclass(frozen=True)
class _Long:
    """A piece that is attended for itself: tokens first..last-1 of the pass."""

    first: int
    last: int
    rows: Tensor | None
    """Where all of its sequence is stored; None: it is its sequence's beginning."""
    mask_QS: Tensor | None


@dataclass(frozen=True)
class _Singles:
    """Pieces of one token that are attended together, of sequences of about the same length."""

    tokens: Tensor | slice
    """Which tokens of the pass, R of them."""
    rows: Tensor
    """Where the sequences are stored: each as many blocks as the longest has, filled up with its first."""
    mask: Tensor
    """0 or -inf: (P, 1, S) for products, (R, 1, 1, S) for the fused kernel."""


class PagedCache:
    """Pieces attended by PyTorch's operators. As `Cache`."""

    def __init__(self, config: ModelConfig, memory: KeyValues) -> None:
        self.memory = memory
        self._num_heads, self._head_size = config.kv_heads, config.head_size
        self._groups = config.num_attention_heads // config.kv_heads
        self._heads = np.arange(2 * self._num_heads).reshape(-1, 2).T.ravel()  # rows of all keys, then of all values
        self._device, self._dtype = memory.device, memory.dtype
        self._blocks = memory.layers
        self._tokens = [layer.view(-1, self._head_size) for layer in memory.layers]
        self._taken = torch.empty(0, dtype=self._dtype, device=self._device)
        # The fused kernel is slow at few queries a head; but in fewer bits, products would round the scores.
        self._by_products = self._device.type == "cpu" and self._dtype == torch.float32

    def place(self, pieces: Sequence[Piece], num_rows: int = 0) -> Tensor:
        positions, slots, first = [], [], 0
        self._long: list[_Long] = []
        singles: list[tuple[int, Piece]] = []
        for piece in pieces:
            places = np.arange(piece.start, piece.start + piece.count)
            blocks = np.asarray(piece.blocks, dtype=np.int64)
            self.memory.note(blocks)
            positions.append(places)
            slots.append(blocks[places // BLOCK] * (2 * self._num_heads * BLOCK) + places % BLOCK)
            if piece.count == 1:
                singles.append((first, piece))
            else:
                self._long.append(self._plan_long(piece, blocks, first))
            first += piece.count
        self._singles = [self._plan_singles(part) for group in _alike(singles) for part in self._parts(group)]
        self._count = first
        # One group of single tokens and nothing else, as while texts are continued.
        alone = not self._long and len(self._singles) == 1 and isinstance(self._singles[0].tokens, slice)
        self._is_plain = alone and num_rows <= first
        head_slots = self._heads * BLOCK
        self._slots = torch.from_numpy((np.concatenate(slots)[:, None] + head_slots).ravel()).to(self._device)
        positions.append(np.zeros(max(num_rows - first, 0), np.int64))
        return torch.from_numpy(np.concatenate(positions)).to(self._device)[None]

    def attend(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int) -> Tensor:
        new = torch.cat((k_BTKH[0, : self._count], v_BTKH[0, : self._count]), dim=1)
        self._tokens[layer].index_copy_(0, self._slots, new.flatten(0, 1))
        if self._is_plain:
            return self._attend_singles(q_BTNH[0], self._singles[0], layer)[None]
        out_BTNH = torch.empty_like(q_BTNH, memory_format=torch.contiguous_format)
        out_BTNH[:, self._count :] = 0
        for piece in self._long:
            own = slice(piece.first, piece.last)
            if piece.rows is None:
                found = _attend_causally(q_BTNH[:, own], k_BTKH[:, own], v_BTKH[:, own])
            else:
                found = _attend_stored(q_BTNH[:, own], self._take(piece.rows, 1, layer), piece.mask_QS)
            out_BTNH[:, own] = found
        for group in self._singles:
            out_BTNH[0, group.tokens] = self._attend_singles(q_BTNH[0, group.tokens], group, layer)
        return out_BTNH

    def _attend_singles(self, q_RNH: Tensor, group: _Singles, layer: int) -> Tensor:
        stored = self._take(group.rows, len(q_RNH), layer)
        if self._by_products:
            return _attend_by_products(q_RNH, stored, group.mask)
        return _attend_stored(q_RNH[:, None], stored, group.mask)[:, 0]

    def _take(self, rows: Tensor, num: int, layer: int) -> Tensor:
        """Copy sequences' keys and values out of the memory, (2 K, num, S, H); good until the next ones are."""
        blocks = self._blocks[layer]
        size = len(rows) * blocks.shape[1]
        if size > len(self._taken):  # kept, since fresh memory costs more than what is written to it
            self._taken = torch.empty(size * 5 // 4, dtype=self._dtype, device=self._device)
        out = self._taken[:size].view(len(rows), -1)
        torch.index_select(blocks, 0, rows, out=out)
        return out.view(2 * self._num_heads, num, -1, self._head_size)

    def _plan_long(self, piece: Piece, blocks: np.ndarray, first: int) -> _Long:
        if piece.start == 0:
            return _Long(first, first + piece.count, None, None)
        used = -(-(piece.start + piece.count) // BLOCK)
        ends_T = torch.arange(piece.start, piece.start + piece.count, device=self._device)
        hidden_TS = torch.arange(used * BLOCK, device=self._device) > ends_T[:, None]
        mask_TS = torch.zeros(hidden_TS.shape, dtype=self._dtype, device=self._device).masked_fill_(
            hidden_TS, -math.inf
        )
        return _Long(first, first + piece.count, self._rows(blocks[None, :used]), mask_TS.repeat(self._groups, 1))

    def _parts(self, group: Sequence[tuple[int, Piece]]) -> Iterator[Sequence[tuple[int, Piece]]]:
        """Cut a group so that what is taken out of the memory for a part of it stays small."""
        longest = max(piece.start for _, piece in group) // BLOCK + 1
        size = 2 * self._num_heads * longest * BLOCK * self._head_size * self._dtype.itemsize
        num = max(_MOST_TAKEN // size, 1)
        return (group[first : first + num] for first in range(0, len(group), num))

    def _plan_singles(self, group: Sequence[tuple[int, Piece]]) -> _Singles:
        longest = max(piece.start for _, piece in group) // BLOCK + 1
        blocks_RM = np.empty((len(group), longest), np.int64)
        for row, (_, piece) in enumerate(group):
            used = piece.start // BLOCK + 1
            blocks_RM[row, :used] = piece.blocks[:used]
            blocks_RM[row, used:] = piece.blocks[0]  # not another's: what isn't finite shows through the mask
        ends_R1 = torch.tensor([[piece.start] for _, piece in group])
        mask_R1S = torch.zeros(len(group), 1, longest * BLOCK, dtype=self._dtype)
        mask_R1S.masked_fill_((torch.arange(longest * BLOCK) > ends_R1)[:, None], -math.inf)
        tokens = [token for token, _ in group]
        follow = tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        where = slice(tokens[0], tokens[-1] + 1) if follow else torch.tensor(tokens, device=self._device)
        mask = mask_R1S.repeat(self._num_heads, 1, 1) if self._by_products else mask_R1S[:, None]
        return _Singles(where, self._rows(blocks_RM), mask.to(self._device))

    def _rows(self, blocks_RM: np.ndarray) -> Tensor:
        """Return which rows of the memory hold blocks, for one head after another."""
        heads_K11 = self._heads[:, None, None]
        return torch.from_numpy((heads_K11 + blocks_RM * len(heads_K11)).ravel()).to(self._device)


def _alike(singles: Sequence[tuple[int, Piece]]) -> list[list[tuple[int, Piece]]]:
    """Group pieces so that a group's longest sequence is at most twice its shortest, or short anyway."""
    groups: list[list[tuple[int, Piece]]] = []
    limit = -1
    for each in sorted(singles, key=lambda single: single[1].start):
        if each[1].start > limit:
            groups.append([])
            limit = max(2 * each[1].start, 16 * BLOCK)
        groups[-1].append(each)
    return [sorted(group, key=lambda single: single[0]) for group in groups]


def _attend_causally(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)


def _attend_stored(q_BTNH: Tensor, stored_2KBSH: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with a group's G query heads as so many more queries of its key/value head, which is then read once."""
    B, T, N, H = q_BTNH.shape
    K = len(stored_2KBSH) // 2
    q_BKQH = q_BTNH.unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    k_BKSH, v_BKSH = (x.transpose(0, 1) for x in stored_2KBSH.split(K))
    out_BKQH = F.scaled_dot_product_attention(q_BKQH, k_BKSH, v_BKSH, attn_mask=mask)
    return out_BKQH.unflatten(2, (N // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _attend_by_products(q_RNH: Tensor, stored_2KRSH: Tensor, mask_P1S: Tensor) -> Tensor:
    """Attend with one token of each sequence, by two products over all of them."""
    R, N, H = q_RNH.shape
    K, S = len(stored_2KRSH) // 2, stored_2KRSH.shape[2]
    q_PGH = q_RNH.view(R, K, -1, H).transpose(0, 1).reshape(K * R, -1, H)
    k_PSH, v_PSH = stored_2KRSH.view(2, K * R, S, H).unbind()
    scores_PGS = torch.baddbmm(mask_P1S, q_PGH, k_PSH.transpose(1, 2), alpha=H**-0.5)
    out_PGH = torch.bmm(scores_PGS.softmax(-1), v_PSH)
    return out_PGH.view(K, R, -1, H).transpose(0, 1).reshape(R, N, H)
