"""Files that appear whole, with their hash: what shards are made of."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ternlm.data.atomic import publish, temporary_path

_BLOCK = 1 << 20


class HashedFile:
    """A file that is written beside its place, and the SHA-256 of what was written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = temporary_path(path)
        self._file = self._temporary.open("wb")
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.write(data)
        self._sha256.update(data)

    def publish(self) -> str:
        """Let the file appear, whole and on disk; return its SHA-256, in hex digits."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        publish(self._temporary, self._path)
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Leave no file."""
        with suppress(OSError):  # closing writes what waits, which a full disk refuses again
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class Marks:
    """A file of one byte a token, or a document, that begins to be at the first one unlike the usual."""

    def __init__(self, path: Path, usual: int) -> None:
        self._path = path
        self._usual = bytes([usual])
        self._count = 0
        self.file: HashedFile | None = None

    def write(self, marks: NDArray[np.uint8] | None, count: int) -> None:
        """Write the marks of `count` more. marks: None: all as usual."""
        usual = marks is None or bool((marks == self._usual[0]).all())
        if self.file is None and not usual:
            self.file = HashedFile(self._path)
            for start in range(0, self._count, _BLOCK):
                self.file.write(self._usual * min(_BLOCK, self._count - start))
        if self.file is not None:
            self.file.write(self._usual * count if marks is None else marks.tobytes())
        self._count += count
