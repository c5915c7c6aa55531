"""SHA-256 of a checkpoint's files, kept in its marker: what a disk has damaged is refused, not trained on.

The marker's lines are those of `sha256sum`, so that `sha256sum -c COMPLETE` in the folder says the same.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import MARKER


def marker_text(folder: Path, known: dict[str, str] | None = None) -> str:
    """Return what belongs in the marker of a checkpoint whose other files are all there.

    known: SHA-256 by name of files that need no reading.
    """
    known = known or {}
    names = [path.name for path in folder.iterdir() if path.name != MARKER]
    found = {**digests(folder, [name for name in names if name not in known]), **known}
    return "".join(f"{found[name]}  {name}\n" for name in sorted(names))


def check_files(checkpoint: Path, names: Iterable[str] | None = None, share: tuple[int, int] = (0, 1)) -> None:
    """Raise CheckpointError where a file isn't what was written.

    names: only these of the checkpoint's files. share: (i, n) checks every n-th file from the i-th, one rank's part.
    """
    written = _read_marker(checkpoint)
    names = sorted(written)[share[0] :: share[1]] if names is None else [name for name in names if name in written]
    try:
        found = digests(checkpoint, names)
    except OSError as trouble:
        raise CheckpointError(f"{checkpoint}: can't be read ({trouble}); {_REMEDY}") from trouble
    for name in names:
        if found[name] != written[name]:
            raise CheckpointError(
                f"{checkpoint / name}: damaged since it was written (its SHA-256 isn't the one in {MARKER}); {_REMEDY}"
            )


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """Return the SHA-256 of a folder's files by their names."""
    # Threads, since hashlib lets go of the interpreter's lock: 1.5-2 GB/s each.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


_REMEDY = "move this checkpoint's folder away to go on from an older one"


def _read_marker(checkpoint: Path) -> dict[str, str]:
    try:
        lines = (checkpoint / MARKER).read_text(encoding="utf-8").splitlines()
        pairs = (line.split("  ", 1) for line in lines)
        digests = {name: digest for digest, name in pairs}
    except (OSError, ValueError) as trouble:
        raise CheckpointError(f"{checkpoint / MARKER}: can't be read ({trouble}); {_REMEDY}") from trouble
    if not digests:
        raise CheckpointError(f"{checkpoint / MARKER}: names no file; {_REMEDY}")
    return digests


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
