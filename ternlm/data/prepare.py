"""`tern data prepare`: raw text in, a folder of token shards out, by many workers and on many machines.

Every work unit makes one shard whose bytes depend on inputs, tokenizer and options alone; a unit is done when
its .json is there. So a killed run goes on where it was, and whoever does the last unit writes the manifest.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from ternlm.data.atomic import is_temporary
from ternlm.data.claim import claim_folder
from ternlm.data.encode import (
    EncodeOptions,
    OnError,
    UnitReport,
    encode_unit,
    read_report,
    unit_name,
)
from ternlm.data.errors import DataError
from ternlm.data.plan import FormatChoice, Unit, default_unit_bytes, describe_units, find_inputs, make_units
from ternlm.data.readers import ReadOptions, TextDocument
from ternlm.data.samples import ConversationOptions, describe_counts, merge_counts
from ternlm.data.shards import MANIFEST, write_manifest
from ternlm.data.spans import InputFile
from ternlm.data.tokenizer import Tokenizer, load_tokenizer
from ternlm.data.workers import run_tasks

_PLAN_VERSION = 1


@dataclass(frozen=True)
class Prepared:
    """What a call of `prepare` left in the folder, and what it did itself."""

    folder: Path
    complete: bool
    """The manifest is there. Else other parts are still to do."""
    shards: int
    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the text behind the tokens. Like shards, documents and tokens, of this part alone."""
    skipped: dict[str, dict[str, Any]]
    """Per kind of record left out: `count`, and the `first` one's place and trouble."""
    new_shards: int
    new_tokens: int
    seconds: float
    conversations: dict[str, Any] | None = None
    """Number of conversations, samples, trained tokens, and conversations per format; None: texts were prepared."""


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    *,
    workers: int | None = None,
    part: str | None = None,
    on_error: OnError = "fail",
    field: str = "text",
    format: FormatChoice = "auto",
    include: str = "*",
    text_document: TextDocument = "file",
    unit_bytes: int | None = None,
    bos: bool = True,
    eos: bool = True,
    conversations: ConversationOptions | None = None,
    console: Console | None = None,
) -> Prepared:
    """Turn files and folders of text into token shards in the folder `out`; or go on where a killed run was.

    workers: processes, as many as cores if not given.
    part: "i/n" does every n-th unit from the i-th (from 1); n calls, on n machines if need be, fill one folder.
    on_error: stop at the first record that can't be used, or leave such records out and count them.
    field: the one that holds the text in json, jsonl and parquet records.
    include: pattern for the files in folders.
    unit_bytes: input for one shard; by the size of the input if not given.
    bos, eos: begin and end each document with the tokenizer's own; InternLM's .bin files stay as they are.
    conversations: how to make samples of records that hold conversations, in place of documents of a text.
    console: where to show progress and a summary; None is silent.
    """
    _check_choices(on_error=on_error, text_document=text_document, unit_bytes=unit_bytes, workers=workers)
    folder = Path(out)
    its = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    if eos and its.eos_id is None and conversations is None:
        raise DataError(
            "the tokenizer has no eos token to end documents with; name one as eos_token in "
            "tokenizer_config.json beside it, or choose --no-eos"
        )
    _refuse_own_output(inputs, folder)
    files = find_inputs(inputs, format=format, include=include, records=conversations is not None)
    unit_bytes = unit_bytes or default_unit_bytes(sum(file.size for file in files))
    units = make_units(files, text_document, unit_bytes)
    settings: dict[str, Any] = {"field": field, "text_document": text_document, "bos": bos, "eos": eos}
    settings["unit_bytes"] = unit_bytes
    if conversations is not None:
        _check_conversations(conversations, files, its)
        settings["conversations"] = conversations.settings()
    plan = {
        "version": _PLAN_VERSION,
        "tokenizer": its.fingerprint,
        "options": settings,
        **describe_units(files, units),
    }
    mine = _units_of(part, len(units))
    claim_folder(folder, plan, its)
    options = EncodeOptions(ReadOptions(field, text_document), bos, eos, on_error, conversations)
    run = _Run(folder, units, options, its, settings, console or Console(quiet=True))
    return run.complete() or run.go_on(mine, workers or _cores())


