"""Files that are either whole or absent, whatever kills the process: write beside, fsync, rename."""

import os
import socket
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`; two writers of the same bytes do no harm."""
    temporary = temporary_path(path)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def temporary_path(path: Path) -> Path:
    """Name the place where this process writes `path` until it is whole."""
    return path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")


def publish(temporary: Path, path: Path) -> None:
    """Give a file or folder that is written and synced its name, and make the name last through a power cut."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what a killed writer left behind."""
    return ".tmp-" in name
