"""A model's blocks as they are fastest without gradients on a CPU: the same sums, fewer passes over memory.

`shared` reads the weights of the model itself, so that what training changes is what the next pass computes with.
`pack` reorders them for good: half as fast again for few rows, and the model can't be trained, saved, copied or moved
any more.

Shapes: B batch, T tokens, D hidden, N query heads, K key/value heads, H head dim.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.model.decoder import Block, CausalLM, Head, RMSNorm
from ternlm.model.linear import Linear
from ternlm.model.rope import rotate
from ternlm.ops import native, onednn
from ternlm.ops.attention import Attend


@dataclass(frozen=True)
class _Packed:
    """A linear map, or several of the same input behind each other, in oneDNN's order."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, *maps: Linear) -> "_Packed":
        weight = maps[0].weight if len(maps) == 1 else torch.cat([each.weight for each in maps])
        biases = [each.bias.detach().to(weight.dtype) for each in maps if each.bias is not None]
        return cls(onednn.pack(weight.detach()), torch.cat(biases) if biases else None)


class FastBlock(nn.Module):
    """A block by the maps of another one, which are its own or packed."""

    def __init__(self, block: Block, packed: bool) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        own: Callable[[Linear], Any] = _Packed.of if packed else _itself
        inner = (mlp.gate_proj, mlp.up_proj)
        heads = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.layer, self.head_size = attention.layer, attention.head_size
        self._sizes = [each.out_features // attention.head_size for each in heads]
        self._qkv: Sequence[Any] = (_Packed.of(*heads),) if packed else heads
        self._gate_up: Sequence[Any] = (_Packed.of(*inner),) if packed else inner
        self._o, self._down = own(attention.o_proj), own(mlp.down_proj)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        attended = self._attention(_normed(self.input_layernorm, x_BTD), cos, sin, attend)
        normed = _normed(self.post_attention_layernorm, x_BTD, attended)  # which is their sum from here on
        parts = _products(normed, self._gate_up)
        gate, up = parts[0].chunk(2, -1) if len(parts) == 1 else parts
        out = onednn.product(_gated(gate, up), self._down.weight, None)
        return out.add_(attended)

    def _attention(self, normed: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        parts = _products(normed, self._qkv)
        heads = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).unflatten(-1, (-1, self.head_size))
        num_q, num_k, num_v = self._sizes
        if isinstance(self.q_norm, nn.Identity):
            turned = _rotated(heads[:, :, : num_q + num_k], cos, sin)  # both at once
            q_BTNH, k_BTKH = turned.split((num_q, num_k), dim=2)
        else:
            q_BTNH, k_BTKH, _ = heads.split((num_q, num_k, num_v), dim=2)
            q_BTNH, k_BTKH = (rotate(x, cos, sin) for x in (self.q_norm(q_BTNH), self.k_norm(k_BTKH)))
        out_BTNH = attend(q_BTNH, k_BTKH, heads[:, :, num_q + num_k :], self.layer)
        return onednn.product(out_BTNH.flatten(-2), self._o.weight, self._o.bias)


class FastHead(nn.Module):
    """The output projection by oneDNN, on the head's own weight or, packed, on a copy where that is the embedding's."""

    def __init__(self, head: Head, packed: bool) -> None:
        super().__init__()
        self._map: Any = _Packed(onednn.pack(head.weight.detach()), None) if packed else head

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return onednn.product(hidden_TD, self._map.weight, None)


def shared(model: CausalLM) -> CausalLM:
    """Return a model of fast blocks on the weights of the given one; that one itself where they can't be had."""
    return _speed_up(_shell(model), packed=False) if _suits(model) else model


def pack(model: CausalLM) -> CausalLM:
    """Give a model packed blocks in place of its own, whose memory is freed, and return it; where they can't be had it
    stays as it is."""
    return _speed_up(model, packed=True) if _suits(model) else model


def is_fast(model: CausalLM) -> bool:
    """Whether a model's blocks are fast ones."""
    return isinstance(model.model.layers[0], FastBlock)


def _suits(model: CausalLM) -> bool:
    """Whether all maps are plain ones, whose weights have the dtype that is computed with."""
    weights: list[Any] = [model.lm_head.weight] if type(model.lm_head) is Head else []
    for block in model.model.layers:
        if type(block) is not Block:  # sharded, or fast already
            return False
        maps = [
            each for part in (block.self_attn, block.mlp) for each in part.children() if hasattr(each, "in_features")
        ]
        if any(type(each) is not Linear for each in maps):  # adapted, or a part of one that is cut over ranks
            return False
        weights += [weight for each in maps for weight in (each.weight, each.bias) if weight is not None]
    dtype = compute_dtype(model)
    if not weights or not onednn.is_available(weights[0].device, dtype):
        return False
    return all(type(each.detach()) is Tensor and each.dtype == dtype and each.is_contiguous() for each in weights)


def _shell(model: CausalLM) -> CausalLM:
    """Return a model of the same parts, of which some can be replaced."""

    def alike(module: Any) -> Any:
        new = copy.copy(module)
        new._modules = dict(module._modules)
        return new

    shell = alike(model)
    shell.model = alike(model.model)
    shell.model.layers = nn.ModuleList(model.model.layers)
    return shell


def _speed_up(model: CausalLM, packed: bool) -> CausalLM:
    layers: Any = model.model.layers
    for index, block in enumerate(layers):
        layers[index] = FastBlock(block, packed)  # one after another: each frees what it replaces
    changed: Any = model
    changed.lm_head = FastHead(model.lm_head, packed)
    return model


def compute_dtype(model: CausalLM) -> torch.dtype:
    """Return the dtype that the model computes with now: autocast's, else the weights'."""
    weight = model.model.norm.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


def _products(x: Tensor, maps: Sequence[Any]) -> list[Tensor]:
    return [onednn.product(x, each.weight, each.bias) for each in maps]


def _normed(norm: RMSNorm, x: Tensor, more: Tensor | None = None) -> Tensor:
    """Return what the norm returns for x, or for the sum of both, which `more` is then."""
    weight = norm.weight
    if weight.dtype == torch.float32 and weight.numel() % native.LANES == 0 and native.is_available(x.device, x.dtype):
        return native.rms_norm(x.contiguous(), weight, norm.eps, more)
    x = x if more is None else more.add_(x)
    return F.rms_norm(x.float(), weight.shape, weight, norm.eps).to(x.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    if gate.shape[-1] % native.LANES == 0 and native.is_available(gate.device, gate.dtype):
        return native.silu_mul(gate, up)
    return F.silu(gate) * up


def _rotated(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what `rotate` returns, for heads that nobody needs any more as they are."""
    if cos.shape[:2] == x_BTNH.shape[:2] and native.is_available(x_BTNH.device, x_BTNH.dtype):
        native.rotate_(x_BTNH, cos, sin)
        return x_BTNH
    return rotate(x_BTNH, cos, sin)


def _itself(linear: Linear) -> Linear:
    return linear
