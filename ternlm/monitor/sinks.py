"""Where metrics and sampled text go: a progress bar or lines, a JSONL file, TensorBoard.

The trainer opens the sinks that the settings name and writes to each of them; none knows of another. On
resume the recorded ones forget what the interrupted run wrote after the checkpoint.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from ternlm.config.section import ConfigError
from ternlm.config.training import MonitorConfig
from ternlm.monitor.names import find_metric

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """What takes metrics and text of a step (steps done, from 1; 0 before the first)."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take some metrics of a step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a piece of text, such as a sample."""

    def sync(self) -> None:
        """Make a record of what was taken so far last, since a checkpoint that builds on it is about to be saved."""

    def close(self) -> None:
        """Finish; nothing is written after it."""


def open_sinks(
    monitor: MonitorConfig,
    folder: Path,
    total_steps: int,
    resume_step: int = 0,
    max_seconds: float | None = None,
) -> list[Sink]:
    """Open the sinks that `monitor` names.

    folder: the run's. resume_step: steps done by the checkpoint that the run goes on from; 0 for a new run,
    whose records start empty. max_seconds: the run's time budget.
    """
    sinks: list[Sink] = []
    if monitor.jsonl:
        sinks.append(JsonlSink(folder / "metrics.jsonl", resume_step))
    if monitor.tensorboard:
        sinks.append(TensorboardSink(folder / "tensorboard", resume_step))
    # On the error stream, as the log: a bar on another would be torn by each line of it.
    console = Console(stderr=True)
    progress = monitor.progress
    if progress == "auto":
        progress = "bar" if console.is_terminal and sys.stdout.isatty() else "lines"
    if progress == "bar":
        sinks.append(ProgressSink(total_steps, resume_step, max_seconds, console))
    elif progress == "lines":
        sinks.append(LineSink(total_steps, sys.stdout))
    return sinks


class JsonlSink:
    """One JSON object a line: `{"step": 3, "loss/total": 2.5}`, or with text `{"step", "name", "text"}`.

    Numbers that JSON can't express are the strings "NaN", "Infinity" and "-Infinity", which Python's `float`
    reads. A line is handed to the system at once, so a killed process loses at most the one it was writing; a power
    cut, what came after the last `sync`.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_after(path, resume_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        _sync_folder(path.parent)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line with all of the metrics."""
        self._append({"step": step, **{name: _json_number(value) for name, value in metrics.items()}})

    def text(self, step: int, name: str, text: str) -> None:
        """Append one line with the text."""
        self._append({"step": step, "name": name, "text": text})

    def sync(self) -> None:
        """Put what was written on the disk."""
        with self._warned_of_trouble():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with self._warned_of_trouble():
            self._file.close()

    def _append(self, line: Mapping[str, object]) -> None:
        with self._warned_of_trouble():
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    @contextmanager
    def _warned_of_trouble(self) -> Iterator[None]:
        """Let training go on where its record can't be written, such as on a full disk."""
        try:
            yield
        except OSError as trouble:
            logger.warning("%s can't be written: %s", self._file.name, trouble.strerror or trouble)


class TensorboardSink:
    """TensorBoard events. Raises ConfigError where TensorBoard isn't installed."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as reason:
            raise ConfigError(
                f"monitor.tensorboard = true needs TensorBoard ({reason}); "
                "pip install 'ternlm[tensorboard]', or set monitor.tensorboard=false"
            ) from reason
        # TensorBoard hides what earlier files of the folder hold from purge_step on.
        purge_step = resume_step + 1 if resume_step else 0
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each metric's curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Add the text as it is, not as Markdown."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text(name, indented, step)

    def sync(self) -> None:
        """Hand what waits in memory to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


_SECONDS_BETWEEN_LINES = 1.0


