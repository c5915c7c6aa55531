"""One process at a time trains a run: two would remove each other's checkpoints."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ternlm.config.section import ConfigError


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run's folder; raises ConfigError where another process does. A killed holder leaves no trace."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"out = {str(folder)!r} is being trained by another process; wait for it, or choose another out"
            ) from None
        yield
