"""Documents out of files: text, json, jsonl and parquet, plain or .gz/.zst, whole or a part of a file.

A record that can't be used goes to `report`, which raises or counts: readers say what is wrong and where.
Which part of which file is read is `plan`'s choice; InternLM's .bin files are read by `internlm`.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ternlm.data.errors import DataError

Format = Literal["text", "json", "jsonl", "parquet", "internlm"]
Compression = Literal["", "gz", "zst"]
TextDocument = Literal["file", "line", "paragraph"]

MAX_DOCUMENT_BYTES = 64 << 20  # encoding takes some 100 bytes of memory for each token
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"

NOT_UTF8, NOT_JSON, NO_FIELD, WRONG_TYPE = "not UTF-8", "not JSON", "missing field", "wrong type"
EMPTY_TEXT, EMPTY_FILE, DAMAGED, TOO_LONG = "empty text", "empty file", "damaged file", "too long"


@dataclass(frozen=True)
class InputFile:
    """A file to read; `name` stands for it in what is written, `path` in messages."""

    path: Path
    name: str
    size: int
    format: Format
    compression: Compression = ""


@dataclass(frozen=True)
class Span:
    """Part of a file, in bytes (text, jsonl), row groups (parquet) or documents (internlm)."""

    file: InputFile
    start: int = 0
    stop: int | None = None
    """None: to the end."""


@dataclass(frozen=True)
class BadRecord:
    """What can't be used: its kind, its place in the file (such as ":12" or ", row 3") and what is wrong."""

    kind: str
    file: InputFile
    where: str
    what: str


@dataclass(frozen=True)
class ReadOptions:
    """What is one document, and where its text is."""

    field: str = "text"
    text_document: TextDocument = "file"


Report = Callable[[BadRecord], None]


def read_documents(span: Span, options: ReadOptions, report: Report) -> Iterator[str]:
    """Yield the documents of a span, none of them blank; hand what can't be used to `report`."""
    seen = False

    def reported(bad: BadRecord) -> None:
        nonlocal seen
        seen = True
        report(bad)

    try:
        for text in _reader(span, options, reported):
            seen = True
            if not text.strip():
                report(BadRecord(EMPTY_TEXT, span.file, "", "a record with an empty text"))
            elif len(text) > MAX_DOCUMENT_BYTES // 4 and len(text.encode()) > MAX_DOCUMENT_BYTES:
                report(BadRecord(TOO_LONG, span.file, "", _too_long(text)))
            else:
                yield text
    except _Damaged as damage:
        reported(BadRecord(DAMAGED, span.file, "", f"can't be read to its end ({damage})"))
    except OSError as error:
        raise DataError(f"{span.file.path}: can't be read ({error.strerror or error})") from error
    if not seen and span.start == 0 and span.stop is None:
        report(BadRecord(EMPTY_FILE, span.file, "", "holds no document"))


class _Damaged(Exception):
    """A compressed or parquet file is cut off or corrupt."""


def _reader(span: Span, options: ReadOptions, report: Report) -> Iterator[str]:
    match span.file.format:
        case "text" if options.text_document == "file":
            return _read_file(span, report)
        case "text" if options.text_document == "line":
            return (text for _, text in _read_lines(span, report))
        case "text":
            return _read_paragraphs(span, report)
        case "jsonl":
            return _read_jsonl(span, options.field, report)
        case "json":
            return _read_json(span, options.field, report)
        case "parquet":
            return _read_parquet(span, options.field, report)
    raise ValueError(f"{span.file.path}: {span.file.format} holds no text")


def _read_file(span: Span, report: Report) -> Iterator[str]:
    content = _whole(span)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        report(BadRecord(NOT_UTF8, span.file, f":{line}", _not_utf8(error, "file")))
        return
    if text.strip():
        yield text


def _read_lines(span: Span, report: Report) -> Iterator[tuple[int, str]]:
    """Yield (number within the span from 1, text) of the lines that aren't blank."""
    for number, raw in enumerate(_lines(span), 1):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            where = _line(span, number)
            report(BadRecord(NOT_UTF8, span.file, where, _not_utf8(error, "line")))
            continue
        if text.strip():
            yield number, text.removesuffix("\r")


def _read_paragraphs(span: Span, report: Report) -> Iterator[str]:
    """Yield runs of lines between blank ones; a run with a line that isn't UTF-8 is left out."""
    lines: list[str] = []
    usable = True
    for number, raw in enumerate(_lines(span), 1):
        if not raw.strip():
            if lines and usable:
                yield "\n".join(lines)
            lines, usable = [], True
            continue
        try:
            lines.append(raw.decode().removesuffix("\r"))
        except UnicodeDecodeError as error:
            usable = False
            where = _line(span, number)
            report(BadRecord(NOT_UTF8, span.file, where, _not_utf8(error, "line")))
    if lines and usable:
        yield "\n".join(lines)


def _read_jsonl(span: Span, field: str, report: Report) -> Iterator[str]:
    for number, line in _read_lines(span, report):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            report(BadRecord(NOT_JSON, span.file, _line(span, number), f"not one JSON value ({error})"))
            continue
        yield from _text_of(record, field, span, partial(_line, span, number), report)


