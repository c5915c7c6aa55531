"""One optimizer step: gradients of the global batch's mean loss, then a guarded update."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from ternlm.data.batch import Batch
from ternlm.model.decoder import CausalLM
from ternlm.ops.attention import make_segment_attend
from ternlm.optim.clip import gradient_norm, scale_gradients
from ternlm.train.objective import Loss, LossFn


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one global batch, read back to the host."""

    mean: float
    """Objective per trained token."""
    count: float
    """What the loss function counted: trained tokens."""
    divisor: float
    """What the gradients are still to be divided by."""
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
    """Add to the gradients those of the global batch's mean loss, times the result's `divisor`.

    The mean is over what the loss function counted in all microbatches, so that accumulating equals one big batch;
    the count is known only after the last of them, and `update_weights` divides by it.
    """
    # Sums over thousands of tokens would leave float16's range, so a constant of their size divides them at once.
    constant = scale / max(sum(batch.tokens_BT.numel() for batch in microbatches), 1)
    losses = []
    for batch in microbatches:
        with autocast():
            loss = forward_loss(model, loss_fn, batch, device)
        (loss.total * constant).backward()
        losses.append(Loss(loss.total.detach(), loss.tokens, loss.metrics))
    return read_losses(losses, constant)


def read_losses(losses: Sequence[Loss], constant: float = 1.0) -> BatchLoss:
    """Add up microbatches' losses and read them back from the device.

    constant: what their totals were multiplied with before backward.
    """
    count = float(torch.stack([loss.tokens for loss in losses]).sum())
    total = float(torch.stack([loss.total.double() for loss in losses]).sum())
    sums = {name: torch.stack([loss.metrics[name] for loss in losses]).sum(0).tolist() for name in losses[0].metrics}
    return BatchLoss(total / max(count, 1.0), count, constant * count, sums)


def update_weights(
    model: CausalLM,
    optimizers: Sequence[Optimizer],
    clip_norm: float,
    divisor: float = 1.0,
    apply: bool = True,
) -> float:
    """Divide, clip and apply the gradients, then clear them; return the norm of the divided ones.

    Where the norm isn't finite, or `apply` is false, the weights stay as they are.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = gradient_norm(parameters) / divisor
    value = float(norm)
    if apply and math.isfinite(value):
        scale_gradients(parameters, norm, divisor, clip_norm)
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return value
