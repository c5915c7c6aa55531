"""The norm of the whole gradient, and its division and clipping in one pass."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm over all gradients: a scalar, not yet read back from the device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def scale_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, divisor: float, max_norm: float) -> None:
    """Divide the gradients, in place, then scale them so that their norm is at most `max_norm`; 0: no limit.

    norm: of the divided gradients.
    """
    factor = torch.full_like(norm, 1 / divisor)
    if max_norm:
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
