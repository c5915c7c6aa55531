"""Attention of some queries over some of their keys, with what it takes to add up the parts afterwards.

The pieces of ring attention (`ternlm.parallel.ring`), each forward and backward without autograd. A part's output is
normalised over its own keys only; its log-sum-exp says how much it weighs among the others (`merge_`). A part's
backward takes the output and log-sum-exp over all keys, and gives that part's share of the gradients.

On a CPU these are PyTorch's flash kernels, on CUDA its flash kernels for half precision; else plain matrix products
that hold the scores. Nothing here sends anything. The CUDA calls were only held to their signatures so far (on fake
tensors): `pytest -m gpu tests/ops/test_tiles.py` compares their results with a CPU's.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G query heads of each, H head dim,
P = B * T.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ternlm.ops.attention import has_fused_kernel, segment_mask


class Part(NamedTuple):
    """Attention over some of the keys."""

    out_BTNH: Tensor
    lse_BTN: Tensor
    """Log of the sum of the exponentials of the scaled scores; float32."""


class Gradients(NamedTuple):
    """Of one part's queries, keys and values."""

    q_BTNH: Tensor
    k_BSKH: Tensor
    v_BSKH: Tensor


def merge_(whole: Part, part: Part) -> None:
    """Add to `whole`, in place, what its queries see in `part`; both may be views."""
    difference = part.lse_BTN - whole.lse_BTN
    whole.out_BTNH.lerp_(part.out_BTNH.to(whole.out_BTNH.dtype), difference.sigmoid()[..., None])
    whole.lse_BTN.add_(F.softplus(difference))


def attend_rectangle(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> Part:
    """Let every query see every key."""
    if q_BTNH.device.type == "cpu":
        q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
        out, lse_BNT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False)
        return Part(out.transpose(1, 2), lse_BNT.transpose(1, 2))
    if not _has_flash(q_BTNH):
        return attend_plainly(q_BTNH, k_BSKH, v_BSKH)
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    out, lse_BNT, *_ = torch.ops.aten._flash_attention_forward(
        q_BTNH, k_BSKH, v_BSKH, None, None, T, S, 0.0, False, return_debug_mask=False
    )
    return Part(out, lse_BNT.transpose(1, 2))


def attend_rectangle_backward(
    grad_BTNH: Tensor, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, whole: Part
) -> Gradients:
    """Return the gradients of `attend_rectangle` as a part of `whole`."""
    out_BTNH, lse_BTN = whole
    if q_BTNH.device.type == "cpu":
        inputs = (x.transpose(1, 2) for x in (grad_BTNH, q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BTN))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, False)
        return Gradients(*(grad.transpose(1, 2) for grad in grads))
    if not _has_flash(q_BTNH):
        return attend_plainly_backward(grad_BTNH, q_BTNH, k_BSKH, v_BSKH, whole)
    lse_BNT = lse_BTN.transpose(1, 2).contiguous()
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    return _flash_backward(grad_BTNH, q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT, None, T, S, causal=False)


def attend_segments(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, offsets: Tensor) -> Part:
    """Let every query see the keys up to its own inside its segment (`ops.attention.segment_attention`)."""
    B, T, N, _ = q_BTNH.shape
    if q_BTNH.device.type == "cpu":
        out, lse_PN = torch.ops.ternlm.segment_attention(q_BTNH, k_BTKH, v_BTKH, offsets)
        return Part(out, lse_PN.view(B, T, N))
    if not _has_flash(q_BTNH):
        return attend_plainly(q_BTNH, k_BTKH, v_BTKH, segment_mask(offsets, B, T))
    q, k, v = (x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH))
    out, lse_NP, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, T, T, 0.0, True, return_debug_mask=False
    )
    return Part(out.view(q_BTNH.shape), lse_NP.T.reshape(B, T, N))


