"""Write checkpoints: tensors by DCP, facts as JSON, the marker last; in the background unless told otherwise."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed.checkpoint as dcp

from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import MARKER, checkpoint_folder, prune, remove, sync
from ternlm.checkpoint.tensors import copy_to_cpu, one_process
from ternlm.config.training import CheckpointConfig

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
"""Facts of the run at this step: progress, data position, model and tokenizer."""


class Saver:
    """Saves the checkpoints of one run, at most one at a time, and keeps those that the retention rule keeps."""

    def __init__(self, run: Path, config: CheckpointConfig, write_files: Callable[[Path], None]) -> None:
        """write_files: puts the run's settings and tokenizer into a new checkpoint's folder."""
        self.run, self.config = run, config
        self._write_files = write_files
        self._thread: Thread | None = None
        self._failure: Exception | None = None

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Save after `step` steps; returns once the tensors are copied, unless `checkpoint.wait`.

        Raises CheckpointError where this or the save before it failed.
        """
        self.wait()
        if self.config.wait:
            self._write(step, tensors, state)
            self._raise_failure()
            return
        copies = copy_to_cpu(tensors)
        self._thread = Thread(target=self._write, args=(step, copies, state), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save under way is on the disk; raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(f"saving into {self.run} failed: {failure}") from failure

    def _write(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        started = time.monotonic()
        folder = checkpoint_folder(self.run, step)
        try:
            if folder.exists():
                remove(folder)
            folder.mkdir(parents=True)
            with one_process():
                dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), no_dist=True)
            self._write_files(folder)
            _write_synced(folder / STATE_FILE, json.dumps(state, indent=1))
            for path in folder.iterdir():
                sync(path)
            _write_synced(folder / MARKER, f"{step}\n")
            for path in (folder, folder.parent):
                sync(path)
            prune(self.run, self.config)
            logger.info("saved %s in %.1f s", folder, time.monotonic() - started)
        except Exception as failure:  # reported by the next save or wait
            self._failure = failure


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