@dataclass(frozen=True)
class _Run:
    """The work that the plan asks for, in its folder."""

    folder: Path
    units: list[Unit]
    options: EncodeOptions
    tokenizer: Tokenizer
    settings: dict[str, Any]
    console: Console

    def complete(self) -> Prepared | None:
        """Say what the folder holds if all its shards and its manifest are there, whoever made them."""
        if not (self.folder / MANIFEST).exists():
            return None
        reports = self._reports(range(len(self.units)))
        if len(reports) < len(self.units):
            return None
        self.console.print(f"{self.folder}: complete already, nothing to do")
        prepared = _sum_up(self.folder, reports, {}, 0.0, complete=True)
        _print_summary(prepared, self.console)
        return prepared

    def go_on(self, mine: Sequence[int], workers: int) -> Prepared:
        """Do those units of `mine` that aren't done, and the manifest if no unit is left."""
        (self.folder / MANIFEST).unlink(missing_ok=True)  # a shard of it is damaged
        reports = self._reports(mine)
        if self.options.on_error == "fail":  # a record left out by an earlier run is an error now
            reports = {index: report for index, report in reports.items() if not report.faults()}
        pending = [index for index in mine if index not in reports]
        _remove_temporary(self.folder, {unit_name(index) for index in pending})
        started = time.perf_counter()
        new: dict[int, UnitReport] = {}
        make_work = partial(_make_work, self.folder, self.units, self.options)
        with _progress(self.console, sum(self.units[index].size for index in pending)) as advance:
            for index, report in run_tasks(make_work, pending, workers):
                new[index] = report
                advance(self.units[index].size)
        seconds = time.perf_counter() - started
        complete = self._finish()
        prepared = _sum_up(self.folder, reports | new, new, seconds, complete=complete)
        _print_summary(prepared, self.console)
        return prepared

    def _finish(self) -> bool:
        """Write the manifest if every unit, of whatever part, is done."""
        reports = self._reports(range(len(self.units)))
        if len(reports) < len(self.units):
            return False
        if not any(report.shard.documents for report in reports.values()):
            reasons = "".join(
                f"\n  left out {entry['count']:,} for {kind}, the first: {entry['first']}"
                for kind, entry in _sum_skipped(reports).items()
            )
            raise DataError(f"the inputs hold no document, so there is nothing to train on{reasons}")
        _remove_temporary(self.folder, None)
        try:
            write_manifest(
                self.folder,
                [report.shard for report in reports.values()],
                tokenizer=self.tokenizer.facts(),
                num_bytes=sum(report.bytes for report in reports.values()),
                options=self.settings | self._counted(reports),
            )
        except FileNotFoundError:  # another part ends at the same moment, took ours away and writes the same
            return True
        return True

    def _counted(self, reports: dict[int, UnitReport]) -> dict[str, Any]:
        """Return what the units counted, for the manifest."""
        skipped = {"skipped": _sum_skipped(reports)}
        if self.options.conversations is None:
            return skipped
        return skipped | {"counts": merge_counts(report.conversations for report in reports.values())}

    def _reports(self, indices: Sequence[int]) -> dict[int, UnitReport]:
        found = {index: read_report(self.folder, index, self.tokenizer.vocab_size) for index in indices}
        return {index: report for index, report in found.items() if report is not None}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _make_work(folder: Path, units: list[Unit], options: EncodeOptions) -> Callable[[int], UnitReport]:
    """Set a worker up; it loads the folder's own copy of the tokenizer."""
    tokenizer = load_tokenizer(folder)
    return lambda index: encode_unit(folder, index, units[index], tokenizer, options)


def _check_choices(**values: Any) -> None:
    choices = {"on_error": get_args(OnError), "text_document": get_args(TextDocument)}
    for name, value in values.items():
        if name in choices and value not in choices[name]:
            raise DataError(f"{name} = {value!r} must be one of {', '.join(choices[name])}")
        if name not in choices and value is not None and value < 1:
            raise DataError(f"{name} = {value} must be at least 1")


