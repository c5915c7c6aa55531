"""What each rank's optimizer updates: the piece of every parameter that is this rank's own.

A piece is a plain tensor that shares memory with the model's parameter, whole on one device, else the rectangle that
tensor parallelism, FSDP and a wider cut of the optimizer's states leave. Between backward and the update,
`reduce_gradients` gives pieces their gradients; after it, `gather_updates` tells the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ternlm.parallel.mesh import Mesh
from ternlm.parallel.spans import exchange
from ternlm.parallel.tensor import cut_dimension, has_partial_gradient


@dataclass(frozen=True)
class Piece:
    """A rank's piece of one parameter."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    offset: tuple[int, ...]
    """Where this rank's shard begins in the whole parameter."""
    first_row: int
    """Where the piece begins in the shard."""
    parameter: nn.Parameter
    """The model's own: a tensor, or FSDP's DTensor."""
    tensor: nn.Parameter
    """The piece; what the optimizer holds."""
    counted: bool = True
    """Whether this rank counts it in the gradient's norm: of ranks with the same piece only the first does."""
    partial: bool = False
    """Whether its gradient is still to be summed over tensor ranks."""

    @property
    def own_offset(self) -> tuple[int, ...]:
        """Where the piece begins in the whole parameter."""
        return (self.offset[0] + self.first_row, *self.offset[1:])

    def shard(self) -> Tensor:
        """Return what the model holds of the parameter on this rank between steps; the piece may be a part of it."""
        return local_tensor(self.parameter)


