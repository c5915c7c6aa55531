"""Weights in 4 bits: NormalFloat, the quantiles of a normal distribution, scaled in blocks (arXiv 2305.14314).

Plain PyTorch, on any device. A product makes the weights it needs anew, forward and backward; nothing else is kept.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The 16 levels of the publication's appendix E, as float32.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4:
    """A matrix in 4 bits a weight, and a float32 scale for each block of neighbours in a row-major order."""

    codes: Tensor
    """uint8, two levels a byte, the first in the high bits."""
    scales: Tensor
    """Of each block, float32."""
    shape: tuple[int, int]
    block_size: int

    @classmethod
    def empty(cls, shape: tuple[int, int], block_size: int, device: torch.device) -> "NF4":
        """Return one that holds anything."""
        blocks = -(-shape[0] * shape[1] // block_size)
        codes = torch.empty(-(-blocks * block_size // 2), dtype=torch.uint8, device=device)
        return cls(codes, torch.empty(blocks, dtype=torch.float32, device=device), shape, block_size)

    @classmethod
    def quantize(cls, weight: Tensor, block_size: int) -> "NF4":
        """Return the nearest that 4 bits hold; a block's greatest weight is kept exactly, zeros too."""
        flat = weight.detach().float().flatten()
        blocks = -(-flat.numel() // block_size)
        flat = F.pad(flat, (0, blocks * block_size + blocks * block_size % 2 - flat.numel()))
        rows = flat[: blocks * block_size].view(blocks, block_size)
        scales = rows.abs().amax(1)
        levels = torch.tensor(LEVELS, device=flat.device)
        between = (levels[1:] + levels[:-1]) / 2
        shares = torch.where(scales[:, None] > 0, rows / scales[:, None], 0.0).flatten()
        indices = F.pad(torch.bucketize(shares, between), (0, len(flat) - len(shares))).to(torch.uint8)
        return cls(indices[::2] << 4 | indices[1::2], scales, (weight.shape[0], weight.shape[1]), block_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix."""
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=self.codes.device)
        pairs = torch.cartesian_prod(levels, levels)  # of every byte
        values = pairs[self.codes.int()].flatten()[: len(self.scales) * self.block_size]
        flat = (values.view(-1, self.block_size) * self.scales[:, None]).flatten()
        return flat[: self.shape[0] * self.shape[1]].view(self.shape).to(dtype)

    def fill(self, weight: Tensor) -> None:
        """Take another matrix's values, in place."""
        other = NF4.quantize(weight, self.block_size)
        self.codes.copy_(other.codes)
        self.scales.copy_(other.scales)

    def moved(self, device: torch.device) -> "NF4":
        """Return this on a device; from the meta device it holds anything."""
        if self.codes.device == device:
            return self
        if self.codes.is_meta:
            return NF4.empty(self.shape, self.block_size, device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    @property
    def num_bytes(self) -> int:
        """Memory of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def nf4_linear(x: Tensor, weight: NF4) -> Tensor:
    """Return `x W.T`; gradients reach x alone."""
    return _NF4Linear.apply(x, weight.codes, weight.scales, weight.shape, weight.block_size)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int], block_size: int) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape, ctx.block_size = shape, block_size
        return F.linear(x, NF4(codes, scales, shape, block_size).dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        weight = NF4(codes, scales, ctx.shape, ctx.block_size).dequantize(grad.dtype)
        return grad @ weight, None, None, None, None
