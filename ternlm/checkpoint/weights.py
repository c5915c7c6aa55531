"""A checkpoint's weights one tensor, or a part of one, at a time; and a checkpoint made of weights alone.

What converts models reads and writes our checkpoints through this, whatever layout saved them.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ternlm.checkpoint.causes import cause_of
from ternlm.checkpoint.checksums import check_files, marker_text
from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import MARKER, find_checkpoint, sync
from ternlm.checkpoint.save import STATE_FILE
from ternlm.checkpoint.tensors import LoadPlanner, Rectangle, SavePlanner, one_process

_PREFIX = "model."


class Readable(Protocol):
    """Where tensors are read from, by name."""

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        ...


class CheckpointWeights:
    """The weights in a checkpoint, by the model's names; its files are checked against their checksums at once."""

    def __init__(self, checkpoint: Path) -> None:
        """`checkpoint` may also be a run's folder; raises CheckpointError."""
        self._folder = find_checkpoint(checkpoint)
        check_files(self._folder)
        self._reader = dcp.FileSystemReader(self._folder)
        try:
            stored = self._reader.read_metadata().state_dict_metadata
        except (OSError, CheckpointException, RuntimeError, ValueError) as trouble:
            raise CheckpointError(
                f"{self._folder}: can't be loaded ({cause_of(trouble)}); take another checkpoint"
            ) from trouble
        self._stored = {
            name.removeprefix(_PREFIX): entry
            for name, entry in stored.items()
            if name.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    def names(self) -> Sequence[str]:
        """Return the names of all weights."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape."""
        return tuple(self._stored[name].size)

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return the part of a weight that begins at `offset`, or all of it."""
        entry = self._stored[name]
        whole = tuple(entry.size)
        tensor = torch.empty(whole if shape is None else shape, dtype=entry.properties.dtype)
        wanted: Any = tensor if offset is None else Rectangle(tensor, offset, whole)
        try:
            with one_process():
                dcp.load({_PREFIX + name: wanted}, storage_reader=self._reader, planner=LoadPlanner(), no_dist=True)
        except (CheckpointException, OSError, RuntimeError, ValueError) as trouble:
            raise CheckpointError(
                f"{self._folder}: {name} can't be loaded ({cause_of(trouble)}); take another checkpoint"
            ) from trouble
        return tensor


def write_weights(out: Path, weights: Readable, state: Mapping[str, Any], write_files: Callable[[Path], None]) -> None:
    """Write a checkpoint of weights alone, in float32, into the new folder `out`; one tensor is held at a time.

    state: its `model` and `tokenizer`, as a run's. write_files: puts the tokenizer into the folder. Raises
    CheckpointError where the folder exists; a failure leaves nothing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        lazy = {_PREFIX + name: _Unread(weights, name) for name in weights.names()}
        with one_process():
            dcp.save(lazy, storage_writer=dcp.FileSystemWriter(folder), planner=_ReadingPlanner(), no_dist=True)
        write_files(folder)
        (folder / STATE_FILE).write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            sync(path)
        (folder / MARKER).write_text(marker_text(folder, {}), encoding="utf-8")
        sync(folder / MARKER)
        folder.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Unread:
    """A tensor that is read when DCP writes it."""

    weights: Readable
    name: str

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        size = torch.Size(self.weights.shape(self.name))
        chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=torch.float32), size=size)
        return [WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        size = torch.Size(self.weights.shape(self.name))
        return [ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)]


class _ReadingPlanner(SavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return value.weights.read(value.name).float() if isinstance(value, _Unread) else super().lookup_object(index)
