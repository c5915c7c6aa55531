"""Turns one work unit into one shard: reads its spans, encodes them, writes tokens and a report.

Runs inside a worker of `prepare`. What a unit's files hold depends on the unit, tokenizer and options alone.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ternlm.data.atomic import write_atomically
from ternlm.data.errors import DataError
from ternlm.data.internlm import InternLMFiles
from ternlm.data.plan import Unit
from ternlm.data.readers import ReadOptions, read_documents
from ternlm.data.samples import (
    BAD_CONVERSATION,
    NO_ANSWER,
    NO_FORMAT,
    OTHER_FORMAT,
    ConversationOptions,
    Counts,
    write_samples,
)
from ternlm.data.shards import TOKEN_DTYPES, ShardInfo, ShardWriter, token_dtype
from ternlm.data.spans import (
    DAMAGED,
    EMPTY_FILE,
    EMPTY_TEXT,
    NO_FIELD,
    NOT_JSON,
    NOT_UTF8,
    TOO_LONG,
    WRONG_TYPE,
    BadRecord,
    Span,
)
from ternlm.data.tokenizer import Tokenizer

OnError = Literal["fail", "skip"]
BAD_TOKENS = "bad tokens"

_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 19, 2048
_REMEDIES = {
    NOT_UTF8: "text must be UTF-8; convert the file",
    NOT_JSON: "put the line right",
    NO_FIELD: "name the field that holds the text with --field",
    WRONG_TYPE: "name the field that holds the text with --field",
    EMPTY_FILE: "remove the file",
    DAMAGED: "copy or compress the file again",
    NO_FORMAT: "bring the file into one of these formats",
    OTHER_FORMAT: "give each format its own files; name it where it isn't found: --conversations or data.format",
    NO_ANSWER: "give the conversation an answer that carries loss",
    BAD_CONVERSATION: "put the record right",
    TOO_LONG: "for text files choose --text-document line or paragraph, else split the document",
    BAD_TOKENS: "use the tokenizer that made the ids",
}


@dataclass(frozen=True)
class EncodeOptions:
    """How a unit is read and written, beside the tokenizer."""

    read: ReadOptions
    bos: bool
    eos: bool
    on_error: OnError
    conversations: ConversationOptions | None = None
    """How to read records as conversations; None: as texts."""


@dataclass(frozen=True)
class UnitReport:
    """What came of a unit; the content of its .json file."""

    shard: ShardInfo
    bytes: int
    """UTF-8 bytes of the documents' text."""
    skipped: dict[str, dict[str, Any]]
    """Per kind of record left out: how many, and the first one's place and trouble."""
    conversations: dict[str, Any] | None = None
    """Of conversations their number, the samples', the tokens' with loss, and how many are of each format."""

    def faults(self) -> int:
        """Count the records left out by --on-error skip; blank ones aren't among them."""
        return sum(entry["count"] for kind, entry in self.skipped.items() if kind != EMPTY_TEXT)


def unit_name(index: int) -> str:
    """Name the shard that unit `index` becomes."""
    return f"shard-{index:05d}"


def encode_unit(folder: Path, index: int, unit: Unit, tokenizer: Tokenizer, options: EncodeOptions) -> UnitReport:
    """Write the shard of one unit, its .json last. A bad record is a DataError unless they are skipped."""
    skipped = SkippedRecords(options.on_error)
    try:
        with ShardWriter(folder, unit_name(index), tokenizer.vocab_size) as writer:
            counts = Counts()
            num_bytes = _fill(writer, unit, tokenizer, options, skipped, counts)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder / unit_name(index)}: another process took its files away, for it makes the same shards; "
            "let one of the two end, or give each machine its own --part"
        ) from error
    counted = counts.report() if options.conversations else None
    report = UnitReport(writer.close(), num_bytes, dict(sorted(skipped.kinds.items())), counted)
    text = json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / f"{unit_name(index)}.json", text.encode())
    return report


