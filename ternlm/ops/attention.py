"""Causal attention over packed segments: tokens attend only inside their own segment.

The `attend` of training. On a CPU it is a loop of flash kernels over
the segments (exact; measured 4 times faster than a block mask); on CUDA it is PyTorch's variable-length kernel.
It is a custom operator, opaque to the compiler, so that a block compiles as one graph whatever the segments.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim, P = B * T.
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""`(q_BTNH, k_BSKH, v_BSKH, layer) -> o_BTNH`, q and k already rotated."""


# torch 2.11 groups the heads without being asked.
_VARLEN_TAKES_GQA = "enable_gqa" in signature(varlen_attn).parameters


def make_segment_attend(lengths: Sequence[Sequence[int]], device: torch.device) -> Attend:
    """Build the `attend` of one microbatch.

    lengths: per row, the lengths (tokens) of its consecutive segments; every row sums to T.
    """
    flat = [length for row in lengths for length in row]
    offsets = torch.tensor([0, *flat], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    offsets = offsets.to(device, non_blocking=True)
    # The number of segments differs between microbatches; a compiled block is to serve them all.
    torch._dynamo.maybe_mark_dynamic(offsets, 0)
    if device.type == "cpu":
        return partial(_attend_cpu, offsets)
    return partial(_attend_fused if has_fused_kernel(device) else _attend_masked, offsets)


def has_fused_kernel(device: torch.device) -> bool:
    """Whether the device has the variable-length kernel, for bfloat16 and float16; else masks are used."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_cpu(offsets: Tensor, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int) -> Tensor:
    out_BTNH, _ = segment_attention(q_BTNH, k_BTKH, v_BTKH, offsets)
    return out_BTNH


def _attend_masked(offsets: Tensor, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int) -> Tensor:
    return masked_attention(q_BTNH, k_BTKH, v_BTKH, offsets)


def _attend_fused(offsets: Tensor, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layer: int) -> Tensor:
    if q_BTNH.dtype == torch.float32:  # the variable-length kernel takes half precision only
        return masked_attention(q_BTNH, k_BTKH, v_BTKH, offsets)
    longest = q_BTNH.shape[1]  # a bound that never changes, where the true one would recompile the block
    attend: Callable[..., Tensor] = partial(varlen_attn, window_size=(-1, 0))  # type: ignore[assignment]
    if k_BTKH.shape[2] != q_BTNH.shape[2] and _VARLEN_TAKES_GQA:
        attend = partial(attend, enable_gqa=True)
    q_PNH, k_PKH, v_PKH = (x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH))
    return attend(q_PNH, k_PKH, v_PKH, offsets, offsets, longest, longest).view(q_BTNH.shape)


def masked_attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, offsets: Tensor) -> Tensor:
    """Attend causally inside segments by a dense mask: any device and dtype, T x T memory; the reference."""
    mask = segment_mask(offsets, *q_BTNH.shape[:2])
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    gqa = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=gqa)
    return out.transpose(1, 2)


def segment_mask(offsets: Tensor, B: int, T: int) -> Tensor:
    """Return whether each token may see each other of its row, (B, T, T): those up to itself in its segment."""
    token = torch.arange(B * T, device=offsets.device)
    segment_BT = torch.bucketize(token, offsets, right=True).view(B, T)
    return (segment_BT[:, :, None] == segment_BT[:, None, :]) & (token[:T, None] >= token[None, :T])


@torch.library.custom_op("ternlm::segment_attention", mutates_args=(), device_types="cpu")
def segment_attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Attend causally inside the segments of the flattened tokens.

    offsets: int32 on the CPU, first 0, last P; segment i is the flattened tokens [offsets[i], offsets[i + 1]).
    Returns the output (as q) and the log-sum-exp of the scores, (P, N), which the backward needs.
    """
    q, k, v = (x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH))
    runs = _equal_runs(offsets)
    if len(runs) == 1:  # segments of one length, such as one document a row: the kernel's output as it is
        shape = runs[0][1]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads_first(x, shape) for x in (q, k, v)), 0.0, True
        )
        lse_PN = lse.transpose(1, 2).flatten(0, 1)
        return out.transpose(1, 2).reshape(q_BTNH.shape), lse_PN.contiguous()
    out_PNH = torch.empty_like(q_BTNH, memory_format=torch.contiguous_format).flatten(0, 1)
    lse_PN = torch.empty(out_PNH.shape[:2], dtype=torch.float32)
    for rows, shape in runs:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads_first(x[rows], shape) for x in (q, k, v)), 0.0, True
        )
        _heads_first(out_PNH[rows], shape).copy_(out)
        lse_PN[rows].view(*shape, -1).copy_(lse.transpose(1, 2))
    return out_PNH.view(q_BTNH.shape), lse_PN


