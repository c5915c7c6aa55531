"""Write checkpoints: tensors by DCP, facts as JSON, the marker last; in the background unless told otherwise.

Every rank writes its own pieces; rank 0 makes the folder, writes the facts and, when all are done, the marker.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ternlm.checkpoint.causes import cause_of
from ternlm.checkpoint.checksums import digests, marker_text
from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import MARKER, checkpoint_folder, prune, remove, remove_incomplete, sync
from ternlm.checkpoint.tensors import SavePlanner, copy_to_cpu, one_process
from ternlm.config.training import CheckpointConfig
from ternlm.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
"""Facts of the run at this step: progress, data position, model and tokenizer."""


class LostRanks(RuntimeError):
    """Ranks could not be heard during a save; there can't be another one, so the run has to end."""


class Saver:
    """Saves the checkpoints of one run, at most one at a time, and keeps those that the retention rule keeps."""

    def __init__(self, run: Path, config: CheckpointConfig, write_files: Callable[[Path], None], mesh: Mesh) -> None:
        """write_files: puts the run's settings and tokenizer into a new checkpoint's folder."""
        self.run, self.config, self._mesh = run, config, mesh
        self._write_files = write_files
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any], kept: Collection[int] = ()) -> None:
        """Save after `step` steps; returns once the tensors are copied, unless `checkpoint.wait`.

        kept: steps whose checkpoints the retention rule is to keep too. Collective: every rank must call it.
        A save that fails is logged at once and leaves nothing behind; training goes on, and the next save is tried.
        Raises LostRanks where the one before could not reach the other ranks.
        """
        self._join()
        if self.config.wait:
            self._write(step, tensors, state, kept)
            return
        copies = copy_to_cpu(tensors)
        self._thread = Thread(target=self._write, args=(step, copies, state, kept), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until the last save is on the disk; raises CheckpointError if it failed."""
        self._join()
        if self._failure is not None:
            raise CheckpointError(
                f"the last save into {self.run} failed: {cause_of(self._failure)}; what was saved before it is complete"
            ) from self._failure

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if isinstance(self._failure, LostRanks):
            raise self._failure

    def _write(self, step: int, tensors: dict[str, Any], state: dict[str, Any], kept: Collection[int]) -> None:
        started, folder, self._failure = time.monotonic(), checkpoint_folder(self.run, step), None
        try:
            self._write_folder(folder, step, tensors, state)
        except (Exception, CheckpointException) as failure:  # DCP's own isn't an Exception
            self._failure = failure
            if self._mesh.is_first:
                logger.error("saving %s failed: %s", folder, cause_of(failure))
                # Ranks may be lost on the way out, after the marker: then the checkpoint is complete.
                if not (isinstance(failure, LostRanks) and (folder / MARKER).exists()):
                    shutil.rmtree(folder, ignore_errors=True)
            return
        if not self._mesh.is_first:
            return
        logger.info("saved %s in %.1f s", folder, time.monotonic() - started)
        try:
            prune(self.run, self.config, kept)
        except OSError as trouble:
            logger.warning("old checkpoints in %s can't be removed: %s", self.run, trouble)

    def _write_folder(self, folder: Path, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        self._on_first(lambda: self._make_folder(folder))
        with one_process(), self._hearing_others():
            dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
                planner=SavePlanner(),
                process_group=self._mesh.control,
                no_dist=self._mesh.control is None,
            )
        own = [path.name for path in folder.glob(f"__{self._mesh.place.rank}_*")]
        parts = self._together(lambda: digests(folder, own))
        self._on_first(lambda: self._finish_folder(folder, state, {k: v for part in parts for k, v in part.items()}))

    def _make_folder(self, folder: Path) -> None:
        remove_incomplete(self.run)
        if folder.exists():
            remove(folder)
        folder.mkdir(parents=True)

    def _finish_folder(self, folder: Path, state: dict[str, Any], known: dict[str, str]) -> None:
        missing = sorted(name for name in known if not (folder / name).is_file())
        if missing:
            raise CheckpointError(
                f"{folder}: rank 0 doesn't see {', '.join(missing[:4])}, which other ranks have written; out must be "
                "on a file system that all nodes share, and that shows each what the others write"
            )
        self._write_files(folder)
        _write_synced(folder / STATE_FILE, json.dumps(state, indent=1))
        for path in (*folder.iterdir(), folder):
            sync(path)
        _write_synced(folder / MARKER, marker_text(folder, known))
        for path in (folder, folder.parent, self.run):
            sync(path)

    def _on_first(self, act: Callable[[], None]) -> None:
        """Act on rank 0; the others wait, and fail where it fails."""
        self._together(act if self._mesh.is_first else lambda: None)

    def _together(self, act: Callable[[], Any]) -> list[Any]:
        """Act on every rank and return all results; raises on every rank where one fails."""
        if self._mesh.control is None:
            return [act()]
        try:
            outcome = (True, act())
        except Exception as failure:
            outcome = (False, failure)
        outcomes: list[Any] = [None] * self._mesh.layout.world
        with self._hearing_others():
            dist.all_gather_object(outcomes, outcome, group=self._mesh.control)
        for good, value in outcomes:
            if not good:
                raise value
        return [value for _, value in outcomes]

    @contextmanager
    def _hearing_others(self) -> Iterator[None]:
        """Tell failures of the connections from those of writing, which DCP brings to all ranks in its own error."""
        try:
            yield
        except RuntimeError as trouble:
            if self._mesh.control is None:
                raise
            raise LostRanks(f"a save could not reach the other ranks: {cause_of(trouble)}") from trouble


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
