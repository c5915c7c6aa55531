"""The norm of the whole gradient, and clipping by it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm over all gradients: a scalar, not yet read back from the device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients, in place, so that their norm is at most `max_norm`; 0 leaves them as they are."""
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)