def _read_json(span: Span, field: str, report: Report) -> Iterator[str]:
    content = _whole(span)
    if not content.strip():
        return
    try:
        records = json.loads(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        report(BadRecord(NOT_UTF8, span.file, f":{line}", _not_utf8(error, "file")))
        return
    except (ValueError, RecursionError) as error:
        where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        report(BadRecord(NOT_JSON, span.file, where, f"not JSON ({error})"))
        return
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        if isinstance(record, str):
            record = {field: record}
        yield from _text_of(record, field, span, partial(_nth, "item", number), report)


def _read_parquet(span: Span, field: str, report: Report) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{span.file.path}: reading parquet needs pip install 'ternlm[data]'") from error
    try:
        with pq.ParquetFile(span.file.path) as file:
            kind = _parquet_problem(file.schema_arrow, field)
            if kind:
                report(BadRecord(kind[0], span.file, "", kind[1]))
                return
            groups = range(span.start, file.num_row_groups if span.stop is None else span.stop)
            row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
            for batch in file.iter_batches(1024, row_groups=list(groups), columns=[field]):
                for value in _values(batch.column(0)):
                    row += 1
                    record = {field: value}
                    yield from _text_of(record, field, span, partial(_nth, "row", row), report)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise _Damaged(str(error)) from error


def _parquet_problem(schema: Any, field: str) -> tuple[str, str] | None:
    """Say why a parquet file has no column of texts called `field`, if so."""
    import pyarrow.types as types

    if field not in schema.names:
        return NO_FIELD, f"no column {field!r}, only {', '.join(schema.names)}"
    kind = schema.field(field).type
    text = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(text) or types.is_large_string(text) or types.is_null(text)):
        return WRONG_TYPE, f"column {field!r} is {kind}, not string"
    return None


def _values(column: Any) -> Iterator[Any]:
    """Yield a column's values; one that isn't UTF-8 as bytes, for `_text_of` to report."""
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            yield error.object


def _text_of(record: Any, field: str, span: Span, where: Callable[[], str], report: Report) -> Iterator[str]:
    """Yield the text in a record's field, or report why there is none."""
    if not isinstance(record, dict):
        problem = WRONG_TYPE, f"must be an object with a field {field!r}, not {_type(record)}"
    elif field not in record:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        problem = NO_FIELD, f"no field {field!r}; its fields: {names}"
    elif isinstance(record[field], bytes):
        problem = NOT_UTF8, f"field {field!r} isn't UTF-8"
    elif not isinstance(record[field], str):
        problem = WRONG_TYPE, f"field {field!r} must be a string, not {_type(record[field])}"
    elif _has_surrogate(record[field]):
        problem = (
            NOT_UTF8,
            f"field {field!r} holds half of a surrogate pair, which isn't text",
        )
    else:
        yield record[field]
        return
    report(BadRecord(problem[0], span.file, where(), problem[1]))


def _type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _has_surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _not_utf8(error: UnicodeDecodeError, unit: str) -> str:
    found = error.object[error.start]
    return f"byte 0x{found:02x} at byte {error.start} of the {unit} isn't UTF-8 ({error.reason})"


def _too_long(text: str) -> str:
    start, size = " ".join(text[:60].split()), len(text.encode())
    return f"one document of {size:,} bytes, beginning {start!r}; the limit is {MAX_DOCUMENT_BYTES:,}"


def _line(span: Span, number: int) -> str:
    """Say which line of the file is the span's line `number`; reads what is before the span."""
    before = 0
    if span.start:
        head = Span(span.file, 0, span.start)
        before = sum(chunk.count(b"\n") for chunk in _chunks(head))
    return f":{before + number}"


def _nth(unit: str, number: int) -> str:
    return f", {unit} {number}"


def _whole(span: Span) -> bytes:
    return b"".join(_chunks(span)).removeprefix(_BOM)


def _lines(span: Span) -> Iterator[bytes]:
    """Yield the lines of a span without their line feeds."""
    parts: list[bytes] = []
    bom = _BOM if span.start == 0 else b""
    for chunk in _chunks(span):
        first, *others = chunk.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts).removeprefix(bom)
            bom = b""
            yield from others[:-1]
            parts = [others[-1]]
    if any(parts):
        yield b"".join(parts).removeprefix(bom)


def _chunks(span: Span) -> Iterator[bytes]:
    """Yield the (decompressed) bytes of a span; a part of a file only where it isn't compressed."""
    if span.file.compression == "gz":
        return _gz_chunks(span.file.path)
    if span.file.compression == "zst":
        return _zst_chunks(span.file.path)
    return _plain_chunks(span)


def _plain_chunks(span: Span) -> Iterator[bytes]:
    stop = span.file.size if span.stop is None else span.stop
    with open(span.file.path, "rb") as file:
        file.seek(span.start)
        left = stop - span.start
        while left:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise DataError(f"{span.file.path}: became shorter while it was read; prepare the data again")
            left -= len(chunk)
            yield chunk


def _gz_chunks(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _Damaged(str(error)) from error


def _zst_chunks(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: reading .zst needs pip install 'ternlm[data]'") from error
    frame = zstandard.ZstdDecompressor().decompressobj()
    inside = False
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                while chunk:
                    yield frame.decompress(chunk)
                    inside, chunk = not frame.eof, frame.unused_data
                    if frame.eof:
                        frame = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise _Damaged(str(error)) from error
    if inside:
        raise _Damaged("the file ends inside a compressed frame")
