"""Linear maps of the blocks: plain, and frozen with a low-rank update beside them (LoRA, DoRA).

What they share is `product`, the map without its bias: tensor parallelism sums it over ranks before the bias is added.

Shapes: D inputs, O outputs, R rank of the update.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.config.adapter import AdapterConfig
from ternlm.ops.nf4 import NF4, nf4_linear

SHORTEST = 1e-12
"""Length that a row of zeros is taken to have, so that DoRA can divide by it."""


class Linear(nn.Linear):
    """`x W.T + b`."""

    def product(self, x_D: Tensor) -> Tensor:
        """Return `x W.T`."""
        return F.linear(x_D, self.weight)

    def forward(self, x_D: Tensor) -> Tensor:
        return F.linear(x_D, self.weight, self.bias)


class AdaptedLinear(Linear):
    """A frozen map with a trained low-rank update: `x (W + scale B A).T + b`.

    With DoRA each row of the sum is scaled to the length that `magnitude` has for it (arXiv 2402.09353); that row's own
    length counts as a constant in backward (section 4.3). The frozen weight may be in 4 bits, then `weight` is None.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, adapter: AdapterConfig) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight.requires_grad_(False)
        if bias:
            self.bias.requires_grad_(False)
        self.lora_A = nn.Linear(in_features, adapter.rank, bias=False)
        self.lora_B = nn.Linear(adapter.rank, out_features, bias=False)
        self.scale = adapter.scale
        self.magnitude = nn.Parameter(torch.empty(out_features)) if adapter.kind == "dora" else None
        self.packed: NF4 | None = None
        self.sum_over_parts: Callable[[Tensor], Tensor] = _itself
        """Adds up what each rank has of a sum over inputs, where these are cut over ranks."""

    def pack(self, block_size: int) -> None:
        """Keep the frozen weight in 4 bits, which hold anything until they are filled."""
        shape = self.lora_B.out_features, self.lora_A.in_features
        self.packed = NF4.empty(shape, block_size, self.lora_A.weight.device)
        self.register_parameter("weight", None)

    def frozen(self) -> Tensor:
        """Return W, (O, D)."""
        return self.packed.dequantize() if self.packed is not None else self.weight

    def product(self, x_D: Tensor) -> Tensor:
        base = nf4_linear(x_D, self.packed) if self.packed else F.linear(x_D, self.weight.to(x_D.dtype))
        update = self.lora_B(self.lora_A(x_D)) * self.scale
        if self.magnitude is None:
            return base + update
        return (base + update) * (self.magnitude / self.lengths()).to(base.dtype)

    def forward(self, x_D: Tensor) -> Tensor:
        out = self.product(x_D)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Return the length of each row of `W + scale B A`, float32, (O,); a float32 W is read, not copied."""
        weight_OD, a_RD, b_OR = self.frozen().float(), self.lora_A.weight.float(), self.lora_B.weight.float()
        squares = torch.linalg.vector_norm(weight_OD, dim=1).square()
        mixed = (b_OR * (weight_OD @ a_RD.T)).sum(1)
        own = (b_OR * (b_OR @ (a_RD @ a_RD.T))).sum(1)
        total = squares + 2 * self.scale * mixed + self.scale**2 * own
        return self.sum_over_parts(total).clamp(min=SHORTEST**2).sqrt()

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptedLinear":
        super()._apply(fn, recurse)
        if self.packed is not None:
            self.packed = self.packed.moved(self.lora_A.weight.device)
        return self


def adapt(model: Any, adapter: AdapterConfig, dtype: torch.dtype) -> None:
    """Freeze a model that is on the meta device and give its blocks' matrices adapters, in place.

    dtype: of the frozen weights, but those in 4 bits.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.to(dtype)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if name in adapter.targets:
                    setattr(part, name, _adapted(linear, adapter))


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the maps with adapters by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def _adapted(linear: nn.Linear, adapter: AdapterConfig) -> AdaptedLinear:
    with torch.device(linear.weight.device):
        new = AdaptedLinear(linear.in_features, linear.out_features, linear.bias is not None, adapter)
    new.weight, new.bias = linear.weight, linear.bias
    if adapter.base == "nf4":
        new.pack(adapter.block_size)
    return new


def _itself(value: Tensor) -> Tensor:
    return value
