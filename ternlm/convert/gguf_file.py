"""The container that GGUF is: metadata, and tensors in many types, read where they lie.

It knows nothing of models. The header is parsed here, since the `gguf` package's reader takes seconds for a usual
vocabulary; the types' sizes and dequantization are that package's.
"""

import logging
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternlm.convert.weights import ConvertError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_BOOL, _TEXT, _ARRAY = 7, 8, 9
# The codes of `struct` for the scalar types of metadata, by GGUF's numbers for them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_LENGTH = struct.Struct("<Q")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file, and how: a block of `block_values` values takes `block_bytes` bytes."""

    offset: int
    shape: tuple[int, ...]
    type_name: str
    block_values: int
    block_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows; a vector is one."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.block_values * self.block_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.num_rows * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """A file's header: numbers, texts, arrays of numbers and lists of texts by key, and the tensors' places by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Place]

    def read(self, name: str, rows: np.ndarray | slice | None = None, columns: slice | None = None) -> Tensor:
        """Return the tensor's rows and columns, in its dtype if that is a plain one, else dequantized to float32.

        Of a quantized tensor no other rows than those are dequantized, and few other columns.
        """
        place = self.tensors[name]
        start, stop, _ = (columns or slice(None)).indices(place.shape[-1])
        first, last = start // place.block_values, -(-stop // place.block_values)
        whole = np.memmap(self.path, np.uint8, "r", place.offset, (place.num_rows, place.row_bytes))
        content = whole[slice(None) if rows is None else rows]
        content = np.array(content[:, first * place.block_bytes : last * place.block_bytes])
        if place.type_name in _PLAIN:
            values = torch.from_numpy(content).view(_PLAIN[place.type_name])
        else:
            gguf = gguf_package()
            kind = gguf.GGMLQuantizationType[place.type_name]
            values = torch.from_numpy(gguf.quants.dequantize(content, kind))
        values = values[:, start - first * place.block_values : stop - first * place.block_values]
        return values[0] if len(place.shape) == 1 else values.contiguous()


def gguf_package() -> ModuleType:
    """Return the `gguf` package, warnings of which are logged, and nothing less, unless its logger's level is set.

    Raises ConvertError where it isn't installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as trouble:
        raise ConvertError(f"GGUF files need the package gguf ({trouble}); pip install 'ternlm[hf]'") from trouble
    own = logging.getLogger(gguf.__name__)
    if own.level == logging.NOTSET:  # it tells of each file what we tell, too
        own.setLevel(logging.WARNING)
    return gguf


def read_gguf_file(path: Path) -> GgufFile:
    """Read a file's header. Raises ConvertError for what isn't a whole GGUF file of readable tensors."""
    gguf_package()
    if not path.is_file():
        raise ConvertError(f"{path}: there is no such file; give a .gguf file")
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise ConvertError(f"{path}: not a GGUF file; it begins with other bytes than {_MAGIC.decode()}")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with content:
        try:
            return _parse(path, _Cursor(content, len(_MAGIC)))
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError, ZeroDivisionError) as trouble:
            raise ConvertError(
                f"{path}: its header is broken or cut off ({type(trouble).__name__}: {trouble}); fetch it again"
            ) from trouble


class _Cursor:
    """Reads the header's values one after another."""

    def __init__(self, content: mmap.mmap, position: int) -> None:
        self.content, self.position, self.end = content, position, len(content)

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.content, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        start = self.position + _LENGTH.size
        (size,) = _LENGTH.unpack_from(self.content, self.position)
        self.position = start + size
        if self.position > self.end:
            raise struct.error("a text goes on after the end")
        return self.content[start : self.position].decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                return self._numbers(_SCALARS[inner], count)
            return [self.value(inner) for _ in range(count)]
        return self.number(_SCALARS[kind])

    def _numbers(self, code: str, count: int) -> np.ndarray:
        kind = np.dtype("<" + code)
        start, self.position = self.position, self.position + count * kind.itemsize
        if self.position > self.end:
            raise struct.error("an array goes on after the end")
        return np.frombuffer(self.content[start : self.position], kind)


def _parse(path: Path, cursor: _Cursor) -> GgufFile:
    version = cursor.number("I")
    if version not in _VERSIONS:
        big = " (it may be of a big-endian machine)" if version & 0xFFFF == 0 else ""
        raise ConvertError(f"{path}: GGUF version {version}{big} can't be read; convert it to version 3, little-endian")
    num_tensors, num_entries = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_entries):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    found = []
    for _ in range(num_tensors):
        name = cursor.text()
        shape = tuple(reversed([cursor.number("Q") for _ in range(cursor.number("I"))]))
        found.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-cursor.position // alignment) * alignment
    known = _known_types(path, found)
    tensors = {name: Place(start + offset, shape, *known[kind]) for name, shape, kind, offset in found}
    for name, place in tensors.items():
        if not place.shape or place.shape[-1] % place.block_values:
            raise ConvertError(f"{path}: {name} of {place.shape} can't be {place.type_name}; fetch the file again")
        if place.offset + place.num_bytes > cursor.end:
            raise ConvertError(
                f"{path}: cut off; its tensor {name} ends at byte {place.offset + place.num_bytes}, and the file at "
                f"{cursor.end}; fetch it again"
            )
    return GgufFile(path, metadata, tensors)


def _known_types(path: Path, found: list[tuple[str, tuple[int, ...], int, int]]) -> dict[int, tuple[str, int, int]]:
    """Return each type's name, values and bytes per block. Raises ConvertError for one that can't be dequantized."""
    gguf = gguf_package()
    known = {}
    for name, _, number, _ in found:
        if number in known:
            continue
        try:
            kind = gguf.GGMLQuantizationType(number)
            values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
            gguf.quants.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as trouble:
            raise ConvertError(
                f"{path}: {name} is of a type that can't be read ({trouble}); quantize the model otherwise, for "
                "instance as Q8_0, or upgrade the package gguf"
            ) from trouble
        known[number] = (kind.name, values, num_bytes)
    return known
