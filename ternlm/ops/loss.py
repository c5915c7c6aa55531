"""Cross entropy with the head in chunks: the N x V logits never exist whole.

The gradients of the hidden states and of the head's weight are made in the forward, chunk by chunk, while the
chunk's logits are at hand; the backward only scales them. A checkpointed chunk was measured 20% slower.

Shapes: N tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ROWS = 16


class VocabShard(NamedTuple):
    """Which rows of the head's weight are here, where they are cut over ranks, and how to ask the others.

    Gradients of the hidden states are then this shard's part of a sum over the ranks.
    """

    first: int
    """Id of the first row here."""
    total: int
    """Vocabulary of all ranks together."""
    all_max: Callable[[Tensor], Tensor]
    """Greatest of each element over the ranks; may work in place."""
    all_sum: Callable[[Tensor], Tensor]
    """Sum of each element over the ranks; may work in place."""


class TokenLosses(NamedTuple):
    """What `chunked_cross_entropy` returns."""

    total: Tensor
    """Weighted sum of the objective over the tokens; differentiable scalar, float32."""
    nll_N: Tensor
    """Negative log-likelihood of each target (nats), without smoothing or z-loss; 0 where the weight is 0."""
    correct_N: Tensor
    """Whether the likeliest token is the target; False where the weight is 0."""


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    chunk_tokens: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab: VocabShard | None = None,
) -> TokenLosses:
    """Sum the weighted cross entropy of `hidden @ weight.T` against the targets.

    Per token: (1 - s) nll + s (lse - mean logit) + z lse^2, with lse the log of the softmax's normaliser.
    Matrix products run in hidden's dtype, everything else in float32. Tokens of weight 0 cost nothing on a CPU.
    vocab: given where weight_VD holds a part of the vocabulary; every rank of it must then call this.
    """
    if not torch.is_grad_enabled():  # a Function can't see that, and would make gradients for nobody
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    if hidden_ND.device.type != "cpu" or bool(weights_N.all()):
        return TokenLosses(
            *_ChunkedCrossEntropy.apply(
                hidden_ND, weight_VD, targets_N, weights_N, chunk_tokens, label_smoothing, z_loss, vocab
            )
        )
    kept = _kept(weights_N)
    total, nll, correct = _ChunkedCrossEntropy.apply(
        hidden_ND[kept], weight_VD, targets_N[kept], weights_N[kept], chunk_tokens, label_smoothing, z_loss, vocab
    )
    nll_N = nll.new_zeros(targets_N.shape).index_copy_(0, kept, nll)
    correct_N = correct.new_zeros(targets_N.shape).index_copy_(0, kept, correct)
    return TokenLosses(total, nll_N, correct_N)


def _kept(weights_N: Tensor) -> Tensor:
    """Return which tokens have a weight, and some that have none, so that few different numbers of them occur.

    A CPU's bfloat16 products keep code and buffers for some shapes that they have met, as many as `ternlm/__init__.py`
    says: a shape for each number of trained tokens would leave no room for the others.
    """
    kept = weights_N.nonzero().squeeze(1)
    spare = -len(kept) % _ROWS
    return torch.cat((kept, (weights_N == 0).nonzero().squeeze(1)[:spare])) if spare else kept


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        chunk_tokens: int,
        smoothing: float,
        z_loss: float,
        vocab: VocabShard | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        head_VD = weight_VD.detach().to(hidden_ND.dtype)
        grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        nll_N = hidden_ND.new_zeros(targets_N.shape, dtype=torch.float32)
        correct_N = torch.zeros_like(targets_N, dtype=torch.bool)
        for start in range(0, len(targets_N), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden, targets, weights = hidden_ND[rows].detach(), targets_N[rows], weights_N[rows]
            logits = (hidden @ head_VD.T).float()
            own, here = _own_targets(targets, logits.shape[1], vocab)
            facts, exps = _softmax_(logits, own, here, bool(smoothing), vocab)
            lse = facts.highest + facts.sums.log()
            nll = lse - facts.target_logits
            loss = nll
            if facts.mean_logits is not None:
                loss = (1 - smoothing) * nll + smoothing * (lse - facts.mean_logits)
            if z_loss:
                loss = loss + z_loss * lse.square()
            total += (weights * loss).sum()
            nll_N[rows] = nll * (weights != 0)
            correct_N[rows] = (facts.best == targets) & (weights != 0)
            if not (wants_hidden or wants_weight):
                continue
            scale = weights * (1 + 2 * z_loss * lse)
            grad = exps.mul_((scale / facts.sums)[:, None])
            if smoothing:
                grad.sub_((weights * (smoothing / (vocab.total if vocab else grad.shape[1])))[:, None])
            grad.scatter_add_(1, own[:, None], (-(1 - smoothing) * weights * here)[:, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head_VD, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product_(grad_weight, grad.T, hidden)
            del logits, exps, grad  # else they lived on while the next chunk's are made
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll_N, correct_N)
        return total, nll_N, correct_N

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            # In float32: a factor rounded to bfloat16 would be off by up to 0.4% for every token alike.
            grad_hidden = (grad_hidden.float() * grad_total).to(grad_hidden.dtype)
        if grad_weight is not None:
            # In place: the buffer is this function's own, and a second V x D copy would double the peak.
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _Facts(NamedTuple):
    """What the loss needs of a chunk's logits, over the whole vocabulary; each (n,)."""

    highest: Tensor
    sums: Tensor
    """Of exp(logit - highest)."""
    target_logits: Tensor
    mean_logits: Tensor | None
    best: Tensor
    """Id of the first of the greatest logits."""


def _own_targets(targets: Tensor, rows: int, vocab: VocabShard | None) -> tuple[Tensor, Tensor | float]:
    """Return the targets as rows of the weight here, and whether each is here (1) or on another rank (0)."""
    if vocab is None:
        return targets, 1.0
    own = targets - vocab.first
    here = (own >= 0) & (own < rows)
    return own.masked_fill(~here, 0), here.float()


def _softmax_(
    logits: Tensor, own: Tensor, here: Tensor | float, wants_mean: bool, vocab: VocabShard | None
) -> tuple[_Facts, Tensor]:
    """Turn logits into exp(logit - highest), in place: at V of 100,000 a pass over them costs as much as a product."""
    target_logits = logits.gather(1, own[:, None]).squeeze(1) * here
    mean = logits.mean(1) if wants_mean else None
    highest, best = logits.max(1)
    if vocab is not None:
        local = highest
        highest = vocab.all_max(local.clone())
        # The first of equals, as on one rank: the smallest id among the ranks that have the maximum.
        ids = torch.where(local == highest, best + vocab.first, vocab.total)
        best = -vocab.all_max(-ids)
    exps = logits.sub_(highest[:, None]).exp_()
    sums = exps.sum(1)
    if vocab is not None:
        parts = [sums, target_logits] + ([mean * exps.shape[1]] if mean is not None else [])
        sums, target_logits, *logit_sums = vocab.all_sum(torch.stack(parts)).unbind()
        mean = logit_sums[0] / vocab.total if logit_sums else None
    return _Facts(highest, sums, target_logits, mean, best), exps


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to a float32 buffer in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
