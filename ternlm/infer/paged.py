"""Keys and values in blocks, as the `attend` that the model is given: pieces of many sequences in one forward pass.

A pass goes over the pieces' tokens behind each other, (1, T): long pieces of prompts, and one token of each sequence
that is being continued. Single tokens are attended together, long pieces each for itself.

Shapes: L layers, T new tokens, R sequences that get one token, S stored tokens, N query heads, K key/value heads,
G = N / K, H head dim, Q = G * T.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.infer.pages import BLOCK


@dataclass(frozen=True)
class Piece:
    """New tokens of a sequence, `count` from place `start` on; its blocks have room for them."""

    blocks: Sequence[int]
    start: int
    count: int


@dataclass(frozen=True)
class _Long:
    """A piece that is attended for itself: tokens first..last-1 of the pass."""

    first: int
    last: int
    slots_S: Tensor | None
    """Where all of its sequence is stored; None: it is its sequence's beginning."""
    mask_QS: Tensor | None


@dataclass(frozen=True)
class _Singles:
    """Pieces of one token that are attended together, of sequences of about the same length."""

    tokens_R: Tensor
    """Which tokens of the pass."""
    blocks_RM: Tensor
    """Blocks of each, filled up with any."""
    mask_RS: Tensor


class PagedCache:
    """Keys and values of all layers. Before each forward pass call `place`, then hand `attend` to the model."""

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, num_blocks, BLOCK, config.kv_heads, config.head_size)
        self._keys, self._values = (_zeros(shape, dtype, device) for _ in range(2))
        self._groups = config.num_attention_heads // config.kv_heads
        self._device = device

    def place(self, pieces: Sequence[Piece]) -> Tensor:
        """Say which tokens the next pass goes over; return their positions, (1, T)."""
        positions, slots, first = [], [], 0
        self._long: list[_Long] = []
        singles: list[tuple[int, Piece]] = []
        for piece in pieces:
            places = np.arange(piece.start, piece.start + piece.count)
            blocks = np.asarray(piece.blocks, dtype=np.int64)
            positions.append(places)
            slots.append(blocks[places // BLOCK] * BLOCK + places % BLOCK)
            if piece.count == 1:
                singles.append((first, piece))
            else:
                self._long.append(self._plan_long(piece, blocks, first))
            first += piece.count
        self._singles = [self._plan_singles(group) for group in _alike(singles)]
        self._slots_T = torch.from_numpy(np.concatenate(slots)).to(self._device)
        return torch.from_numpy(np.concatenate(positions)).to(self._device)[None]

    def attend(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int) -> Tensor:
        """Store the new keys and values where `place` put them; attend each piece to its sequence so far."""
        keys, values = self._keys[layer], self._values[layer]
        flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
        flat_keys.index_copy_(0, self._slots_T, k_BTKH[0])
        flat_values.index_copy_(0, self._slots_T, v_BTKH[0])
        out_BTNH = torch.empty_like(q_BTNH)
        for piece in self._long:
            own = slice(piece.first, piece.last)
            q_BTNH_own = q_BTNH[:, own]
            if piece.slots_S is None:
                out_BTNH[:, own] = _attend_causally(q_BTNH_own, k_BTKH[:, own], v_BTKH[:, own])
            else:
                k_BSKH, v_BSKH = flat_keys[piece.slots_S][None], flat_values[piece.slots_S][None]
                mask = None if piece.mask_QS is None else piece.mask_QS[None, None]
                out_BTNH[:, own] = _attend_stored(q_BTNH_own, k_BSKH, v_BSKH, mask)
        for group in self._singles:
            k_RSKH, v_RSKH = keys[group.blocks_RM].flatten(1, 2), values[group.blocks_RM].flatten(1, 2)
            q_R1NH = q_BTNH[0, group.tokens_R][:, None]
            found = _attend_stored(q_R1NH, k_RSKH, v_RSKH, group.mask_RS[:, None, None])
            out_BTNH[0, group.tokens_R] = found[:, 0]
        return out_BTNH

    def _plan_long(self, piece: Piece, blocks: np.ndarray, first: int) -> _Long:
        if piece.start == 0:
            return _Long(first, first + piece.count, None, None)
        places = np.arange(piece.start + piece.count)
        slots_S = torch.from_numpy(blocks[places // BLOCK] * BLOCK + places % BLOCK).to(self._device)
        ends_T = torch.arange(piece.start, piece.start + piece.count, device=self._device)
        mask_TS = torch.arange(len(places), device=self._device) <= ends_T[:, None]
        return _Long(first, first + piece.count, slots_S, mask_TS.repeat(self._groups, 1))

    def _plan_singles(self, group: Sequence[tuple[int, Piece]]) -> _Singles:
        longest = max(piece.start for _, piece in group) // BLOCK + 1
        blocks_RM = np.zeros((len(group), longest), np.int64)
        for row, (_, piece) in enumerate(group):
            used = piece.start // BLOCK + 1
            blocks_RM[row, :used] = piece.blocks[:used]
        ends_R = torch.tensor([piece.start for _, piece in group])
        mask_RS = torch.arange(longest * BLOCK) <= ends_R[:, None]
        tokens_R = torch.tensor([token for token, _ in group])
        device = self._device
        return _Singles(tokens_R.to(device), torch.from_numpy(blocks_RM).to(device), mask_RS.to(device))


def _alike(singles: Sequence[tuple[int, Piece]]) -> list[list[tuple[int, Piece]]]:
    """Group pieces so that a group's longest sequence is at most twice its shortest, or short anyway."""
    groups: list[list[tuple[int, Piece]]] = []
    limit = -1
    for each in sorted(singles, key=lambda single: single[1].start):
        if each[1].start > limit:
            groups.append([])
            limit = max(2 * each[1].start, 16 * BLOCK)
        groups[-1].append(each)
    return groups


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros, since what is masked is still multiplied: by 0, which doesn't hide the NaN of unset memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)  # no memory before it is written


def _attend_causally(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)


def _attend_stored(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with a group's G query heads as so many more queries of its key/value head, which is then read once."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKQH = q_BTNH.unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    k_BKSH, v_BKSH = k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)
    out_BKQH = F.scaled_dot_product_attention(q_BKQH, k_BKSH, v_BKSH, attn_mask=mask)
    return out_BKQH.unflatten(2, (N // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)