@segment_attention.register_fake
def _(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    B, T, N, _ = q_BTNH.shape
    out = torch.empty_like(q_BTNH, memory_format=torch.contiguous_format)
    return out, q_BTNH.new_empty((B * T, N), dtype=torch.float32)


@torch.library.custom_op("ternlm::segment_attention_backward", mutates_args=(), device_types="cpu")
def _segment_attention_backward(
    grad_BTNH: Tensor,
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    out_BTNH: Tensor,
    lse_PN: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = tuple(x.flatten(0, 1) for x in (grad_BTNH, q_BTNH, k_BTKH, v_BTKH, out_BTNH))
    runs = _equal_runs(offsets)
    if len(runs) == 1:
        shape = runs[0][1]
        lse = lse_PN.view(*shape, -1).transpose(1, 2)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_heads_first(x, shape) for x in inputs), lse, 0.0, True
        )
        grad_q, grad_k, grad_v = (
            part.transpose(1, 2).reshape(x.shape) for part, x in zip(parts, (q_BTNH, k_BTKH, v_BTKH), strict=True)
        )
        return grad_q, grad_k, grad_v
    contiguous = torch.contiguous_format
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=contiguous) for x in (q_BTNH, k_BTKH, v_BTKH))
    for rows, shape in runs:
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_heads_first(x[rows], shape) for x in inputs),
            lse_PN[rows].view(*shape, -1).transpose(1, 2),
            0.0,
            True,
        )
        for whole, part in zip((grad_q, grad_k, grad_v), parts, strict=True):
            _heads_first(whole.flatten(0, 1)[rows], shape).copy_(part)
    return grad_q, grad_k, grad_v


@_segment_attention_backward.register_fake
def _(
    grad_BTNH: Tensor,
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    out_BTNH: Tensor,
    lse_PN: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=contiguous) for x in (q_BTNH, k_BTKH, v_BTKH))
    return grad_q, grad_k, grad_v


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


def _backward(ctx, grad_BTNH, _grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, offsets = ctx.saved_tensors
    return *_segment_attention_backward(grad_BTNH, q, k, v, out, lse, offsets), None


segment_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _equal_runs(offsets: Tensor) -> list[tuple[slice, tuple[int, int]]]:
    """Group consecutive segments of one length: (rows of the flattened tokens, (segments, length))."""
    bounds = offsets.tolist()
    runs: list[tuple[slice, tuple[int, int]]] = []
    first = 0
    for i in range(1, len(bounds)):
        length = bounds[i] - bounds[i - 1]
        ends = i + 1 == len(bounds) or bounds[i + 1] - bounds[i] != length
        if ends:
            if length:
                runs.append((slice(bounds[first], bounds[i]), (i - first, length)))
            first = i
    return runs


def _heads_first(x_PNH: Tensor, shape: tuple[int, int]) -> Tensor:
    """View flattened tokens as (segments, heads, tokens, head dim)."""
    return x_PNH.unflatten(0, shape).transpose(1, 2)


KEPT_OPS = (torch.ops.ternlm.segment_attention.default, torch.ops.torch_attn._varlen_attn.default)
"""Attention operators whose results are worth keeping when a block is recomputed."""
