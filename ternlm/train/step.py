"""One optimizer step: gradients of the global batch's mean loss, then a guarded update."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ternlm.data.batch import Batch
from ternlm.model.decoder import CausalLM
from ternlm.ops.attention import make_segment_attend
from ternlm.optim.clip import clip_gradients, gradient_norm
from ternlm.train.objective import Loss, LossFn


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one global batch, read back to the host."""

    mean: float
    """Objective per trained token."""
    count: float
    """Trained tokens."""
    metrics: dict[str, list[float]]
    """The loss function's sums over the batch, by data type."""


def forward_loss(model: CausalLM, loss_fn: LossFn, batch: Batch, device: torch.device) -> Loss:
    """Compute one microbatch's loss on `device`."""
    batch = batch.to(device, non_blocking=True)
    attend = make_segment_attend(batch.lengths, device)
    hidden_BTD = model(batch.tokens_BT, batch.positions_BT, attend)
    return loss_fn(model.lm_head, hidden_BTD, batch)


def accumulate_gradients(
    model: CausalLM,
    loss_fn: LossFn,
    microbatches: Sequence[Batch],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    scale: float = 1.0,
) -> BatchLoss:
    """Add to the gradients those of the global batch's mean loss, times `scale`.

    The mean is over all microbatches' trained tokens, so that accumulating equals one big batch.
    """
    count = sum(float(batch.weights_BT.sum()) for batch in microbatches)
    losses = []
    for batch in microbatches:
        with autocast():
            loss = forward_loss(model, loss_fn, batch, device)
        (loss.total * (scale / max(count, 1.0))).backward()
        losses.append(Loss(loss.total.detach(), loss.tokens, loss.metrics))
    return read_losses(losses)


def read_losses(losses: Sequence[Loss]) -> BatchLoss:
    """Add up microbatches' losses and read them back from the device, once."""
    count = float(torch.stack([loss.tokens for loss in losses]).sum())
    total = float(torch.stack([loss.total.double() for loss in losses]).sum())
    sums = {name: sum_all([loss.metrics[name] for loss in losses]).tolist() for name in losses[0].metrics}
    return BatchLoss(total / max(count, 1.0), count, sums)


def sum_all(tensors: Sequence[Tensor]) -> Tensor:
    """Add tensors of one shape."""
    return torch.stack(list(tensors)).sum(0)


def update_weights(
    model: CausalLM, optimizers: Sequence[Optimizer], clip_norm: float, scale: float = 1.0, apply: bool = True
) -> float:
    """Unscale, measure, clip and apply the gradients, then clear them; return their norm.

    Where the norm isn't finite, or `apply` is false, the weights stay as they are.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    if scale != 1.0:
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], scale)
    norm = gradient_norm(parameters)
    value = float(norm)
    if apply and torch.isfinite(norm):
        clip_gradients(parameters, norm, clip_norm)
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return value
