"""What is minimised: `loss_fn(head, hidden, batch) -> Loss`. Pretraining's next-token loss is the one made here.

A loss is a total and a number of tokens, so that the mean stays right under accumulation, packing and unequal ranks.

Shapes: B batch, T tokens, D hidden, C data types (sources).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ternlm.config.training import LossConfig
from ternlm.data.batch import Batch
from ternlm.model.decoder import Head
from ternlm.ops.loss import chunked_cross_entropy


class Loss(NamedTuple):
    """One microbatch's loss."""

    total: Tensor
    """Sum over the trained tokens; a differentiable scalar."""
    tokens: Tensor
    """What the total is to be divided by, over the whole global batch: a scalar."""
    metrics: dict[str, Tensor]
    """Sums that add up over microbatches, each (C,), by data type."""


LossFn = Callable[[Head, Tensor, Batch], Loss]


def next_token_loss(config: LossConfig, token_bytes: Tensor | None = None) -> LossFn:
    """Make the loss of pretraining: cross entropy of the next token inside each document.

    token_bytes: (vocabulary,) UTF-8 bytes that each id stands for, on the batches' device, for bits per byte.
    Metrics: nll (nats, without smoothing or z-loss), tokens, correct and, with token_bytes, bytes.
    """

    def loss_fn(head: Head, hidden_BTD: Tensor, batch: Batch) -> Loss:
        losses = head(
            hidden_BTD.flatten(0, 1),
            partial(
                chunked_cross_entropy,
                targets_N=batch.targets_BT.flatten(),
                weights_N=batch.weights_BT.flatten(),
                chunk_tokens=config.chunk_tokens or chunk_tokens(head.out_features, hidden_BTD.device),
                label_smoothing=config.label_smoothing,
                z_loss=config.z_loss,
            ),
        )
        counted_BT = batch.weights_BT != 0
        sums = {
            "nll": losses.nll_N.view_as(counted_BT),
            "tokens": counted_BT,
            "correct": losses.correct_N.view_as(counted_BT),
        }
        if token_bytes is not None:
            sums["bytes"] = token_bytes[batch.targets_BT] * counted_BT
        metrics = {name: _by_type(values, batch) for name, values in sums.items()}
        return Loss(losses.total, batch.weights_BT.sum(), metrics)

    return loss_fn


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Return how many tokens' logits to hold: enough for fast products, few enough to matter little in memory.

    At vocabulary 103168 and 2048 tokens on a CPU, 256 tokens at a time took 0.57 GiB less than 1024, as fast.
    """
    num_bytes = 2**27 if device.type == "cpu" else 2**30
    return max(num_bytes // (4 * vocab_size), 64)


def _by_type(values_BT: Tensor, batch: Batch) -> Tensor:
    sums = torch.zeros(len(batch.names), dtype=torch.float64, device=values_BT.device)
    return sums.index_add_(0, batch.types_B, values_BT.sum(1, dtype=torch.float64))
