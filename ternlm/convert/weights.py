"""Weights of a model, read a part at a time under the model's own names: the seam of all imports and exports.

A source (a Hugging Face folder, a GGUF file, the ancestor's checkpoints, our own) implements `Weights`; whoever fills a
model, trains from one or writes another format reads from it, and never holds more than a tensor beside its own part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.config.section import UserError
from ternlm.data.tokenizer import Tokenizer


class ConvertError(UserError):
    """A model can't be read or written. The message says which file, why and what to do."""


class Weights(Protocol):
    """Tensors by the names of `model_shapes`; a tied head isn't among them."""

    def names(self) -> Sequence[str]:
        """Return the names of all tensors that there are."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading it."""
        ...

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return the part of a tensor that begins at `offset`, or all of it, on the CPU in the dtype of the source."""
        ...


@dataclass(frozen=True)
class OpenModel:
    """A model of any format, opened: its shape is known, its weights are still where they lie."""

    path: Path
    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the source tells, for exports: `chat_template`, `generation`, `training`."""


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by name, in the model's order, without building it; tied ones once."""
    d, m, h = config.hidden_size, config.intermediate_size, config.head_size
    q, kv = config.num_attention_heads * h, config.kv_heads * h
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, columns)
            if config.attention_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        if config.qk_norm:
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (h,) for name in "qk"}
        shapes |= {f"{prefix}mlp.gate_proj.weight": (m, d), f"{prefix}mlp.up_proj.weight": (m, d)}
        shapes[f"{prefix}mlp.down_proj.weight"] = (d, m)
        shapes |= {f"{prefix}{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def check_weights(path: Path, config: ModelConfig, weights: Weights) -> None:
    """Raise ConvertError unless the weights are just those of the model, each of its shape."""
    wanted, found = model_shapes(config), set(weights.names())
    for what, names in (("misses", wanted.keys() - found), ("has, beyond the model's,", found - wanted.keys())):
        if names:
            listed = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ConvertError(f"{path}: {what} {listed}; see whether its configuration and files belong together")
    for name, shape in wanted.items():
        if weights.shape(name) != shape:
            raise ConvertError(
                f"{path}: {name} is {weights.shape(name)}, and its configuration makes it {shape}; see whether its "
                "configuration and files belong together"
            )


def overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a finite value of the tensor is too large for `dtype`."""
    return dtype is not tensor.dtype and bool((tensor.to(dtype).isinf() & tensor.isfinite()).any())


def cut(tensor: Tensor, offset: tuple[int, ...] | None, shape: tuple[int, ...] | None) -> Tensor:
    """Return a part of a whole tensor, as `Weights.read` does."""
    if offset is None or shape is None:
        return tensor
    return tensor[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


@dataclass(frozen=True)
class Derived:
    """A tensor that is made of others: read whole, then cut."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]


class Renamed:
    """Weights under the model's names, from those of a format.

    origin: for each of the model's names, the format's own, or how it is made.
    """

    def __init__(self, own: Weights, origin: Mapping[str, str | Derived]) -> None:
        self._own, self._origin = own, origin

    def names(self) -> Sequence[str]:
        """As `Weights`."""
        return list(self._origin)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `Weights`."""
        origin = self._origin[name]
        return origin.shape if isinstance(origin, Derived) else self._own.shape(origin)

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """As `Weights`."""
        origin = self._origin[name]
        if isinstance(origin, Derived):
            return cut(origin.make(), offset, shape)
        return self._own.read(origin, offset, shape)
