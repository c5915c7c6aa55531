"""What a run does when memory runs out: measure what it held by kind, and say what was expected and what to change."""

import logging
import re
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ternlm.config import Config
from ternlm.config.layout import Layout
from ternlm.config.section import UserError
from ternlm.model.linear import adapted
from ternlm.monitor.memory import device_memory, held_memory, memory_of_others
from ternlm.parallel.launch import Launch
from ternlm.parallel.pieces import local_tensor
from ternlm.planner.cluster import Cluster
from ternlm.planner.memory import GIB, peak_memory
from ternlm.planner.shortage import Held, report_elsewhere, report_shortage, warn_of_shortage
from ternlm.train.loop import train_step
from ternlm.train.run import Run
from ternlm.train.validate import validate

logger = logging.getLogger(__name__)

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
# PyTorch's own, CUDA's, NCCL's and Triton's; cuBLAS's and cuDNN's; the C++ library's.
_SIGNS = re.compile(r"can't allocate memory|out of memory|ALLOC(ATION)?_FAILED|std::bad_alloc", re.IGNORECASE)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class OutOfMemory(UserError):
    """Memory ran out; the message says what held it, and what would fit."""


def find_shortage(error: BaseException | None) -> BaseException | None:
    """Return the error of memory that ran out, on a device or in main memory, that this one is or comes from; or None.

    A pipeline's schedule, for one, wraps what its stages raise.
    """
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return error
        if isinstance(error, RuntimeError) and _SIGNS.search(str(error)):
            return error
        error = error.__cause__
    return None


class ShortageGuard:
    """While entered, turns an error of memory that ran out into a report: `OutOfMemory`."""

    def __init__(self, config: Config, layout: Layout, launch: Launch, device: torch.device, cluster: Cluster | None):
        """cluster: None where nothing is known of the devices."""
        self._run: Run | None = None
        self._frozen: list[Tensor] = []
        self._config, self._layout, self._launch = config, layout, launch
        self._device, self._cluster = device, cluster
        self._before = memory_of_others(device) if device.type == "cuda" else held_memory(device)

    @property
    def run(self) -> Run | None:
        """The run; to be given once it is set up, between steps, when its frozen weights are as they are kept."""
        return self._run

    @run.setter
    def run(self, run: Run | None) -> None:
        self._run, self._frozen = run, frozen_weights(run.model) if run else []

    def warn(self) -> None:
        """Say what memory the planner predicts, where it knows the device; warn where that is more than there is."""
        if self._cluster:
            planned = peak_memory(self._config, self._layout, self._cluster)
            parts = [f"{kind} {size / GIB:.1f}" for kind, size in planned.parts.items() if size >= GIB / 20]
            there = self._there / GIB
            logger.info("planned memory: %.1f GiB of %.1f (%s)", planned.bytes / GIB, there, ", ".join(parts))
        said = warn_of_shortage(self._config, self._layout, Held({}, 0.0, self._there, self._before), self._cluster)
        if said:
            logger.warning("%s", said)

    def __enter__(self) -> "ShortageGuard":
        """Begin to guard."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Report where memory ran out, while the error still holds what was held."""
        shortage = find_shortage(error)
        if error is None or shortage is None or isinstance(error, UserError):  # what explains itself stays as it is
            return
        found = _ASKED.search(str(shortage))
        asked = float(found[1]) * _UNITS[found[2]] if found else 0.0
        parts = _held(self.run, self._frozen, self._before) if self.run else {}
        held = Held(parts, asked, self._there, self._before)
        where = f"rank {self._launch.rank} {self._moment(error)}"
        if _in(error, train_step) or not parts:
            report = report_shortage(self._config, self._layout, held, self._cluster, where)
        else:
            report = report_elsewhere(held, where)
        raise OutOfMemory(report) from error

    @property
    def _there(self) -> float:
        """Bytes that there are for this rank; ranks on a CPU share its memory."""
        return float(device_memory(self._device, self._launch.node_size))

    def _moment(self, error: BaseException) -> str:
        step = self.run.progress.step if self.run else 0
        if self.run is None:
            return "while the run was set up"
        if _in(error, train_step):
            return f"in step {step}"
        moments = {validate: "in validation", Run.save: "while a checkpoint was saved"}
        return next((f"{said} after step {step}" for function, said in moments.items() if _in(error, function)),
                    f"after step {step}, in none")  # fmt: skip


def _in(error: BaseException, function: Callable[..., Any]) -> bool:
    """Whether an error was raised within a function."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code is function.__code__ for frame, _ in frames)


def frozen_weights(model: nn.Module) -> list[Tensor]:
    """Return what this rank holds of weights that aren't trained, those in 4 bits too."""
    frozen = [local_tensor(parameter) for parameter in model.parameters() if not parameter.requires_grad]
    packed = (linear.packed for linear in adapted(model).values())
    return frozen + [part for weight in packed if weight for part in (weight.codes, weight.scales)]


def _held(run: Run, frozen: list[Tensor], before: int) -> dict[str, float]:
    """Return this rank's bytes by kind."""
    # Not the model's parameters: in the midst of a step those may be whole ones that FSDP has gathered.
    weights = [*frozen, *(piece.shard() for piece in run.pieces)]
    pairs = [p.grad for piece in run.pieces for p in (piece.parameter, piece.tensor)]
    gradients = [gradient for gradient in pairs if gradient is not None]
    states = [
        value
        for optimizer in run.optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    parts = {name: _bytes(some) for name, some in zip(_OWN, (weights, gradients, states), strict=True)}
    parts["reserve"] = float(memory_of_others(run.device) if run.device.type == "cuda" else before)
    tensors = held_memory(run.device) - (0 if run.device.type == "cuda" else before)
    parts["activations"] = max(tensors - sum(parts[name] for name in _OWN), 0.0)
    return parts


_OWN = ("weights", "gradients", "optimizer")


def _bytes(tensors: Iterable[Tensor]) -> float:
    """Return the bytes of the tensors' storages on this rank, shared ones once."""
    storages = {}
    for tensor in tensors:
        storage = local_tensor(tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return float(sum(storages.values()))
