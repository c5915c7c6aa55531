"""Collectives that gradients flow through, for tensor and sequence parallelism (arXiv 1909.08053, 2205.05198).

Each forward's transpose is its backward. Functional collectives, so that a compiled block holds them in its graph.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional


def copy_to_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return x as it is; its gradient is summed over the ranks, each of which used x for its part."""
    return _Copy.apply(x, group)


def sum_over_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of the ranks' partial x; the gradient passes as it is."""
    return _Sum.apply(x, group)


def gather_sequence(x_BTD: Tensor, group: ProcessGroup) -> Tensor:
    """Join the ranks' parts of the sequence (dim 1); the gradient is summed and cut again."""
    return _Gather.apply(x_BTD, group)


def scatter_sequence(x_BTD: Tensor, group: ProcessGroup) -> Tensor:
    """Sum the ranks' partial x and keep this rank's part of the sequence (dim 1); the gradient is gathered."""
    return _Scatter.apply(x_BTD, group)


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    return functional.wait_tensor(functional.all_gather_tensor(x.contiguous(), 1, group))


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    return functional.wait_tensor(functional.reduce_scatter_tensor(x.contiguous(), "sum", 1, group))


def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x_BTD, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x_BTD, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None
