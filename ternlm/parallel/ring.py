"""Ring attention: queries stay, keys and values go round the ranks that share a sequence (arXiv 2310.01889).

Each sequence is cut into 2c chunks for c ranks; rank r holds chunks r and 2c-1-r, so that every rank has the same
number of scores under a causal mask. Packed documents stay apart, and make the ring simple: of the keys that arrive, a
query chunk sees those of the one document that reaches into it, all of them, so that each row of each arrival is one
rectangle without a mask (`ring_spans`). Only a rank's own chunks need a causal kernel.

One custom operator, opaque to the compiler and to selective recompute. `ternlm.parallel.context` makes the `attend` of
it; the kernels are in `ternlm.ops.tiles`.

Shapes: B batch, T tokens of a sequence on this rank, N query heads, K key/value heads, H head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup

# How functional collectives find a group by its name, too; there is no public name for it.
from torch.distributed.distributed_c10d import _resolve_process_group

from ternlm.ops.tiles import (
    Gradients,
    Part,
    attend_rectangle,
    attend_rectangle_backward,
    attend_segments,
    attend_segments_backward,
    merge_,
)
from ternlm.parallel.spans import exchange

# Messages of two kinds are under way to the same rank at once in backward; gloo tells them apart by tag.
_KEYS, _GRADIENTS = 1, 2


def own_segments(lengths: Sequence[Sequence[int]], degree: int, rank: int) -> list[int]:
    """Return the bounds of a rank's segments in its own flattened tokens: first 0, last all of them.

    lengths: per row, the lengths of the whole sequence's segments.
    """
    bounds = [0]
    for row in lengths:
        chunk = sum(row) // (2 * degree)
        starts = {0, *accumulate(row)}
        for index in (rank, 2 * degree - 1 - rank):
            first, base = index * chunk, bounds[-1]
            cuts = sorted(start - first for start in starts if first < start < first + chunk)
            bounds += [base + cut for cut in (*cuts, chunk)]
    return bounds


def ring_spans(lengths: Sequence[Sequence[int]], degree: int, rank: int) -> list[list[tuple[int, int, int, int]]]:
    """Return who sees whom: per step of the ring and row, (first query, end, first key, end); zeros where nobody.

    At step i the keys are those of rank - i. All numbers are tokens of a row on one rank, its two chunks side by side.
    At step 0 it is what the later chunk sees of the earlier; what lies inside a chunk is `own_segments`.
    """
    return [[_span(row, degree, rank, (rank - step) % degree) for row in lengths] for step in range(degree)]


def _span(row: Sequence[int], degree: int, rank: int, sender: int) -> tuple[int, int, int, int]:
    chunk = sum(row) // (2 * degree)
    first, second = sender * chunk, (2 * degree - 1 - sender) * chunk  # tokens at which the sender's chunks start
    late_begin, late_rows = _reach(row, (2 * degree - 1 - rank) * chunk, chunk)
    if sender < rank:  # of its keys only the first chunk lies before our queries
        begin, rows = _reach(row, rank * chunk, chunk)
        if late_rows and late_begin < first + chunk:  # one document, from there to our second chunk
            rows = chunk + late_rows
        if not rows or begin >= first + chunk:
            return (0, 0, 0, 0)
        return (0, rows, max(begin - first, 0), chunk)
    # Only our second chunk lies behind its keys; behind both its chunks, if they aren't our own.
    end = second + chunk if sender > rank else first + chunk
    if not late_rows or late_begin >= end:
        return (0, 0, 0, 0)
    in_first = late_begin < first + chunk
    begin = max(late_begin - first, 0) if in_first else chunk + max(late_begin - second, 0)
    return (chunk, chunk + late_rows, begin, 2 * chunk if sender > rank else chunk)


def _reach(row: Sequence[int], start: int, chunk: int) -> tuple[int, int]:
    """Return where the document that reaches into a chunk from before begins, and how far into the chunk it goes."""
    end = 0
    for length in row:
        begin, end = end, end + length
        if end > start:
            return begin, min(end - start, chunk) if begin < start else 0
    return start, 0


@torch.library.custom_op("ternlm::ring_attention", mutates_args=())
def ring_attention(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, offsets: Tensor, spans: Tensor, group_name: str
) -> tuple[Tensor, Tensor]:
    """Attend causally inside the documents of sequences that the ranks of a group share.

    offsets: int32, `own_segments`; spans: int32 on the CPU, `ring_spans`. Returns the output (as q) and the log-sum-exp
    of the scores, (B, T, N), for the backward. Collective over the group: every rank must call it.
    """
    ring = _Ring(group_name)
    held = torch.stack((k_BTKH, v_BTKH))
    arriving = ring.shift(held, _KEYS)
    own = attend_segments(q_BTNH, k_BTKH, v_BTKH, offsets)
    whole = Part(own.out_BTNH.float(), own.lse_BTN.contiguous())
    for step, rows in enumerate(spans.tolist()):
        if step:
            held = arriving()
        if 0 < step < ring.size - 1:
            arriving = ring.shift(held, _KEYS)
        for at, queries, keys in _rectangles(rows):
            part = attend_rectangle(q_BTNH[at, queries], *held[:, at, keys])
            merge_(Part(whole.out_BTNH[at, queries], whole.lse_BTN[at, queries]), part)
    return whole.out_BTNH.to(q_BTNH.dtype), whole.lse_BTN


@ring_attention.register_fake
def _(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, offsets: Tensor, spans: Tensor, group_name: str
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q_BTNH, memory_format=torch.contiguous_format)
    return out, q_BTNH.new_empty(q_BTNH.shape[:3], dtype=torch.float32)


@torch.library.custom_op("ternlm::ring_attention_backward", mutates_args=())
def _ring_attention_backward(
    grad_BTNH: Tensor,
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    out_BTNH: Tensor,
    lse_BTN: Tensor,
    offsets: Tensor,
    spans: Tensor,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    ring = _Ring(group_name)
    held = torch.stack((k_BTKH, v_BTKH))
    arriving = ring.shift(held, _KEYS)
    grad_BTNH = grad_BTNH.contiguous()
    whole = Part(out_BTNH, lse_BTN)
    own = attend_segments_backward(grad_BTNH, q_BTNH, k_BTKH, v_BTKH, whole, offsets)
    grad_q = own.q_BTNH.float()
    grad_own = torch.stack((own.k_BSKH, own.v_BSKH)).float()
    others: Callable[[], Tensor] | None = None
    for step, rows in enumerate(spans.tolist()):
        if step:
            held = arriving()
        if 0 < step < ring.size - 1:
            arriving = ring.shift(held, _KEYS)
        grad_held = torch.zeros_like(grad_own) if step else grad_own
        for at, queries, keys in _rectangles(rows):
            grad, q, out, lse = (x[at, queries] for x in (grad_BTNH, q_BTNH, out_BTNH, lse_BTN))
            k, v = held[:, at, keys]
            part = attend_rectangle_backward(grad, q, k, v, Part(out, lse))
            _add(part, grad_q[at, queries], grad_held[:, at, keys])
        if step:
            # The gradients follow the keys one step behind; the rank that computed last sends them home.
            if others:
                grad_held += others()
            others = ring.shift(grad_held, _GRADIENTS)
    if others:
        grad_own += others()
    grad_k, grad_v = (grad.to(k_BTKH.dtype, copy=True) for grad in grad_own)  # an operator's results share no memory
    return grad_q.to(q_BTNH.dtype), grad_k, grad_v


@_ring_attention_backward.register_fake
def _(
    grad_BTNH: Tensor,
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    out_BTNH: Tensor,
    lse_BTN: Tensor,
    offsets: Tensor,
    spans: Tensor,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=contiguous) for x in (q_BTNH, k_BTKH, v_BTKH))
    return grad_q, grad_k, grad_v


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, offsets, spans, ctx.group_name = inputs
    ctx.save_for_backward(q, k, v, *output, offsets, spans)


def _backward(ctx, grad_BTNH, _grad_lse):  # type: ignore[no-untyped-def]
    grads = _ring_attention_backward(grad_BTNH, *ctx.saved_tensors, ctx.group_name)
    return *grads, None, None, None


ring_attention.register_autograd(_backward, setup_context=_save_for_backward)

RING_OP = torch.ops.ternlm.ring_attention.default
"""What selective recompute keeps: running it again would send the keys and values again."""


class _Ring:
    """A group's ranks as a ring: each sends to the next and receives from the one before."""

    def __init__(self, group_name: str) -> None:
        self.group: ProcessGroup = _resolve_process_group(group_name)  # type: ignore[arg-type]
        self.size = self.group.size()
        self.rank = self.group.rank()

    def shift(self, tensor: Tensor, tag: int) -> Callable[[], Tensor]:
        """Begin to send a tensor to the next rank; what is returned waits for the one before's, and returns it."""
        if self.size == 1:
            return lambda: tensor
        received = torch.empty_like(tensor)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        with exchange("send", "context"):
            works = dist.batch_isend_irecv(
                [
                    P2POp(dist.isend, tensor, group=self.group, tag=tag, group_peer=after),
                    P2POp(dist.irecv, received, group=self.group, tag=tag, group_peer=before),
                ]
            )

        def wait() -> Tensor:
            with exchange("send", "context"):
                for work in works:
                    work.wait()
            return received

        return wait


def _rectangles(rows: list[list[int]]) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the batch rows, queries and keys of a step's rectangles, equal neighbours as one."""
    first = 0
    for (query, query_end, key, key_end), same in groupby(rows):
        count = len(list(same))
        if query_end > query:
            yield slice(first, first + count), slice(query, query_end), slice(key, key_end)
        first += count


def _add(part: Gradients, grad_q: Tensor, grad_kv: Tensor) -> None:
    grad_q += part.q_BTNH
    grad_kv[0] += part.k_BSKH
    grad_kv[1] += part.v_BSKH
