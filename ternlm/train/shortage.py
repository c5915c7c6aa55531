"""What a run does when memory runs out: measure what it held by kind, and say what was expected and what to change."""

import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ternlm.config import Config
from ternlm.config.layout import Layout
from ternlm.config.section import UserError
from ternlm.monitor.memory import device_memory, held_memory, memory_of_others
from ternlm.parallel.launch import Launch
from ternlm.parallel.pieces import local_tensor
from ternlm.planner.cluster import Cluster
from ternlm.planner.shortage import Held, report_shortage, warn_of_shortage
from ternlm.train.run import Run

logger = logging.getLogger(__name__)

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 'out of memory'",  # NCCL's
)
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
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
            return error
        error = error.__cause__
    return None


class ShortageGuard:
    """While entered, turns an error of memory that ran out into a report: `OutOfMemory`."""

    def __init__(self, config: Config, layout: Layout, launch: Launch, device: torch.device, cluster: Cluster | None):
        """cluster: None where nothing is known of the devices."""
        self.run: Run | None = None
        """To be given once it is set up."""
        self._config, self._layout, self._launch = config, layout, launch
        self._device, self._cluster = device, cluster
        self._before = memory_of_others(device) if device.type == "cuda" else held_memory(device)

    def warn(self) -> None:
        """Warn of a run that is predicted to need more memory than there is."""
        # Ranks on a CPU share its memory. A known device's reserve is in the prediction.
        sharers = 1 if self._device.type == "cuda" else self._launch.node_size
        left = device_memory(self._device) / sharers - (0 if self._cluster else self._before)
        said = warn_of_shortage(self._config, self._layout, left, self._cluster)
        if said:
            logger.warning("%s", said)

    def __enter__(self) -> "ShortageGuard":
        """Begin to guard."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Report where memory ran out, while the error still holds what was held."""
        shortage = find_shortage(error)
        if shortage is None:
            return
        found = _ASKED.search(str(shortage))
        asked = float(found[1]) * _UNITS[found[2]] if found else 0.0
        parts = _held(self.run, self._before) if self.run else {}
        held = Held(parts, asked, float(device_memory(self._device)), self._before)
        report = report_shortage(self._config, self._layout, held, self._cluster, self._launch.rank)
        raise OutOfMemory(report) from error


def _held(run: Run, before: int) -> dict[str, float]:
    """Return this rank's bytes by kind."""
    # Not the model's parameters: in the midst of a step those may be whole ones that FSDP has gathered.
    weights = [piece.shard() for piece in run.pieces]
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
