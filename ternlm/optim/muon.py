"""Muon: momentum whose matrix is orthogonalised before it is applied (Jordan et al., 2024).

PyTorch's own Muon always iterates in bfloat16, which a CPU without it computes 9 times slower than float32;
here the dtype is the device's choice. The update is scaled by sqrt(max(1, rows / columns)).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Quintic whose iteration drives every singular value close to 1, from the method's publication.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(Optimizer):
    """Update matrices by their orthogonalised Nesterov momentum; decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
        join: Callable[[Tensor, Tensor], tuple[Tensor, tuple[slice, ...]]] | None = None,
    ) -> None:
        """Take the matrices and their settings.

        join: where matrices are cut over ranks, `(parameter, direction) -> (the whole matrix's direction, where the
        parameter's part lies in it)`; a collective.
        """
        self._join = join
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer, momentum = state["momentum_buffer"], group["momentum"]
        buffer.lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(buffer, momentum)
        whole, part = self._join(parameter, direction) if self._join else (direction, (slice(None),))
        update = orthogonalise(whole, group["iterations"])[part]
        rows, columns = whole.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrix, roughly: singular values between 0.7 and 1.2."""
    dtype = torch.bfloat16 if matrix.is_cuda else torch.float32
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.T if tall else x).to(matrix.dtype)
