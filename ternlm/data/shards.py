"""Token shards: the one place that knows their bytes, for writing (`prepare`) and for reading (`source`).

A prepared folder holds `manifest.json` and, per shard, NAME.tokens (little-endian uint16 or uint32),
NAME.ends (int64: exclusive end of each document, in tokens) and, only where a token carries no loss,
NAME.mask (uint8: 1 trained, 0 no loss when it is the target); only where several documents belong together,
NAME.joined (uint8 per document: 1 it belongs to the one before it). Which text goes into which shard, and resuming,
is `prepare`'s.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ternlm.data.atomic import write_atomically
from ternlm.data.errors import DataError
from ternlm.data.hashed_file import HashedFile, Marks

FORMAT = "ternlm-tokens"
VERSION = 1
MANIFEST = "manifest.json"
ENDS_DTYPE = np.dtype("<i8")
MASK_DTYPE = np.dtype("u1")
TOKEN_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

_OPEN_FILES = 256  # a mapped file holds a descriptor, and 1024 a process is a common limit


def token_dtype(vocab_size: int) -> str:
    """Return the name of the smallest dtype that holds every id: a key of TOKEN_DTYPES."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest lists it."""

    name: str
    tokens: int
    documents: int
    masked: bool
    sha256: dict[str, str]
    """Hex digest of each of the shard's files, by suffix: tokens, ends and, where they exist, mask and joined."""

    @property
    def joined(self) -> bool:
        """Whether there are documents that belong together."""
        return "joined" in self.sha256


class ShardWriter:
    """Write one shard, document by document. Its files appear, whole, when the writer is closed.

    A context manager: leaving it normally closes the writer, leaving it by an error leaves no file behind.
    """

    def __init__(self, folder: str | Path, name: str, vocab_size: int) -> None:
        self._stem = Path(folder) / name
        self._name = name
        self._vocab_size = vocab_size
        self._dtype = TOKEN_DTYPES[token_dtype(vocab_size)]
        self._tokens = 0
        self._documents = 0
        self._info: ShardInfo | None = None
        self._mask = Marks(self._file("mask"), usual=1)
        self._joined = Marks(self._file("joined"), usual=0)
        self._ids = HashedFile(self._file("tokens"))
        self._ends = HashedFile(self._file("ends"))

    def add(self, ids: ArrayLike, mask: ArrayLike | None = None, joined: bool = False) -> None:
        """Append a document.

        mask: per token, 1 trained, 0 no loss when it is the target; None: all 1. joined: it belongs to the one before
        it, so that both are held out or neither.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            wrong = tokens.max() if tokens.min() >= 0 else tokens.min()
            raise DataError(
                f"{self._stem}, document {self._documents}: token id {wrong} is outside the vocabulary of "
                f"{self._vocab_size}; use the tokenizer that made the ids"
            )
        trained = None if mask is None else np.asarray(mask, dtype=bool).astype(MASK_DTYPE)
        if trained is not None and trained.shape != tokens.shape:
            raise ValueError(f"mask has {len(trained)} entries for {len(tokens)} tokens")
        self._mask.write(trained, len(tokens))
        self._joined.write(np.ones(1, MASK_DTYPE) if joined else None, 1)
        self._tokens += len(tokens)
        self._documents += 1
        self._ids.write(tokens.astype(self._dtype).tobytes())
        self._ends.write(self._tokens.to_bytes(8, "little"))

    def close(self) -> ShardInfo:
        """Make the shard's files appear and return what the manifest needs."""
        if self._info is None:
            files = self._files()
            for suffix in {"mask", "joined"} - files.keys():
                self._file(suffix).unlink(missing_ok=True)
            digests = {suffix: file.publish() for suffix, file in files.items()}
            self._info = ShardInfo(self._name, self._tokens, self._documents, "mask" in files, digests)
        return self._info

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._info is None:
            for file in self._files().values():
                file.discard()

    def _files(self) -> dict[str, "HashedFile"]:
        marks = {"mask": self._mask.file, "joined": self._joined.file}
        return {"tokens": self._ids, "ends": self._ends} | {suffix: file for suffix, file in marks.items() if file}

    def _file(self, suffix: str) -> Path:
        return self._stem.with_name(f"{self._name}.{suffix}")


