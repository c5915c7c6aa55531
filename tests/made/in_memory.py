"""Weights in memory for models that tests make, and greedy sampling: what many tests need, and no package does."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ternlm.config.model import ModelConfig
from ternlm.convert.weights import cut, model_shapes
from ternlm.infer.params import SamplingParams


class Held:
    """As `Weights`: the tensors of a mapping, or a model's parameters."""

    def __init__(self, tensors: Mapping[str, torch.Tensor] | nn.Module) -> None:
        if isinstance(tensors, nn.Module):
            tensors = {name: parameter.detach() for name, parameter in tensors.named_parameters()}
        self.tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, offset: Any = None, shape: Any = None) -> torch.Tensor:
        return cut(self.tensors[name], offset, shape)


class Ones:
    """As `Weights`: all one, made when they are read, for what doesn't look at them."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = model_shapes(config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, offset: Any = None, shape: Any = None) -> torch.Tensor:
        return torch.ones(self._shapes[name] if shape is None else shape)


def greedy(max_new_tokens: int, stop_ids: Iterable[int] = (), **settings: Any) -> SamplingParams:
    """Always the most likely token."""
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=frozenset(stop_ids), **settings)
