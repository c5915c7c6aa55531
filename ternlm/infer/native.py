"""Attention to keys and values in blocks by functions in C: nothing is copied out of the memory.

What a piece attends to is computed in the same order whatever else is in the pass.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.infer.key_values import Cache, KeyValues, Piece
from ternlm.infer.paged import PagedCache
from ternlm.infer.pages import BLOCK
from ternlm.ops import native


class NativeCache:
    """Pieces attended by functions in C, all of a layer at once. As `Cache`."""

    def __init__(self, config: ModelConfig, memory: KeyValues) -> None:
        functions = native.loaded(memory.dtype)
        self.memory, self._functions, self._dtype = memory, functions, memory.dtype
        self._num_q, self._num_heads, self._head_size = config.num_attention_heads, config.kv_heads, config.head_size
        self._task_tokens = functions.tokens_of_task(self._num_q, self._num_heads)
        self._chunk = functions.keys_of_chunk()
        self._scratch = torch.empty(0, dtype=torch.float32, device=memory.device)

    def place(self, pieces: Sequence[Piece], num_rows: int = 0) -> Tensor:
        positions: list[np.ndarray] = []
        blocks: list[np.ndarray] = []
        about: list[tuple[int, int, int, int]] = []
        long_tasks: list[tuple[int, int, int, int]] = []  # of pieces of several tokens
        tasks: list[tuple[int, int, int, int]] = []
        first = num_blocks = 0
        slots: list[np.ndarray] = []
        for index, piece in enumerate(pieces):
            end = piece.start + piece.count
            own, places = np.asarray(piece.blocks, dtype=np.int64), np.arange(piece.start, end)
            positions.append(places)
            slots.append(own[places // BLOCK] * BLOCK + places % BLOCK)
            blocks.append(own)
            about.append((first, piece.count, piece.start, num_blocks))
            if piece.count == 1:
                chunks = -(-end // self._chunk)
                tasks.extend((index, 0, chunk, chunks) for chunk in range(chunks))
            else:
                long_tasks.extend((index, token, 0, 1) for token in range(0, piece.count, self._task_tokens))
            first += piece.count
            num_blocks += len(own)
        self._count = first
        long_tasks.sort(key=lambda task: -(pieces[task[0]].start + task[1]))  # those with the most keys first
        joined = np.concatenate(blocks)
        self.memory.note(joined)
        self._plan(first, about, long_tasks + tasks, np.concatenate(slots), joined)
        positions.append(np.zeros(max(num_rows - first, 0), np.int64))
        return torch.from_numpy(np.concatenate(positions))[None]

    def _plan(
        self,
        num_tokens: int,
        about: list[tuple[int, int, int, int]],
        tasks: list[tuple[int, int, int, int]],
        slots: np.ndarray,
        blocks: np.ndarray,
    ) -> None:
        """Note all that is the same for every layer."""
        threads = torch.get_num_threads()
        heads = (self._num_q, self._num_heads, self._head_size)
        size = self._functions.scratch_size(*heads, threads, len(tasks))
        if size > len(self._scratch):
            self._scratch = self._scratch.new_empty(size * 5 // 4)
        self._kept = (slots, np.array(about, np.int64), blocks, np.array(tasks, np.int64))  # while pointers are used
        slots_at, about_at, blocks_at, tasks_at = (array.ctypes.data for array in self._kept)
        self._pass = native.Pass(
            *heads, 0, 0, 0, num_tokens, slots_at, about_at, blocks_at, len(tasks), tasks_at,
            self._scratch.data_ptr(), threads,
        )  # fmt: skip
        self._where = ctypes.byref(self._pass)

    def attend(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int) -> Tensor:
        q_BTNH, k_BTKH, v_BTKH = (self._readable(x) for x in (q_BTNH, k_BTKH, v_BTKH))
        self._check(q_BTNH.shape, k_BTKH.shape, v_BTKH.shape)
        out_BTNH = q_BTNH.new_empty(q_BTNH.shape)
        if self._count < q_BTNH.shape[1]:
            out_BTNH[:, self._count :] = 0
        now = self._pass
        now.q_stride, now.k_stride, now.v_stride = q_BTNH.stride(1), k_BTKH.stride(1), v_BTKH.stride(1)
        places = (x.data_ptr() for x in (q_BTNH, k_BTKH, v_BTKH, self.memory.layers[layer], out_BTNH))
        self._functions.attend(self._where, *places)
        return out_BTNH

    def _check(self, *shapes: torch.Size) -> None:
        """Raise ValueError for tensors that aren't what `place` announced: in C nothing else would notice."""
        num = shapes[0][1]
        heads = (self._num_q, self._num_heads, self._num_heads)
        wanted = [(1, num, each, self._head_size) for each in heads]
        if num < self._count or list(shapes) != wanted:
            raise ValueError(f"{shapes} can't be attended; {self._count} tokens or more were to come, as {wanted}")

    def _readable(self, x: Tensor) -> Tensor:
        """Return the same numbers with each token's heads behind each other, in the memory's dtype."""
        good = x.dtype == self._dtype and x.stride()[2:] == (self._head_size, 1)
        return x if good else x.to(self._dtype).contiguous()


def make_cache(config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """Return the fastest way to keys and values of this dtype on this device, and the memory for them."""
    memory = KeyValues(config, num_blocks, dtype, device)
    suits = config.head_size % native.LANES == 0 and BLOCK == native.BLOCK and native.is_available(device, dtype)
    return NativeCache(config, memory) if suits else PagedCache(config, memory)
