"""The tensors of a checkpoint as one flat dictionary, in PyTorch's distributed checkpoint (DCP) layout.

DCP stores rectangles of each tensor by the tensor's name and shape, whatever the layout they were saved from, so any
layout can load them.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.optim import Optimizer

from ternlm.parallel.pieces import Piece


@dataclass(frozen=True)
class Rectangle:
    """A part of a tensor; DCP plans with its two methods, and the planners below find its tensor."""

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the whole tensor."""

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.tensor)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(self.shape)),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not self.tensor.numel():  # more ranks than rows
            return []
        return [ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=self.tensor.shape)]


class SavePlanner(DefaultSavePlanner):
    """DCP's planner, which finds the tensor of a rectangle, too."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return what is to be written."""
        value = self.state_dict[index.fqn]
        return value.tensor if isinstance(value, Rectangle) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """DCP's planner for a flat dictionary of tensors and rectangles."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the dictionary as it is; the default would put None in the place of what it doesn't know."""
        self.flatten_state_dict = False
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return what is to be filled."""
        value = self.state_dict[index.fqn]
        return value.tensor if isinstance(value, Rectangle) else super().lookup_tensor(index)


def model_tensors(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return the model's parameters by name, tied ones once; the tensors are the model's own."""
    return {f"model.{piece.name}": _stored(piece, piece.shard().detach(), piece.offset) for piece in pieces}


def optimizer_tensors(pieces: Sequence[Piece], optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Return the optimizers' states by name, made first where there are none yet; the tensors are the optimizers' own.

    Learning rates, decay and the like are left out: a resumed run takes them from its settings.
    """
    by_tensor: dict[Tensor, Piece] = {piece.tensor: piece for piece in pieces}
    tensors: dict[str, Any] = {}
    for optimizer in optimizers:
        if not optimizer.state:
            _make_states(optimizer)
        for tensor, values in optimizer.state.items():
            piece = by_tensor[tensor]
            for key, value in values.items():
                name = f"optimizer.state.{piece.name}.{key}"
                whole = value.shape != piece.tensor.shape  # a count of steps
                tensors[name] = value if whole else _stored(piece, value, piece.own_offset)
    return tensors


@contextmanager
def one_process() -> Iterator[None]:
    """Keep DCP from warning that there is only one process, which is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def copy_to_cpu(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copy every tensor, so that training may go on while the copy is written."""

    def copy(value: Any) -> Any:
        if isinstance(value, Rectangle):
            return replace(value, tensor=copy(value.tensor))
        return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value

    return {name: copy(value) for name, value in tensors.items()}


def _stored(piece: Piece, tensor: Tensor, offset: tuple[int, ...]) -> Any:
    return tensor if tensor.shape == piece.shape else Rectangle(tensor, offset, piece.shape)


def _make_states(optimizer: Optimizer) -> None:
    """Let an optimizer make its states by a step that changes nothing, and isn't counted."""
    rates = [group["lr"] for group in optimizer.param_groups]
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    gradients = [tensor.grad for tensor in tensors]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    for values in optimizer.state.values():
        if "step" in values:
            values["step"].zero_()
