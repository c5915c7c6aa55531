"""Documents out of files: text, json, jsonl and parquet, plain or .gz/.zst, whole or a part of a file.

A record that can't be used goes to `report`, which raises or counts: readers say what is wrong and where.
Which part of which file is read is `plan`'s choice; InternLM's .bin files are read by `internlm`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ternlm.data.records import Place, guarded, read_values, type_name
from ternlm.data.spans import (
    EMPTY_TEXT,
    NO_FIELD,
    NOT_UTF8,
    TOO_LONG,
    WRONG_TYPE,
    BadRecord,
    Report,
    Span,
    line_place,
    not_utf8,
    read_lines,
    read_text_lines,
    read_whole,
)

TextDocument = Literal["file", "line", "paragraph"]

MAX_DOCUMENT_BYTES = 64 << 20  # encoding takes some 100 bytes of memory for each token


@dataclass(frozen=True)
class ReadOptions:
    """What is one document, and where its text is."""

    field: str = "text"
    text_document: TextDocument = "file"


def read_documents(span: Span, options: ReadOptions, report: Report) -> Iterator[str]:
    """Yield the documents of a span, none of them blank; hand what can't be used to `report`."""
    for text in guarded(span, report, lambda reported: _reader(span, options, reported)):
        if not text.strip():
            report(BadRecord(EMPTY_TEXT, span.file, "", "a record with an empty text"))
        elif len(text) > MAX_DOCUMENT_BYTES // 4 and len(text.encode()) > MAX_DOCUMENT_BYTES:
            report(BadRecord(TOO_LONG, span.file, "", _too_long(text)))
        else:
            yield text


def _reader(span: Span, options: ReadOptions, report: Report) -> Iterator[str]:
    match span.file.format:
        case "text" if options.text_document == "file":
            return _read_file(span, report)
        case "text" if options.text_document == "line":
            return (text for _, text in read_text_lines(span, report))
        case "text":
            return _read_paragraphs(span, report)
    return _read_fields(span, options.field, report)


def _read_fields(span: Span, field: str, report: Report) -> Iterator[str]:
    """Yield the texts in one field of the records; in json a text may stand for its record."""
    for place, value in read_values(span, report, column=field):
        record = {field: value} if span.file.format == "json" and isinstance(value, str) else value
        yield from _text_of(record, field, span, place, report)


def _read_file(span: Span, report: Report) -> Iterator[str]:
    content = read_whole(span)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        report(BadRecord(NOT_UTF8, span.file, f":{line}", not_utf8(error, "file")))
        return
    if text.strip():
        yield text


def _read_paragraphs(span: Span, report: Report) -> Iterator[str]:
    """Yield runs of lines between blank ones; a run with a line that isn't UTF-8 is left out."""
    lines: list[str] = []
    usable = True
    for number, raw in enumerate(read_lines(span), 1):
        if not raw.strip():
            if lines and usable:
                yield "\n".join(lines)
            lines, usable = [], True
            continue
        try:
            lines.append(raw.decode().removesuffix("\r"))
        except UnicodeDecodeError as error:
            usable = False
            where = line_place(span, number)
            report(BadRecord(NOT_UTF8, span.file, where, not_utf8(error, "line")))
    if lines and usable:
        yield "\n".join(lines)


def _text_of(record: Any, field: str, span: Span, where: Place, report: Report) -> Iterator[str]:
    """Yield the text in a record's field, or report why there is none."""
    if not isinstance(record, dict):
        problem = WRONG_TYPE, f"must be an object with a field {field!r}, not {type_name(record)}"
    elif field not in record:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        problem = NO_FIELD, f"no field {field!r}; its fields: {names}"
    elif isinstance(record[field], bytes):
        problem = NOT_UTF8, f"field {field!r} isn't UTF-8"
    elif not isinstance(record[field], str):
        problem = WRONG_TYPE, f"field {field!r} must be a string, not {type_name(record[field])}"
    elif _has_surrogate(record[field]):
        problem = (
            NOT_UTF8,
            f"field {field!r} holds half of a surrogate pair, which isn't text",
        )
    else:
        yield record[field]
        return
    report(BadRecord(problem[0], span.file, where(), problem[1]))


def _has_surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _too_long(text: str) -> str:
    start, size = " ".join(text[:60].split()), len(text.encode())
    return f"one document of {size:,} bytes, beginning {start!r}; the limit is {MAX_DOCUMENT_BYTES:,}"
