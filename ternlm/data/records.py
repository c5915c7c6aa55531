"""Records out of files: json, jsonl and parquet, plain or .gz/.zst, whole or a part of a file.

What a record must hold is for others to say: `readers` takes a text from it, `conversations` a conversation.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from ternlm.data.errors import DataError
from ternlm.data.spans import (
    DAMAGED,
    EMPTY_FILE,
    NO_FIELD,
    NOT_JSON,
    NOT_UTF8,
    WRONG_TYPE,
    BadRecord,
    Damaged,
    Report,
    Span,
    line_place,
    not_utf8,
    nth_place,
    read_text_lines,
    read_whole,
)

Place = Callable[[], str]
"""Says where a record is in its file, such as ":12" or ", row 3"; finding that out may mean to read the file again."""

_Item = TypeVar("_Item")


def read_records(span: Span, report: Report) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield the records of a span, with their places; hand what isn't an object to `report`."""
    for place, value in guarded(span, report, lambda reported: read_values(span, reported)):
        if isinstance(value, dict):
            yield place, value
        else:
            report(BadRecord(WRONG_TYPE, span.file, place(), f"must be an object, not {type_name(value)}"))


def read_values(span: Span, report: Report, column: str | None = None) -> Iterator[tuple[Place, Any]]:
    """Yield what the records of a span are, objects or not, with their places.

    column: the only one to read from parquet, a text; all if not given. Raises Damaged.
    """
    match span.file.format:
        case "jsonl":
            return _read_jsonl(span, report)
        case "json":
            return _read_json(span, report)
        case "parquet":
            return _read_parquet(span, column, report)
    raise ValueError(f"{span.file.path}: {span.file.format} holds no records")


def guarded(span: Span, report: Report, read: Callable[[Report], Iterator[_Item]]) -> Iterator[_Item]:
    """Yield what `read` does, given where to report; report a damaged or empty file, raise for an unreadable one."""
    seen = False

    def reported(bad: BadRecord) -> None:
        nonlocal seen
        seen = True
        report(bad)

    try:
        for item in read(reported):
            seen = True
            yield item
    except Damaged as damage:
        reported(BadRecord(DAMAGED, span.file, "", f"can't be read to its end ({damage})"))
    except OSError as error:
        raise DataError(f"{span.file.path}: can't be read ({error.strerror or error})") from error
    if not seen and span.start == 0 and span.stop is None:
        report(BadRecord(EMPTY_FILE, span.file, "", "holds no document"))


def _read_jsonl(span: Span, report: Report) -> Iterator[tuple[Place, Any]]:
    for number, line in read_text_lines(span, report):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            report(BadRecord(NOT_JSON, span.file, line_place(span, number), f"not one JSON value ({error})"))
            continue
        yield partial(line_place, span, number), record


def _read_json(span: Span, report: Report) -> Iterator[tuple[Place, Any]]:
    content = read_whole(span)
    if not content.strip():
        return
    try:
        records = json.loads(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        report(BadRecord(NOT_UTF8, span.file, f":{line}", not_utf8(error, "file")))
        return
    except (ValueError, RecursionError) as error:
        where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        report(BadRecord(NOT_JSON, span.file, where, f"not JSON ({error})"))
        return
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield partial(nth_place, "item", number), record


def _read_parquet(span: Span, column: str | None, report: Report) -> Iterator[tuple[Place, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{span.file.path}: reading parquet needs pip install 'ternlm[data]'") from error
    try:
        with pq.ParquetFile(span.file.path) as file:
            kind = None if column is None else _parquet_problem(file.schema_arrow, column)
            if kind:
                report(BadRecord(kind[0], span.file, "", kind[1]))
                return
            groups = range(span.start, file.num_row_groups if span.stop is None else span.stop)
            row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
            columns = None if column is None else [column]
            for batch in file.iter_batches(1024, row_groups=list(groups), columns=columns):
                for record in _rows(batch):
                    row += 1
                    yield partial(nth_place, "row", row), {name: _given(value) for name, value in record.items()}
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise Damaged(str(error)) from error


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


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield a batch's rows; a text that isn't UTF-8 as bytes."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in zip(*map(_values, batch.columns), strict=True):
            yield dict(zip(batch.schema.names, row, strict=True))


def _given(value: Any) -> Any:
    """Leave out nulls of objects: a column gives each row the fields of all rows, null where it hasn't one."""
    if isinstance(value, dict):
        return {name: _given(each) for name, each in value.items() if each is not None}
    return [_given(each) for each in value] if isinstance(value, list) else value


def _values(column: Any) -> Iterator[Any]:
    """Yield a column's values; one that isn't UTF-8 as bytes."""
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            yield error.object


def type_name(value: Any) -> str:
    """Name what kind of JSON value this is, for messages."""
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        bytes: "bytes",
    }
    return names.get(type(value), "a number")
