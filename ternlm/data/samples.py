"""Conversations of a file to samples in a shard: records read, their format found, turns encoded.

Called by `encode`, in place of its plain documents, where `prepare` was given conversations.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from ternlm.config.sft import FormatName
from ternlm.data.conversations import (
    Conversation,
    NoAnswer,
    OtherFormat,
    detect_format,
    read_conversation,
    unknown_format,
)
from ternlm.data.errors import DataError
from ternlm.data.protocols import ChatProtocol
from ternlm.data.records import Place, read_records
from ternlm.data.shards import ShardWriter
from ternlm.data.spans import BadRecord, Report, Span
from ternlm.data.tokenizer import Tokenizer
from ternlm.data.turns import Sample, encode_turns

NO_FORMAT, OTHER_FORMAT = "unknown format", "other format"
NO_ANSWER, BAD_CONVERSATION = "no answer", "bad conversation"
_FIRST = 32  # records that are looked at for a file's format


@dataclass(frozen=True)
class ConversationOptions:
    """How records are read as conversations, and these encoded."""

    format: FormatName
    template: str
    stop: tuple[str, ...]
    """Tokens that end an answer, as texts."""
    after_end: bool = False
    document_end: bool = False
    system: str | None = None
    """The system message of conversations that have none."""

    def settings(self) -> dict[str, Any]:
        """Return what the samples depend on, as JSON values; the template by its hash."""
        return {
            "format": self.format,
            "chat template": hashlib.sha256(self.template.encode()).hexdigest(),
            "stop": list(self.stop),
            "after_end": self.after_end,
            "document_end": self.document_end,
            "system": self.system,
        }


def options_for(protocol: ChatProtocol, format: FormatName, system: str | None = None) -> ConversationOptions:
    """Return how conversations are encoded by a protocol."""
    ends = protocol.after_end, protocol.document_end
    return ConversationOptions(format, protocol.template, protocol.stop, *ends, system)


@dataclass
class Counts:
    """What came of conversations."""

    conversations: int = 0
    samples: int = 0
    trained: int = 0
    """Tokens with loss."""
    bytes: int = 0
    """UTF-8 bytes of the messages' contents."""
    formats: dict[str, int] = field(default_factory=dict)
    """Conversations per format."""

    def add(self, format: str, samples: int, trained: int, num_bytes: int) -> None:
        """Count one conversation."""
        self.conversations += 1
        self.samples += samples
        self.trained += trained
        self.bytes += num_bytes
        self.formats[format] = self.formats.get(format, 0) + 1

    def report(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "conversations": self.conversations,
            "samples": self.samples,
            "trained_tokens": self.trained,
            "formats": dict(sorted(self.formats.items())),
        }


def merge_counts(counts: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    """Add up what `Counts.report` gave."""
    total: dict[str, Any] = Counts().report()
    for each in counts:
        for name, value in (each or {}).items():
            if name == "formats":
                for format, number in value.items():
                    total[name][format] = total[name].get(format, 0) + number
            else:
                total[name] += value
    return total | {"formats": dict(sorted(total["formats"].items()))}


def describe_counts(counts: dict[str, Any], num_tokens: int) -> str:
    """Say what merged counts are, in words."""
    formats = ", ".join(f"{number:,} {format}" for format, number in counts["formats"].items())
    share = counts["trained_tokens"] / max(num_tokens, 1)
    return (
        f"{counts['conversations']:,} ({formats or 'none'}), {counts['samples']:,} samples, "
        f"{counts['trained_tokens']:,} trained tokens, {share:.1%} of all"
    )


def write_samples(
    span: Span, writer: ShardWriter, tokenizer: Tokenizer, options: ConversationOptions, counts: Counts, report: Report
) -> None:
    """Write the samples of a span's conversations; hand records without any to `report`."""
    for _, format, conversation, samples in read_samples(span, tokenizer, options, report):
        add_samples(writer, counts, format, conversation, samples)


def add_samples(
    writer: ShardWriter, counts: Counts, format: FormatName, conversation: Conversation, samples: Sequence[Sample]
) -> None:
    """Write the samples of a conversation, and count them."""
    for place, sample in enumerate(samples):
        writer.add(sample.ids, sample.trained, joined=place > 0)
    texts = [conversation.text or "", *(message["content"] for message in conversation.messages)]
    num_bytes = sum(len(text.encode()) for text in texts)
    counts.add(format, len(samples), sum(int(sample.trained.sum()) for sample in samples), num_bytes)


def read_samples(
    span: Span, tokenizer: Tokenizer, options: ConversationOptions, report: Report
) -> Iterator[tuple[Place, FormatName, Conversation, list[Sample]]]:
    """Yield a span's conversations with their places, formats and samples; hand what is none to `report`."""
    records = read_records(span, report)
    format, records = (options.format, records) if options.format != "auto" else _format_of(span, records, report)
    for place, record in records:
        try:
            conversation = read_conversation(record, format)
            yield place, format, conversation, _encode(tokenizer, conversation, options)
        except DataError as trouble:
            kinds = {NoAnswer: NO_ANSWER, OtherFormat: OTHER_FORMAT}
            report(BadRecord(kinds.get(type(trouble), BAD_CONVERSATION), span.file, place(), str(trouble)))


def _encode(tokenizer: Tokenizer, conversation: Conversation, options: ConversationOptions) -> list[Sample]:
    if conversation.text is not None:
        ids = tokenizer.encode_document(conversation.text)
        return [Sample(ids, np.ones(len(ids), dtype=bool))]
    return encode_turns(
        tokenizer,
        options.template,
        conversation,
        stop=options.stop,
        after_end=options.after_end,
        document_end=options.document_end,
        system=options.system,
    )


_Records = Iterator[tuple[Place, dict[str, Any]]]


def _format_of(span: Span, records: _Records, report: Report) -> tuple[FormatName, _Records]:
    """Find the format of a file by its first records, whatever part of it the span is; no records without one."""
    if span.start:
        first = list(islice(read_records(Span(span.file), lambda bad: None), _FIRST))
    else:
        first = list(islice(records, _FIRST))
        records = chain(first, records)
    for _, record in first:
        if (format := detect_format(record)) is not None:
            return format, records
    # The first that has one says it: those before it are left out, one by one.
    for place, record in records:
        if (format := detect_format(record)) is not None:
            return format, chain([(place, record)], records)
        report(BadRecord(NO_FORMAT, span.file, place(), unknown_format(record)))
    return "auto", iter(())
