"""InternLM's own tokenized files, read as they are: NAME.bin (one JSON object a line) and NAME.bin.meta.

A line is `{"tokens": [ids]}`; a negative id stands for its absolute value without loss when it is the target,
and id 0 is never a target. The meta is a .npy array, int32 or int64: a row per line, first column its byte
offset, last column its number of tokens. Stands in for a ShardSet under `source`; it writes nothing.
"""

import json
import mmap
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ternlm.data.errors import DataError

_OPEN_FILES = 256  # a mapped file holds a descriptor, and 1024 a process is a common limit
_SCAN_BYTES = 4 << 20
_PARSED_DOCUMENTS = 16  # a long document is read by many windows, and is parsed whole each time

_REMEDY = "copy both files again, or tokenize again"

_Document = tuple[NDArray[np.int64], NDArray[np.bool_] | None]


def find_bins(path: str | Path) -> list[Path]:
    """List the .bin files at a path, itself one or a folder tree, in the order in which they are read."""
    place = Path(path)
    if place.is_file():
        return [place] if place.suffix == ".bin" else []
    found = []
    for folder, subfolders, names in os.walk(place, followlinks=True):
        subfolders.sort()
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".bin")]
    return found


class InternLMFiles:
    """A .bin file, or all those of a folder tree, read as one run of tokens."""

    vocab_size: int | None = None
    fingerprint: str | None = None

    def __init__(self, path: Path, files: Sequence[Path], metas: Sequence[NDArray[np.int64]]) -> None:
        self.path = path
        self.files = tuple(files)
        self._metas = tuple(metas)
        self._document_starts = np.cumsum([0, *(len(meta) for meta in metas)], dtype=np.int64)
        self._ends = np.cumsum(np.concatenate([meta[:, -1] for meta in metas]), dtype=np.int64)
        self._map = lru_cache(maxsize=_OPEN_FILES)(_map_file)
        self._parse = lru_cache(maxsize=_PARSED_DOCUMENTS)(_parse_line)

    @classmethod
    def open(cls, path: str | Path) -> "InternLMFiles":
        """Open a .bin file or a folder tree of them, and check each against its .meta."""
        files = find_bins(path)
        if not files:
            raise DataError(
                f"{path}: no InternLM data; give a .bin file, or a folder of them, each beside its .bin.meta"
            )
        return cls(Path(path), files, [_read_meta(file) for file in files])

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def num_documents(self) -> int:
        return len(self._ends)

    def read(self, start: int, stop: int) -> _Document:
        """Read tokens [start, stop): ids, and which carry loss as targets (None: all of them)."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) is not within [0, {self.num_tokens})")
        if start == stop:
            return np.empty(0, np.int64), None
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        documents = [self.document(index) for index in range(first, last + 1)]
        skip = start - (int(self._ends[first - 1]) if first else 0)
        window = slice(skip, skip + stop - start)
        ids = np.concatenate([ids for ids, _ in documents])[window]
        if all(trained is None for _, trained in documents):
            return ids, None
        masks = [np.ones(len(ids), bool) if trained is None else trained for ids, trained in documents]
        return ids, np.concatenate(masks)[window]

    def ends(self, first: int, last: int) -> NDArray[np.int64]:
        """Return where documents first..last-1 end: exclusive, in tokens from the start of the first file."""
        return self._ends[first:last]

    def leaders(self, first: int, last: int) -> NDArray[np.int64]:
        """Return documents first..last-1: none belongs to another."""
        return np.arange(first, last, dtype=np.int64)

    def document(self, index: int) -> _Document:
        """Read one document, as `read` does."""
        file, line = self._locate(index)
        offset, count = self._metas[file][line][[0, -1]].tolist()
        return self._parse(self._map(self.files[file]), offset, count, self.place(index))

    def place(self, index: int) -> str:
        """Say where document `index` is, for messages."""
        file, line = self._locate(index)
        return f"{self.files[file]}:{line + 1} (document {line}, byte {self._metas[file][line, 0]})"

    def check_ids(self, vocab_size: int, max_bytes: int = 4 << 30) -> None:
        """Refuse ids that aren't below `vocab_size`, in the first `max_bytes` of the files: about 5 s per GiB."""
        for file in self.files:
            if max_bytes <= 0 or not file.stat().st_size:
                continue
            text = np.memmap(file, np.uint8, mode="r")[:max_bytes]
            max_bytes -= len(text)
            found = _find_large_number(text, vocab_size)
            if found is not None:
                at, number = found
                line = int((text[:at] == ord("\n")).sum()) + 1
                raise DataError(
                    f"{file}:{line}: token id {number} is not below the model's vocab_size = {vocab_size}; the file "
                    "was made by another tokenizer: set model.vocab_size to that one's"
                )

    def _locate(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._document_starts, index, side="right")) - 1
        return file, index - int(self._document_starts[file])


