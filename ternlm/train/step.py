"""One optimizer step: gradients of the global batch's mean loss, then a guarded update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer
from torch.profiler import record_function

from ternlm.data.batch import Batch
from ternlm.optim.clip import gradient_norm, scale_gradients
from ternlm.parallel.mesh import Mesh
from ternlm.parallel.pieces import Piece, clear_gradients, gather_updates, reduce_gradients
from ternlm.parallel.spans import OPTIMIZER
from ternlm.train.distributed import Autocast, LaidOut
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


def accumulate_gradients(
    laid_out: LaidOut, loss_fn: LossFn, microbatches: Sequence[Batch], autocast: Autocast, scale: float = 1.0
) -> BatchLoss:
    """Add to the gradients those of the global batch's mean loss, times the result's `divisor`.

    The mean is over what the loss function counted in all microbatches of all ranks, so that accumulating equals one
    big batch; the count is known only after the last of them, and `update_weights` divides by it.
    Collective: every rank must call it, with its share of the batch.
    """
    # Sums over thousands of tokens would leave float16's range, so a constant of their size divides them at once.
    constant = scale / max(sum(batch.tokens_BT.numel() for batch in microbatches), 1)
    losses = laid_out.backward(microbatches, loss_fn, autocast, constant)
    return read_losses(losses, laid_out, len(microbatches[0].names), constant)


def read_losses(losses: Sequence[Loss], laid_out: LaidOut, num_types: int, constant: float = 1.0) -> BatchLoss:
    """Add up microbatches' losses over all ranks and read them back from the device.

    losses: empty on ranks of a pipeline without the last stage. num_types: of data, the length of each metric.
    constant: what their totals were multiplied with before backward. Collective: every rank must call it.
    """
    mesh, names = laid_out.mesh, laid_out.metric_names(losses, num_types)
    own = [0.0] * (2 + len(names) * num_types)
    if losses and mesh.place.tensor == 0:  # the other tensor ranks have the same losses
        parts = [[loss.tokens, loss.total, *(loss.metrics[name] for name in names)] for loss in losses]
        own = torch.stack([torch.cat([value.double().flatten() for value in part]) for part in parts]).sum(0).tolist()
    count, total, *rest = mesh.add_up(own)
    sums = {name: rest[i * num_types : (i + 1) * num_types] for i, name in enumerate(names)}
    return BatchLoss(total / max(count, 1.0), count, constant * count, sums)


def update_weights(
    pieces: Sequence[Piece],
    optimizers: Sequence[Optimizer],
    mesh: Mesh,
    clip_norm: float,
    divisor: float = 1.0,
    apply: bool = True,
) -> float:
    """Sum over ranks, divide, clip and apply the gradients, then clear them; return the norm of the divided ones.

    Where the norm isn't finite, or `apply` is false, the weights stay as they are. Collective.
    """
    reduce_gradients(pieces, mesh)
    with record_function(OPTIMIZER):
        norm = gradient_norm(pieces, mesh) / divisor
        value = float(norm)
        applied = apply and math.isfinite(value)
        if applied:
            scale_gradients(pieces, norm, divisor, clip_norm)
            for optimizer in optimizers:
                optimizer.step()
    if applied:
        gather_updates(pieces, mesh)
    clear_gradients(pieces)
    return value
