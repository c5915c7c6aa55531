"""Where checkpoints lie: `RUN/checkpoints/step-00000100/`, complete when its marker is there.

The marker is written after everything else has reached the disk, so whatever kills a process in the middle of a
save leaves a folder that nobody takes for a checkpoint.
"""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ternlm.checkpoint.errors import CheckpointError
from ternlm.config.training import CheckpointConfig

MARKER = "COMPLETE"
_NAME = re.compile(r"^step-(\d{8,})$")


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps of the run in folder `run`."""
    return run / "checkpoints" / f"step-{step:08d}"


def complete_steps(run: Path) -> list[int]:
    """Return the steps of the run's complete checkpoints, ascending."""
    return [step for step, complete in _steps(run) if complete]


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest complete one of a run's folder."""
    if (path / MARKER).exists():
        return path
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; give a run's folder or one of its checkpoints")
    steps = complete_steps(path)
    if not steps and path.name == "checkpoints":
        steps, path = complete_steps(path.parent), path.parent
    if steps:
        return checkpoint_folder(path, steps[-1])
    if _NAME.match(path.name):
        raise CheckpointError(f"{path}: this checkpoint was never completed ({MARKER} is missing); take another")
    raise CheckpointError(f"{path}: holds no complete checkpoint; give a run's folder or one of its checkpoints")


def prune(run: Path, config: CheckpointConfig, also: Collection[int] = ()) -> None:
    """Remove the complete checkpoints that the retention rule doesn't keep, but those after the steps of `also`."""
    steps = complete_steps(run)
    kept = {*steps[-config.keep_last :], *also}
    if config.keep_every_steps:
        kept |= {step for step in steps if step % config.keep_every_steps == 0}
    for step in set(steps) - kept:
        remove(checkpoint_folder(run, step))


def remove_incomplete(run: Path) -> None:
    """Remove what killed or failed saves have left; only the process that trains the run may call it."""
    for step, complete in _steps(run):
        if not complete:
            remove(checkpoint_folder(run, step))


def remove(folder: Path) -> None:
    """Remove a checkpoint; its marker goes first, so that a half-removed one never counts."""
    (folder / MARKER).unlink(missing_ok=True)
    sync(folder)
    shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _steps(run: Path) -> list[tuple[int, bool]]:
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return sorted((step, (path / MARKER).exists()) for step, path in found)
