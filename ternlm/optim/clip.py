"""The norm of the whole gradient, and its division and clipping in one pass."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ternlm.parallel.mesh import Mesh
from ternlm.parallel.pieces import Piece
from ternlm.parallel.spans import exchange


def gradient_norm(pieces: Sequence[Piece], mesh: Mesh) -> Tensor:
    """Return the 2-norm over all gradients of the whole model: a scalar, not yet read back from the device.

    Collective: every rank must call it, after `reduce_gradients`.
    """
    norm = torch.nn.utils.get_total_norm([p.tensor.grad for p in pieces if p.counted and p.tensor.grad is not None])
    if mesh.layout.world == 1:
        return norm
    square = norm.to(mesh.device, torch.float64).square()
    with exchange("all_reduce", "world"):
        dist.all_reduce(square)
    return square.sqrt().float()


def scale_gradients(pieces: Sequence[Piece], norm: Tensor, divisor: float, max_norm: float) -> None:
    """Divide the gradients, in place, then scale them so that their norm is at most `max_norm`; 0: no limit.

    norm: of the divided gradients.
    """
    factor = torch.full_like(norm, 1 / divisor)
    if max_norm:
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([p.tensor.grad for p in pieces if p.tensor.grad is not None], factor)