class LineSink:
    """Lines of `key=value`: the brief metrics, or all of them where none is brief.

    Of steps that last less than a second only some are printed; the first, the last and validations always are.
    """

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        self._total_steps = total_steps
        self._stream: TextIO | None = stream
        self._printed_at = -math.inf
        self._held_back: str | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line, or hold it back if another was printed within the last second."""
        line = " ".join((f"step={step}/{self._total_steps}", *_pairs(metrics)))
        wanted = step == self._total_steps or any(name.startswith("validation_") for name in metrics)
        if wanted or time.monotonic() - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._print(line)
        else:
            self._held_back = line

    def text(self, step: int, name: str, text: str) -> None:
        """Print the text below a line that names it."""
        self._show(f"step={step}/{self._total_steps} {name}:\n{text}")

    def sync(self) -> None:
        """Keep nothing: what is printed isn't a record."""

    def close(self) -> None:
        """Print the last line if it was held back; leave the stream open, which isn't this sink's."""
        if self._held_back is not None:
            self._print(self._held_back)

    def _print(self, line: str) -> None:
        self._show(line)
        self._printed_at, self._held_back = time.monotonic(), None

    def _show(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:  # whoever read the lines is gone, which is no reason to stop training
            logger.warning("nobody reads the lines of progress any more; training goes on without them")
            self._stream = None


# The most wanted first: a narrow terminal cuts the end off.
_ON_BAR = {
    "loss": "loss/total",
    "elapsed": "time/elapsed_s",
    "left": "time/eta_s",
    "tokens/s": "speed/tokens_per_s_10",
    "MFU": "speed/mfu_full",
    "lr": "lr/adamw",
}


class ProgressSink:
    """A bar with steps, loss, speed and time; it fills by steps or by the time budget, whichever is ahead."""

    def __init__(
        self,
        total_steps: int,
        resume_step: int = 0,
        max_seconds: float | None = None,
        console: Console | None = None,
    ) -> None:
        self._total_steps, self._max_seconds = total_steps, max_seconds
        columns = (
            TextColumn("{task.fields[done]}/{task.total}"),
            BarColumn(bar_width=12),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        )
        # What else is printed meanwhile goes above the bar, unless it goes to a file.
        self._bar = Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())
        self._task = self._bar.add_task("", total=total_steps, completed=resume_step, done=resume_step)
        self._bar.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar; validation's metrics are printed above it."""
        validation = {name: value for name, value in metrics.items() if name.startswith("validation_")}
        if validation:
            self._print(f"step {step}", *_pairs(validation))
        elapsed = metrics.get("time/elapsed_s", 0.0)
        filled = step / self._total_steps
        if self._max_seconds is not None:
            filled = max(filled, elapsed / self._max_seconds)
        self._bar.update(self._task, done=step, completed=min(filled, 1.0) * self._total_steps)
        if "loss/total" in metrics:
            self._bar.update(self._task, description=self._describe(metrics))

    def text(self, step: int, name: str, text: str) -> None:
        """Print the text above the bar."""
        self._print(f"step {step} {name}:\n{text}")

    def sync(self) -> None:
        """Keep nothing: what is shown isn't a record."""

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()

    def _describe(self, metrics: Mapping[str, float]) -> str:
        parts = []
        for label, name in _ON_BAR.items():
            if name in metrics:
                parts.append(f"{label} {_format(name, metrics[name])}")
                if name == "time/elapsed_s" and self._max_seconds is not None:
                    parts[-1] += f" of {_duration(self._max_seconds)}"
        return escape("  ".join(parts))

    def _print(self, *parts: str) -> None:
        self._bar.console.print(escape(" ".join(parts)), highlight=False, soft_wrap=True)


def _cut_after(path: Path, step: int) -> None:
    """Rewrite the file without the lines of steps > `step` (of any step if 0) and without broken lines."""
    broken, written = 0, path.with_name(path.name + ".tmp")
    with open(path, "rb") as old, open(written, "wb") as new:
        for line in old if step else ():
            try:
                wanted = json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError):
                broken += 1
                continue
            if wanted and line.endswith(b"\n"):
                new.write(line)
        # Renamed before its content is on the disk, a file can come back empty after a power cut.
        new.flush()
        os.fsync(new.fileno())
    if broken:
        logger.warning("%s: left out %d broken lines, such as the half of one", path, broken)
    os.replace(written, path)


def _sync_folder(folder: Path) -> None:
    """Make the names of the files in it last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"


def _pairs(metrics: Mapping[str, float]) -> list[str]:
    """Return `name=value` of the brief metrics, or of all where none is brief."""
    entries = {name: find_metric(name) for name in metrics}
    brief = [name for name, entry in entries.items() if entry is not None and entry.brief]
    return [f"{name}={_format(name, metrics[name])}" for name in brief or metrics]


def _format(name: str, value: float) -> str:
    """Write a metric's value for a reader: durations as h:mm:ss, shares in percent, few digits."""
    entry = find_metric(name)
    unit = entry.unit if entry else ""
    if not math.isfinite(value):
        return str(value)
    if unit == "s":
        return _duration(value) if value >= 60 else f"{value:.2g}s"
    if unit == "share":
        return f"{value:.1%}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"