def read_report(folder: Path, index: int, vocab_size: int) -> UnitReport | None:
    """Read the report of a unit; None where it isn't done, or its files haven't the sizes they should."""
    stem = folder / unit_name(index)
    try:
        content = json.loads(stem.with_suffix(".json").read_text("utf-8"))
        report = UnitReport(ShardInfo(**content.pop("shard")), **content)
        sizes = {suffix: stem.with_suffix(f".{suffix}").stat().st_size for suffix in report.shard.sha256}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    shard = report.shard
    expected = {
        "tokens": shard.tokens * TOKEN_DTYPES[token_dtype(vocab_size)].itemsize,
        "ends": shard.documents * 8,
    }
    if shard.masked:
        expected["mask"] = shard.tokens
    if shard.joined:
        expected["joined"] = shard.documents
    return report if sizes == expected else None


class SkippedRecords:
    """Counts bad records by kind and keeps the first of each; or raises at once."""

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self.kinds: dict[str, dict[str, Any]] = {}

    def __call__(self, bad: BadRecord) -> None:
        if self._on_error == "fail" and bad.kind != EMPTY_TEXT:
            raise DataError(
                f"{bad.file.path}{bad.where}: {bad.what}. Remedy: {_REMEDIES[bad.kind]}; "
                "or leave such records out: --on-error skip, in a recipe data.on_error=skip"
            )
        first = f"{bad.file.name}{bad.where}: {bad.what}"
        entry = self.kinds.setdefault(bad.kind, {"count": 0, "first": first})
        entry["count"] += 1


def _check_size(span: Span) -> None:
    try:
        size = span.file.path.stat().st_size
    except OSError as error:
        raise DataError(f"{span.file.path}: can't be read ({error.strerror})") from error
    if size != span.file.size:
        raise DataError(
            f"{span.file.path}: had {span.file.size} bytes when the work was planned and has {size} now; "
            "wait until the inputs are complete, and prepare into a new folder"
        )


def _fill(
    writer: ShardWriter,
    unit: Unit,
    tokenizer: Tokenizer,
    options: EncodeOptions,
    skipped: SkippedRecords,
    counts: Counts,
) -> int:
    """Write a unit's documents; returns the UTF-8 bytes of their text."""
    num_bytes = 0
    byte_counts: np.ndarray | None = None
    for span in unit.spans:
        _check_size(span)
        if span.file.format == "internlm":
            if byte_counts is None:
                byte_counts = tokenizer.token_bytes()
            num_bytes += _copy_tokens(span, writer, byte_counts, skipped, counts)
        elif options.conversations is not None:
            write_samples(span, writer, tokenizer, options.conversations, counts, skipped)
        else:
            num_bytes += _encode_span(span, writer, tokenizer, options, skipped)
    return num_bytes + counts.bytes


def _encode_span(
    span: Span, writer: ShardWriter, tokenizer: Tokenizer, options: EncodeOptions, skipped: SkippedRecords
) -> int:
    """Encode a span's documents into the writer; returns their UTF-8 bytes."""
    before = [tokenizer.bos_id] if options.bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if options.eos and tokenizer.eos_id is not None else []
    num_bytes = 0
    for texts in _batches(read_documents(span, options.read, skipped)):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            writer.add(np.array(before + ids + after, dtype=np.int64))
            num_bytes += len(text.encode())
    return num_bytes


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _copy_tokens(
    span: Span, writer: ShardWriter, byte_counts: np.ndarray, skipped: SkippedRecords, counts: Counts
) -> int:
    """Copy an InternLM file's documents, ids and mask as they are; returns the bytes the ids stand for."""
    source = InternLMFiles.open(span.file.path)
    stop = source.num_documents if span.stop is None else span.stop
    if source.num_documents == 0:
        skipped(BadRecord(EMPTY_FILE, span.file, "", "holds no document"))
    num_bytes = 0
    for index in range(span.start, stop):
        try:
            ids, trained = source.document(index)
        except DataError as error:
            what = str(error).removeprefix(f"{source.place(index)}: ")
            skipped(BadRecord(DAMAGED, span.file, f":{index + 1}", what))
            continue
        if len(ids) == 0:
            skipped(BadRecord(EMPTY_TEXT, span.file, f":{index + 1}", "a document without tokens"))
        elif ids.max() >= len(byte_counts):
            what = f"id {ids.max()} is outside the tokenizer's vocabulary of {len(byte_counts)}"
            skipped(BadRecord(BAD_TOKENS, span.file, f":{index + 1}", what))
        else:
            writer.add(ids, trained)
            counts.add("internlm", 1, len(ids) if trained is None else int(trained.sum()), 0)
            num_bytes += int(byte_counts[ids].sum())
    return num_bytes
