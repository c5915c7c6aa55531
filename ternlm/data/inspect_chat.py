"""`tern data inspect --chat`: what conversations become as tokens, before a folder of them is prepared.

The first records of each file are prepared into a temporary folder, which `inspect` then shows.
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ternlm.data.encode import SkippedRecords
from ternlm.data.errors import DataError
from ternlm.data.inspect import inspect
from ternlm.data.plan import find_inputs
from ternlm.data.samples import ConversationOptions, Counts, add_samples, read_samples
from ternlm.data.shards import ShardWriter, write_manifest
from ternlm.data.spans import InputFile, Span
from ternlm.data.tokenizer import Tokenizer


def inspect_conversations(
    path: str | Path,
    tokenizer: Tokenizer,
    options: ConversationOptions,
    *,
    documents: int = 3,
    chars: int = 600,
    records: int = 2000,
    seq_len: int | None = None,
    plain: bool = False,
    console: Console | None = None,
) -> None:
    """Print what the first `records` conversations of a file, or of each file in a folder, become as samples.

    Beside what `inspect` prints: the format found, what can't be used and why, and whether the chat template is a
    prefix of itself over turns, so that a conversation is one sample. The other arguments are `inspect`'s.
    """
    if records < 1:
        raise DataError(f"records = {records} must be at least 1")
    console = console or Console()
    with TemporaryDirectory(prefix="tern-inspect-") as folder:
        seen = _Seen()
        with ShardWriter(folder, "shard-00000", tokenizer.vocab_size) as writer:
            for file in find_inputs([path], records=True):
                if file.format == "internlm":
                    raise DataError(f"{file.path}: is in tokens already; inspect it without a chat protocol")
                seen.files.append((file, _write(file, writer, tokenizer, options, records, seen)))
        console.print(Text(str(path), style="bold"))
        console.print(_table(seen, records))
        if not seen.counts.samples:
            raise DataError(f"{path}: the first {records:,} records hold no conversation to train on")
        tokenizer.save(folder)
        write_manifest(
            folder,
            [writer.close()],
            tokenizer=tokenizer.facts(),
            num_bytes=seen.counts.bytes,
            options={"conversations": options.settings()},
        )
        inspect(
            folder,
            documents=documents,
            chars=chars,
            seq_len=seq_len,
            plain=plain,
            title="as samples",
            console=console,
        )


@dataclass
class _Seen:
    """What was read."""

    files: list[tuple[InputFile, tuple[str, int]]] = field(default_factory=list)
    """With the format found and the number of conversations."""
    counts: Counts = field(default_factory=Counts)
    skipped: SkippedRecords = field(default_factory=lambda: SkippedRecords("skip"))
    many_turns: int = 0
    """Conversations with more than one answer to train on,"""
    in_one: int = 0
    """and those of them that are one sample."""


def _write(
    file: InputFile,
    writer: ShardWriter,
    tokenizer: Tokenizer,
    options: ConversationOptions,
    records: int,
    seen: _Seen,
) -> tuple[str, int]:
    """Write the samples of a file's first conversations; returns their format and number."""
    found, number = "none", 0
    for _, format, conversation, samples in islice(read_samples(Span(file), tokenizer, options, seen.skipped), records):
        found, number = format, number + 1
        add_samples(writer, seen.counts, format, conversation, samples)
        if sum(bool(message["loss"]) for message in conversation.messages) > 1:
            seen.many_turns += 1
            seen.in_one += len(samples) == 1
    return found, number


def _table(seen: _Seen, records: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for file, (format, number) in seen.files:
        which = f"the first {number:,}" if number == records else f"all {number:,}"
        table.add_row("read", Text(f"{file.name}: {which} conversations, of the format {format}"))
    for kind, entry in seen.skipped.kinds.items():
        table.add_row("can't be used", Text(f"{entry['count']:,} for {kind}, the first: {entry['first']}"))
    if not seen.many_turns:
        said = "no conversation has several answers to train on, so each is one sample"
    elif seen.in_one == seen.many_turns:
        said = (
            f"a prefix of itself over turns: each of {seen.many_turns:,} conversations with several answers is one "
            "sample"
        )
    else:
        said = (
            f"not always a prefix of itself over turns: {seen.many_turns - seen.in_one:,} of {seen.many_turns:,} "
            "conversations with several answers are a sample per answer"
        )
    table.add_row("template", Text(said))
    return table