def _find_large_number(text: NDArray[np.uint8], limit: int) -> tuple[int, str] | None:
    """Return the first decimal number of `limit` or more in ASCII text, and where it begins; None: there is none."""
    width = len(str(limit))
    powers = 10 ** np.arange(width - 1, -1, -1, dtype=np.int64)
    start = 0
    while start < len(text):
        stop = min(start + _SCAN_BYTES, len(text))
        while stop < len(text) and 48 <= text[stop] <= 57:  # a number is never cut in two
            stop += 1
        block = text[start:stop]
        digits = (block >= 48) & (block <= 57)
        edges = np.flatnonzero(np.diff(digits.astype(np.int8), prepend=0, append=0))
        begins, lengths = edges[::2], edges[1::2] - edges[::2]
        large = lengths > width
        as_wide = np.flatnonzero(lengths == width)
        values = (block[begins[as_wide, None] + np.arange(width)] - np.int64(48)) @ powers
        large[as_wide] = values >= limit
        if large.any():
            first = int(large.argmax())
            at = int(begins[first])
            return start + at, block[at : at + int(lengths[first])].tobytes().decode()
        start = stop
    return None


def _read_meta(file: Path) -> NDArray[np.int64]:
    """Read a .bin's .meta as int64 (documents, 2 or more) and check that it fits the .bin."""
    path = file.with_name(file.name + ".meta")
    if not path.is_file():
        raise DataError(f"{file}: has no {path.name} beside it; copy that file too, or tokenize again")
    try:
        meta = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a .npy array ({error}); copy it again, or tokenize again") from error
    if not isinstance(meta, np.ndarray) or (meta.size and (meta.ndim != 2 or meta.shape[1] < 2)):
        raise DataError(f"{path}: its shape is {meta.shape}, not (documents, 2); is it the .meta of {file.name}?")
    if meta.size == 0:
        meta = np.empty((0, 2), np.int64)
    if meta.dtype.kind not in "iu":
        raise DataError(f"{path}: its dtype is {meta.dtype}, not int32 or int64; is it the .meta of {file.name}?")
    meta = meta.astype(np.int64)
    _check_offsets(file, path, meta)
    return meta


def _check_offsets(file: Path, path: Path, meta: NDArray[np.int64]) -> None:
    offsets, size = meta[:, 0], file.stat().st_size
    wrong = np.flatnonzero((offsets < 0) | (offsets >= size) | (meta[:, -1] < 0))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{path}: row {row} says byte {offsets[row]}, {meta[row, -1]} tokens, but {file.name} has {size} "
            f"bytes: the .bin was cut off, or its offsets overflowed int32 (over 2 GiB); {_REMEDY}"
        )
    if size == 0:
        return
    with file.open("rb") as stream:
        stream.seek(int(offsets.max()) if len(offsets) else 0)
        line = stream.readline() if len(offsets) else b""
        rest = size - stream.tell()
    if rest:
        raise DataError(f"{file}: its last {rest} bytes are lines that {path.name} doesn't list; {_REMEDY}")
    if not line.rstrip().endswith(b"}"):
        raise DataError(f"{file}: its last line was cut off, after {line[-20:].decode(errors='replace')!r}; {_REMEDY}")


def _map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _parse_line(data: mmap.mmap, offset: int, count: int, place: str) -> _Document:
    end = data.find(b"\n", offset)
    line = data[offset : end if end >= 0 else len(data)]
    try:
        listed = json.loads(line)["tokens"]
        # An empty list has no integer dtype of its own.
        signed = np.array(listed) if listed else np.empty(0, np.int64)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        shown = line[:60].decode(errors="replace")
        raise DataError(f'{place}: not a line {{"tokens": [ids]}} but {shown!r} ({error})') from error
    if signed.dtype != np.int64 or signed.ndim != 1:
        raise DataError(f"{place}: its tokens must be a list of whole numbers, not of {signed.dtype}")
    if len(signed) != count:
        raise DataError(f"{place}: {len(signed)} tokens, but its .meta says {count}; {_REMEDY}")
    trained = signed > 0
    return np.abs(signed), None if trained.all() else trained