def make_pieces(model: nn.Module, mesh: Mesh, sequence: bool = False) -> list[Piece]:
    """Describe this rank's pieces, tied parameters once, in the model's order.

    sequence: whether tensor parallelism cuts along the sequence too.
    """
    return [_make_piece(name, parameter, mesh, sequence) for name, parameter in model.named_parameters()]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what of a possibly sharded tensor is on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def reduce_gradients(pieces: Sequence[Piece], mesh: Mesh) -> None:
    """Give every piece its gradient, summed over all ranks that have a part of it. Collective over the whole mesh.

    The parameters' own gradients are released or shared.
    """
    for piece in pieces:
        gradient = piece.parameter.grad
        if gradient is None:
            raise RuntimeError(f"{piece.name} got no gradient; every parameter must take part in the loss")
        if mesh.across is None and piece.tensor is not piece.parameter:
            piece.tensor.grad = local_tensor(gradient)
    if mesh.across is not None:
        _reduce_across(pieces, mesh)
    partial = [piece.tensor.grad for piece in pieces if piece.partial and piece.tensor.grad is not None]
    if partial and mesh.tensor is not None:
        joined = torch.cat([gradient.flatten() for gradient in partial])
        with exchange("all_reduce", "tensor"):
            dist.all_reduce(joined, group=mesh.tensor)
        for gradient, part in zip(partial, joined.split([g.numel() for g in partial]), strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def gather_updates(pieces: Sequence[Piece], mesh: Mesh) -> None:
    """Bring updated pieces to the ranks that hold the same FSDP shard. Collective over `across`."""
    if mesh.across is None:
        return
    size = mesh.across.size()
    for group in _by_size(pieces):
        shards = [piece.shard() for piece in group]
        sizes = [_padded_rows(shard, size) // size * shard[:1].numel() for shard in shards]
        own = shards[0].new_zeros(sum(sizes))
        for piece, part in zip(group, own.split(sizes), strict=True):
            part[: piece.tensor.numel()].copy_(piece.tensor.flatten())
        joined = own.new_empty(size * own.numel())
        with exchange("all_gather", "across"):
            dist.all_gather_into_tensor(joined, own, mesh.across)
        columns = joined.view(size, -1).split(sizes, dim=1)
        for shard, parts in zip(shards, columns, strict=True):
            shard.copy_(parts.flatten()[: shard.numel()].view_as(shard))


def join_piece(piece: Piece, tensor: Tensor, mesh: Mesh) -> tuple[Tensor, tuple[slice, ...]]:
    """Return the whole of what `tensor` is this rank's piece of, and where the piece lies in it.

    Collective over all ranks that hold parts of the parameter. For optimizers that need whole matrices.
    """
    place = tuple(slice(o, o + n) for o, n in zip(piece.own_offset, tensor.shape, strict=True))
    whole = tensor.new_zeros(piece.shape)
    whole[place] = tensor
    for group in (mesh.shard, mesh.across, mesh.tensor if cut_dimension(piece.name) is not None else None):
        if group is not None:
            dist.all_reduce(whole, group=group)
    return whole, place


def clear_gradients(pieces: Sequence[Piece]) -> None:
    """Release all gradients."""
    for piece in pieces:
        piece.parameter.grad = piece.tensor.grad = None


def _make_piece(name: str, parameter: nn.Parameter, mesh: Mesh, sequence: bool) -> Piece:
    layout, place = mesh.layout, mesh.place
    local = local_tensor(parameter)
    shape, offset = list(parameter.shape), [0] * parameter.ndim
    data_rank = place.data * layout.context + place.context
    if isinstance(parameter, DTensor):
        rows = -(-shape[0] // layout.shard)  # FSDP gives each the same number of rows, the last ones fewer or none
        offset[0] = min(data_rank % layout.shard * rows, shape[0])
    counted, partial = data_rank < layout.optimizer, False
    tensor, first_row = parameter, 0
    if isinstance(parameter, DTensor):
        own = local
        if mesh.across is not None:
            rows = _padded_rows(local, layout.across) // layout.across
            first_row = min(mesh.across.rank() * rows, local.shape[0])
            own = local[first_row : first_row + rows]
        tensor = nn.Parameter(own.detach())
    if mesh.tensor is not None:
        dim = cut_dimension(name)
        partial = has_partial_gradient(name, sequence)
        if dim is None:
            counted &= place.tensor == 0
        else:
            offset[dim] += place.tensor * shape[dim]
            shape[dim] *= layout.tensor
    return Piece(name, tuple(shape), tuple(offset), first_row, parameter, tensor, counted, partial)


def _reduce_across(pieces: Sequence[Piece], mesh: Mesh) -> None:
    assert mesh.across is not None
    size = mesh.across.size()
    for group in _by_size(pieces):
        gradients = [local_tensor(piece.parameter.grad) for piece in group if piece.parameter.grad is not None]
        rows = [_padded_rows(gradient, size) for gradient in gradients]
        sizes = [n // size * gradient[:1].numel() for n, gradient in zip(rows, gradients, strict=True)]
        joined = gradients[0].new_zeros((size, sum(sizes)))
        for gradient, part in zip(gradients, joined.split(sizes, dim=1), strict=True):
            flat = gradient.flatten()
            padded = torch.nn.functional.pad(flat, (0, size * part.shape[1] - flat.numel()))
            part.copy_(padded.view(size, -1))
        own = joined.new_empty(joined.shape[1])
        with exchange("reduce_scatter", "across"):
            dist.reduce_scatter_tensor(own, joined.flatten(), group=mesh.across)
        if mesh.replicas is not None:
            with exchange("all_reduce", "replicas"):
                dist.all_reduce(own, group=mesh.replicas)
        for piece, part in zip(group, own.split(sizes), strict=True):
            piece.tensor.grad = part[: piece.tensor.numel()].view_as(piece.tensor)
            piece.parameter.grad = None


def _by_size(pieces: Sequence[Piece], elements: int = 2**26) -> list[list[Piece]]:
    """Group neighbours for one collective each, of about 2^26 elements: few calls, bounded extra memory."""
    groups: list[list[Piece]] = [[]]
    held = 0
    for piece in pieces:
        count = piece.shard().numel()
        if groups[-1] and held + count > elements:
            groups.append([])
            held = 0
        groups[-1].append(piece)
        held += count
    return groups


def _padded_rows(shard: Tensor, size: int) -> int:
    return -(-shard.shape[0] // size) * size