def attend_segments_backward(
    grad_BTNH: Tensor, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, whole: Part, offsets: Tensor
) -> Gradients:
    """Return the gradients of `attend_segments` as a part of `whole`."""
    B, T = q_BTNH.shape[:2]
    out_BTNH, lse_BTN = whole
    if q_BTNH.device.type == "cpu":
        inputs = (grad_BTNH, q_BTNH, k_BTKH, v_BTKH, out_BTNH, lse_BTN.flatten(0, 1))
        return Gradients(*torch.ops.ternlm.segment_attention_backward(*inputs, offsets))
    if not _has_flash(q_BTNH):
        return attend_plainly_backward(grad_BTNH, q_BTNH, k_BTKH, v_BTKH, whole, segment_mask(offsets, B, T))
    lse_NP = lse_BTN.flatten(0, 1).T.contiguous()
    grad, q, k, v, out = (x.flatten(0, 1) for x in (grad_BTNH, q_BTNH, k_BTKH, v_BTKH, out_BTNH))
    grads = _flash_backward(grad, q, k, v, out, lse_NP, offsets, T, T, causal=True)
    return Gradients(*(grad.unflatten(0, (B, T)) for grad in grads))


def attend_plainly(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor | None = None) -> Part:
    """Attend by matrix products in float32 that hold the scores, B x N x T x S: any device and dtype."""
    scores_BKGTS = _scores(q_BTNH, k_BSKH, mask_BTS)
    lse_BKGT = scores_BKGTS.logsumexp(-1)
    weights_BKGTS = (scores_BKGTS - lse_BKGT[..., None]).exp()
    out = torch.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH.float())
    return Part(out.flatten(2, 3).to(q_BTNH.dtype), lse_BKGT.flatten(1, 2).transpose(1, 2))


def attend_plainly_backward(
    grad_BTNH: Tensor,
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    whole: Part,
    mask_BTS: Tensor | None = None,
) -> Gradients:
    """Return the gradients of `attend_plainly` as a part of `whole`."""
    groups = (k_BSKH.shape[2], -1)
    grad, q, out = (x.float().unflatten(2, groups) for x in (grad_BTNH, q_BTNH, whole.out_BTNH))
    k, v = k_BSKH.float(), v_BSKH.float()
    lse_BKGT = whole.lse_BTN.transpose(1, 2).unflatten(1, groups)
    weights_BKGTS = (_scores(q_BTNH, k_BSKH, mask_BTS) - lse_BKGT[..., None]).exp()
    inner_BKGT = (grad * out).sum(-1).permute(0, 2, 3, 1)
    grad_scores = weights_BKGTS * (torch.einsum("btkgh,bskh->bkgts", grad, v) - inner_BKGT[..., None])
    grad_scores *= 1 / math.sqrt(q_BTNH.shape[-1])
    return Gradients(
        torch.einsum("bkgts,bskh->btkgh", grad_scores, k).flatten(2, 3).to(q_BTNH.dtype),
        torch.einsum("bkgts,btkgh->bskh", grad_scores, q).to(k_BSKH.dtype),
        torch.einsum("bkgts,btkgh->bskh", weights_BKGTS, grad).to(v_BSKH.dtype),
    )


def _scores(q_BTNH: Tensor, k_BSKH: Tensor, mask_BTS: Tensor | None) -> Tensor:
    q = q_BTNH.float().unflatten(2, (k_BSKH.shape[2], -1))
    scores = torch.einsum("btkgh,bskh->bkgts", q, k_BSKH.float()) / math.sqrt(q.shape[-1])
    if mask_BTS is not None:
        scores.masked_fill_(~mask_BTS[:, None, None], -math.inf)
    return scores


def _has_flash(q: Tensor) -> bool:
    return q.dtype != torch.float32 and has_fused_kernel(q.device)


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    T: int,
    S: int,
    causal: bool,
) -> Gradients:
    """Run the flash kernel's backward on CUDA; no dropout, so that the state of its random numbers is never read."""
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
    nothing = torch.empty(0, device=q.device)
    return Gradients(
        *torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, offsets, offsets, T, S, 0.0, causal, unused, nothing
        )
    )
