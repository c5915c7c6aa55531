"""Files of `torch.save`, read without running anything that they hold, and tensors that lie in pieces in several.

For the ancestor's checkpoints (`internlm`) and Hugging Face's older folders (`files`), whose names it doesn't know.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternlm.convert.weights import ConvertError, cut

_ZIP = b"PK\x03\x04"
# What the ancestor's files hold beside tensors: its settings' class, which is a dict, and numbers of numpy.
_SETTINGS = "internlm.core.context.parallel_context.Config"
_NUMBERS = ("int64", "int32", "float64", "float32", "bool")


def load_harmless(path: Path, *, mapped: bool = False) -> Any:
    """Return what `torch.save` wrote, tensors on the CPU; a file that would run code is refused, and runs none.

    mapped: leave the tensors on disk until they are read. Raises ConvertError for a file that can't be read.
    """
    if mapped:
        with path.open("rb") as file:
            if file.read(4) != _ZIP:
                raise ConvertError(f"{path}: isn't a file of torch.save (1.6 or later), or its start is lost; {_AGAIN}")
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as trouble:
        named = re.search(r"GLOBAL ([\w.]+)", str(trouble))
        found = f"holds {named[1]}" if named else "holds something, or is damaged so that it seems to hold something,"
        raise ConvertError(
            f"{path}: {found} beside tensors and plain values, which reading it would have to run; nothing was run. "
            "Such a file may be an attack: ask whoever made it for one of tensors alone"
        ) from trouble
    except OSError:
        raise
    except Exception as trouble:  # a damaged file breaks the reader in any of many ways
        reason = str(trouble).partition("\n")[0].partition(". ")[0] or type(trouble).__name__
        raise ConvertError(f"{path}: can't be read ({reason}); {_AGAIN}") from trouble


_AGAIN = "it may have been cut short: copy it again"


def _harmless() -> list[Any]:
    scalar = np.int64(0).__reduce__()[0]
    kinds = [type(np.dtype(name)) for name in _NUMBERS]
    places = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [(OrderedDict, _SETTINGS), (np.dtype, "numpy.dtype"), *places, *kinds]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name, each still on disk; anything else in it is an error."""
    states = load_harmless(path, mapped=True)
    if not isinstance(states, dict) or not states:
        raise ConvertError(f"{path}: holds no weights by name, but {type(states).__name__}; {_AGAIN}")
    size = path.stat().st_size
    for name, value in states.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConvertError(f"{path}: {str(name)[:80]!r} is {type(value).__name__}, not a tensor; is it a model's?")
        if value.layout != torch.strided or not value.is_floating_point() or value.is_meta:
            raise ConvertError(f"{path}: {name} isn't a plain tensor of floating-point numbers; is it a model's?")
        if value.numel() * value.element_size() > size:
            raise ConvertError(f"{path}: {name} is {tuple(value.shape)}, more than the file can hold; {_AGAIN}")
    return states


@dataclass(frozen=True)
class Pieces:
    """A tensor that lies in pieces one after the other along `dim`."""

    parts: Sequence[Tensor]
    dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def read(self, offset: tuple[int, ...] | None, shape: tuple[int, ...] | None) -> Tensor:
        """Return a part, or the whole, in memory of its own; only the bytes of that part are read."""
        if offset is None or shape is None:
            return torch.cat(list(self.parts), self.dim)
        taken: list[Tensor] = []
        start = 0
        for part in self.parts:
            size = part.shape[self.dim]
            low, high = max(offset[self.dim] - start, 0), min(offset[self.dim] + shape[self.dim] - start, size)
            if low < high or not taken:
                here, there = list(offset), list(shape)
                here[self.dim], there[self.dim] = min(low, size), max(high - low, 0)
                taken.append(cut(part, tuple(here), tuple(there)))
            start += size
        return torch.cat(taken, self.dim)


class PiecesWeights:
    """`Weights` of tensors in pieces."""

    def __init__(self, tensors: Mapping[str, Pieces]) -> None:
        self._tensors = tensors

    def names(self) -> Sequence[str]:
        """As `Weights`."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `Weights`."""
        return self._tensors[name].shape

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """As `Weights`."""
        return self._tensors[name].read(offset, shape)
