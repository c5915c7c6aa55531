"""Context parallelism: ranks that share each sequence, as an `attend` and the choice of who holds which tokens.

The model runs on a rank's own tokens; only attention looks at the others'. Two ways: "ring" sends keys and values
round (`ternlm.parallel.ring`), "all_to_all" gives each rank some of the heads of whole sequences (arXiv 2309.14509).
Cutting a batch, summing losses and gradients are the caller's.

Shapes: B batch, T query tokens of this rank, N query heads, K key/value heads, H head dim; c ranks, W = c * T.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional

from ternlm.ops.attention import Attend, make_segment_attend
from ternlm.parallel.ring import own_segments, ring_attention, ring_spans

Method = Literal["ring", "all_to_all"]


def context_index(seq_len: int, degree: int, rank: int, method: Method) -> Tensor:
    """Return which tokens of each sequence a rank holds, in the order in which it holds them: (seq_len / degree,).

    ring: an early and a late part, so that all ranks have equally many scores; all_to_all: consecutive tokens.
    """
    parts = 2 * degree if method == "ring" else degree  # `resolve_layout` has checked that they divide
    chunks = torch.arange(seq_len).view(parts, -1)
    return chunks[[rank, parts - 1 - rank]].flatten() if method == "ring" else chunks[rank]


def make_context_attend(
    lengths: Sequence[Sequence[int]], device: torch.device, group: ProcessGroup, method: Method
) -> Attend:
    """Build the `attend` of one microbatch whose sequences the ranks of `group` share.

    lengths: per row, the lengths (tokens) of the segments of the whole sequence, the same on every rank. What is
    attended to are this rank's tokens (`context_index`), q and k rotated by their positions in the whole.
    Collective over `group`: every rank must call the result, and its backward.
    """
    if method == "all_to_all":
        return partial(_attend_all_to_all, make_segment_attend(lengths, device), group)
    degree, rank = group.size(), group.rank()
    offsets = torch.tensor(own_segments(lengths, degree, rank), dtype=torch.int32)
    offsets = offsets.to(device, non_blocking=True)
    # As in ops.attention: a compiled block is to serve all microbatches, whatever their number of segments.
    torch._dynamo.maybe_mark_dynamic(offsets, 0)
    spans = torch.tensor(ring_spans(lengths, degree, rank), dtype=torch.int32)
    return partial(_attend_ring, offsets, spans, group.group_name)


def _attend_ring(
    offsets: Tensor, spans: Tensor, group_name: str, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int
) -> Tensor:
    out_BTNH, _ = ring_attention(q_BTNH, k_BTKH, v_BTKH, offsets, spans, group_name)
    return out_BTNH


def _attend_all_to_all(
    attend: Attend, group: ProcessGroup, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int
) -> Tensor:
    c = group.size()
    # One message for all three: each rank is sent its heads of q, of k and of v.
    parts = [x.unflatten(2, (c, -1)) for x in (q_BTNH, k_BTKH, v_BTKH)]
    sizes = [part.shape[3] for part in parts]
    sent = torch.cat(parts, 3).movedim(2, 0).contiguous()
    whole = _Exchange.apply(sent, group).movedim(0, 1).flatten(1, 2)
    q_BWNH, k_BWKH, v_BWKH = whole.split(sizes, 2)
    out_BWNH = attend(q_BWNH, k_BWKH, v_BWKH, layer)
    back = out_BWNH.unflatten(1, (c, -1)).movedim(1, 0).contiguous()
    return _Exchange.apply(back, group).movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """Send part i of the first dimension to rank i; which is its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return functional.wait_tensor(functional.all_to_all_single(x, None, None, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return functional.wait_tensor(functional.all_to_all_single(grad.contiguous(), None, None, ctx.group)), None