def write_manifest(
    folder: str | Path,
    shards: Sequence[ShardInfo],
    *,
    tokenizer: Mapping[str, Any],
    num_bytes: int,
    options: Mapping[str, Any],
) -> None:
    """Write the manifest, atomically; its presence says that the data is complete.

    tokenizer: at least `fingerprint` and `vocab_size`. num_bytes: UTF-8 bytes of the text behind the tokens.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(tokenizer["vocab_size"]),
        "tokenizer": dict(tokenizer),
        "num_tokens": sum(shard.tokens for shard in shards),
        "num_documents": sum(shard.documents for shard in shards),
        "num_bytes": num_bytes,
        "shards": [asdict(shard) for shard in shards],
        "options": dict(options),
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_atomically(Path(folder) / MANIFEST, text.encode())


class ShardSet:
    """A prepared folder, read as one run of tokens: the concatenation of its shards' documents."""

    def __init__(self, path: Path, manifest: dict[str, Any], shards: Sequence[ShardInfo]) -> None:
        self.path = path
        self.manifest = manifest
        self.shards = tuple(shards)
        self.dtype = TOKEN_DTYPES[manifest["dtype"]]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self._token_starts = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)
        self._document_starts = np.cumsum([0, *(shard.documents for shard in shards)], dtype=np.int64)
        self._map = lru_cache(maxsize=_OPEN_FILES)(_map_file)

    @classmethod
    def open(cls, path: str | Path) -> "ShardSet":
        """Open a prepared folder and check it: format, completeness, sizes. No token is read yet."""
        folder = Path(path)
        manifest = _read_manifest(folder)
        shards = [_parse_shard(folder, entry) for entry in manifest["shards"]]
        data = cls(folder, manifest, shards)
        data._check_counts()
        for index in range(len(shards)):
            data._check_sizes(index)
        return data

    @property
    def num_tokens(self) -> int:
        return int(self._token_starts[-1])

    @property
    def num_documents(self) -> int:
        return int(self._document_starts[-1])

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Read tokens [start, stop): ids, and which carry loss as targets (None: all of them)."""
        parts = _split(self._token_starts, start, stop)
        ids = _join([self._array(i, "tokens")[a:b] for i, a, b in parts], self.dtype)
        if not any(self.shards[i].masked for i, _, _ in parts):
            return ids, None
        masks = [
            self._array(i, "mask")[a:b] if self.shards[i].masked else np.ones(b - a, MASK_DTYPE) for i, a, b in parts
        ]
        return ids, _join(masks, MASK_DTYPE).astype(bool)

    def ends(self, first: int, last: int) -> NDArray[np.int64]:
        """Return where documents first..last-1 end: exclusive, in tokens from the start of the whole set."""
        parts = _split(self._document_starts, first, last)
        return _join([self._array(i, "ends")[a:b] + self._token_starts[i] for i, a, b in parts], ENDS_DTYPE)

    def leaders(self, first: int, last: int) -> NDArray[np.int64]:
        """Return of each of documents first..last-1 the first one of those that it belongs together with."""
        found = np.arange(first, last, dtype=np.int64)
        if not any(shard.joined for shard in self.shards):
            return found
        for i, a, b in _split(self._document_starts, first, last):
            if not self.shards[i].joined:
                continue
            joined, start = self._array(i, "joined"), a
            while joined[start]:
                start -= 1
            own = np.where(joined[start:b] == 0, np.arange(start, b), start)
            offset = int(self._document_starts[i])
            found[offset + a - first : offset + b - first] = offset + np.maximum.accumulate(own)[a - start :]
        return found

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Read one document, as `read` does."""
        start = int(self.ends(index - 1, index)[0]) if index else 0
        return self.read(start, int(self.ends(index, index + 1)[0]))

    def place(self, index: int) -> str:
        """Say where document `index` is, for messages."""
        i = int(np.searchsorted(self._document_starts, index, side="right")) - 1
        return f"{self._file(i, 'tokens')}, document {index - self._document_starts[i]}"

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the manifest's."""
        for i, shard in enumerate(self.shards):
            for suffix, expected in shard.sha256.items():
                file = self._file(i, suffix)
                with file.open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
                if found != expected:
                    raise DataError(
                        f"{file}: its SHA-256 is {found}, but {MANIFEST} says {expected}; the file was "
                        "changed or damaged: copy it again, or prepare the data again"
                    )

    def _check_counts(self) -> None:
        for name, found in (("num_tokens", self.num_tokens), ("num_documents", self.num_documents)):
            if self.manifest[name] != found:
                raise DataError(
                    f"{self.path / MANIFEST}: {name} is {self.manifest[name]}, but its shards add up to "
                    f"{found}; the file was edited: prepare the data again"
                )

    def _check_sizes(self, index: int) -> None:
        shard = self.shards[index]
        for suffix in ("tokens", "ends", *(["mask"] if shard.masked else []), *(["joined"] if shard.joined else [])):
            file = self._file(index, suffix)
            dtype, count = self._layout(index, suffix)
            expected = count * dtype.itemsize
            if not file.is_file():
                raise DataError(f"{file}: missing, but {MANIFEST} lists it; copy it again, or prepare again")
            found = file.stat().st_size
            if found != expected:
                raise DataError(
                    f"{file}: {found} bytes, but {MANIFEST} says {count} x {dtype.itemsize} = {expected}; "
                    "the file was cut off or changed: copy it again, or prepare the data again"
                )

    def _array(self, index: int, suffix: str) -> NDArray[Any]:
        dtype, count = self._layout(index, suffix)
        return self._map(self._file(index, suffix), dtype, count)

    def _layout(self, index: int, suffix: str) -> tuple[np.dtype[Any], int]:
        """Return the dtype and the number of entries of one of a shard's files."""
        shard = self.shards[index]
        if suffix == "ends":
            return ENDS_DTYPE, shard.documents
        if suffix == "joined":
            return MASK_DTYPE, shard.documents
        return (self.dtype if suffix == "tokens" else MASK_DTYPE), shard.tokens

    def _file(self, index: int, suffix: str) -> Path:
        return self.path / f"{self.shards[index].name}.{suffix}"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give one written by `tern data prepare`")
        if any(folder.glob("shard-*")):
            raise DataError(f"{folder}: has shards but no {MANIFEST}: run the same `tern data prepare` to its end")
        raise DataError(f"{folder}: has no {MANIFEST}; give a folder written by `tern data prepare`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); prepare the data again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of token shards (its format must be {FORMAT!r})")
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{path}: version {manifest.get('version')}, but this TernLM reads version {VERSION}; "
            "update TernLM or prepare the data again"
        )
    missing = [key for key in ("dtype", "tokenizer", "num_tokens", "num_documents", "shards") if key not in manifest]
    if missing:
        raise DataError(f"{path}: has no {missing[0]!r}; prepare the data again")
    if manifest["dtype"] not in TOKEN_DTYPES:
        raise DataError(f"{path}: dtype {manifest['dtype']!r} must be one of {', '.join(TOKEN_DTYPES)}")
    return manifest


def _parse_shard(folder: Path, entry: dict[str, Any]) -> ShardInfo:
    names = [field.name for field in fields(ShardInfo)]
    try:
        return ShardInfo(**{name: entry[name] for name in names})
    except KeyError as error:
        raise DataError(f"{folder / MANIFEST}: a shard has no {error}; prepare the data again") from error


def _map_file(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    try:
        # As a plain array: slices of a memmap are slow to make.
        return np.memmap(path, dtype, mode="r", shape=(count,)).view(np.ndarray)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); was it moved or changed since the start?") from error


def _split(starts: NDArray[np.int64], start: int, stop: int) -> list[tuple[int, int, int]]:
    """Cut a global range into (shard, from, to) by the shards' first items."""
    if not 0 <= start <= stop <= starts[-1]:
        raise IndexError(f"[{start}, {stop}) is not within [0, {starts[-1]})")
    parts = []
    i = int(np.searchsorted(starts, start, side="right")) - 1
    while start < stop:
        first, end = int(starts[i]), int(starts[i + 1])
        if end > start:
            parts.append((i, start - first, min(stop, end) - first))
            start = min(stop, end)
        i += 1
    return parts


def _join(parts: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype)
