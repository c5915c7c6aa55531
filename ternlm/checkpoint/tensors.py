"""The tensors of a checkpoint as one flat dictionary, in PyTorch's distributed checkpoint (DCP) layout.

DCP stores each tensor by its name and shape, whatever the layout it was saved from, so any layout can load it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

# Flat names (`state.<parameter>.exp_avg`) are what a pipeline stage or another group split can pick from.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters by name, tied ones once; the tensors are the model's own."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Return the optimizers' states by name, made first where there are none yet.

    Learning rates, decay and the like are left out: a resumed run takes them from its settings.
    """
    fresh = [optimizer for optimizer in optimizers if not optimizer.state]
    state = get_optimizer_state_dict(model, optimizers, options=_FLAT)
    for optimizer in fresh:  # PyTorch has made their states by a step on zero gradients, and counted it
        for values in optimizer.state.values():
            if "step" in values:
                values["step"].zero_()
    return {f"optimizer.{name}": value for name, value in state.items() if name.startswith("state.")}


def put_optimizer_tensors(model: nn.Module, optimizers: list[Optimizer], tensors: dict[str, Any]) -> None:
    """Give the optimizers the states that `optimizer_tensors` returned."""
    state = get_optimizer_state_dict(model, optimizers, options=_FLAT)
    state.update({name.removeprefix("optimizer."): value for name, value in tensors.items()})
    set_optimizer_state_dict(model, optimizers, state, options=_FLAT)


@contextmanager
def one_process() -> Iterator[None]:
    """Keep DCP from warning that there is only one process, which is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def copy_to_cpu(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copy every tensor, so that training may go on while the copy is written."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in tensors.items()
    }
