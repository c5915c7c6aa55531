"""Matrix products on a CPU by oneDNN.

PyTorch's own `linear` gives float32 to MKL, which reads the weights of few rows at half of the memory's speed, and on
processors of other makers leaves their widest instructions unused (figures: docs/serving.md). The operators are
PyTorch's compiler's own, without gradients; where they are missing, `is_available` says so.

Shapes: T rows, D inputs, O outputs.
"""

import torch
from torch import Tensor

_STEPS = ((8, 1), (32, 4), (64, 8), (128, 16), (512, 32))
"""Up to so many rows, multiples of which count."""
_STEP = 128
_ROWS = 32
"""For which packed weights are laid out; measured about the best for any number."""


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products can go this way."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(_ops(), "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(_ops()._is_mkldnn_bf16_supported()))


def pack(weight_OD: Tensor) -> Tensor:
    """Return a weight in the order in which oneDNN reads it fastest; it can't be read any other way."""
    return _ops()._reorder_linear_weight(weight_OD, _ROWS)


def product(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return `x W.T + b`; the weight is packed or plain."""
    return _ops()._linear_pointwise(x_TD, weight_OD, bias_O, "none", [], "")


def round_rows(num: int) -> int:
    """Return how many rows to compute with instead of `num`: code is made for each number, so few should occur."""
    step = next((step for most, step in _STEPS if num <= most), _STEP)
    return -(-num // step) * step


def _ops() -> torch._ops._OpNamespace:
    return torch.ops.mkldnn