def _units_of(part: str | None, count: int) -> range:
    """Choose the units of part "i/n": every n-th from the i-th, counted from 1."""
    if part is None:
        return range(count)
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    first, step = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= step:
        raise DataError(f"part = {part!r} must be i/n with 1 <= i <= n, such as 1/4 for the first of four")
    return range(first - 1, count, step)


def _check_conversations(options: ConversationOptions, files: Sequence[InputFile], tokenizer: Tokenizer) -> None:
    """Refuse files that hold no conversations, and end tokens that the tokenizer hasn't, before any work."""
    for token in options.stop:
        tokenizer.id_of(token)
    for file in files:
        if file.format == "text":
            raise DataError(f"{file.path}: a text file holds no conversations; give json, jsonl, parquet or .bin files")
        if options.format == "internlm" and file.format != "internlm":
            raise DataError(f"{file.path}: isn't one of InternLM's .bin files; name its own format, or choose auto")


def _refuse_own_output(inputs: Sequence[str | Path], folder: Path) -> None:
    for place in map(Path, inputs):
        if place.is_dir() and folder.resolve().is_relative_to(place.resolve()):
            raise DataError(
                f"the output {folder} lies in the input {place}, so its files would be input the next time; "
                "choose a folder elsewhere"
            )


def _remove_temporary(folder: Path, stems: set[str] | None) -> None:
    """Remove what killed writers left, of these shards or (None) of anything."""
    for name in os.listdir(folder):
        if is_temporary(name) and (stems is None or name.split(".")[0] in stems):
            (folder / name).unlink(missing_ok=True)


def _sum_up(
    folder: Path,
    reports: dict[int, UnitReport],
    new: dict[int, UnitReport],
    seconds: float,
    *,
    complete: bool,
) -> Prepared:
    talks = [report.conversations for report in reports.values()]
    return Prepared(
        folder=folder,
        complete=complete,
        shards=len(reports),
        documents=sum(report.shard.documents for report in reports.values()),
        tokens=sum(report.shard.tokens for report in reports.values()),
        bytes=sum(report.bytes for report in reports.values()),
        skipped=_sum_skipped(reports),
        new_shards=len(new),
        new_tokens=sum(report.shard.tokens for report in new.values()),
        seconds=seconds,
        conversations=merge_counts(talks) if any(talks) else None,
    )


def _sum_skipped(reports: dict[int, UnitReport]) -> dict[str, dict[str, Any]]:
    """Add up what units left out, by kind; of each kind the first."""
    skipped: dict[str, dict[str, Any]] = {}
    for _, report in sorted(reports.items()):
        for kind, entry in report.skipped.items():
            total = skipped.setdefault(kind, {"count": 0, "first": entry["first"]})
            total["count"] += entry["count"]
    return dict(sorted(skipped.items()))


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar over input bytes, on a terminal; yields the function that moves it on."""
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda size: bar.advance(task, size)


def _print_summary(prepared: Prepared, console: Console) -> None:
    ratio = prepared.bytes / max(prepared.tokens, 1)
    rows = [
        ("shards", f"{prepared.shards:,}"),
        ("documents", f"{prepared.documents:,}"),
        ("tokens", f"{prepared.tokens:,}"),
        (
            "text",
            f"{decimal(prepared.bytes)}, {ratio:.2f} bytes per token",
        ),
    ]
    if prepared.conversations is not None:
        rows.append(("conversations", describe_counts(prepared.conversations, prepared.tokens)))
    if prepared.new_shards:
        speed = prepared.new_tokens / max(prepared.seconds, 1e-9)
        run = f"{prepared.new_shards:,} shards in {prepared.seconds:.1f} s, {speed:,.0f} tokens/s"
        rows.append(("this run", run))
    for kind, entry in prepared.skipped.items():
        rows.append(("left out", f"{entry['count']:,} for {kind}, the first: {entry['first']}"))
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)
    if not prepared.complete:
        console.print(
            f"{prepared.folder}: this part is done, others aren't. The last one to end writes {MANIFEST}; "
            "if it isn't there at the end, run any part again"
        )
