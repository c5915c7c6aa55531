"""Files and parts of files as bytes, lines and decoded lines, plain or .gz/.zst; and how a bad record is told.

What the lines mean is for `records` and `readers`; which part of which file is read is `plan`'s choice.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ternlm.data.errors import DataError

Format = Literal["text", "json", "jsonl", "parquet", "internlm"]
Compression = Literal["", "gz", "zst"]

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


Report = Callable[[BadRecord], None]


class Damaged(Exception):
    """A compressed or parquet file is cut off or corrupt."""


def read_whole(span: Span) -> bytes:
    return b"".join(_chunks(span)).removeprefix(_BOM)


def read_lines(span: Span) -> Iterator[bytes]:
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


def read_text_lines(span: Span, report: Report) -> Iterator[tuple[int, str]]:
    """Yield (number within the span from 1, text) of the lines that aren't blank."""
    for number, raw in enumerate(read_lines(span), 1):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            where = line_place(span, number)
            report(BadRecord(NOT_UTF8, span.file, where, not_utf8(error, "line")))
            continue
        if text.strip():
            yield number, text.removesuffix("\r")


def line_place(span: Span, number: int) -> str:
    """Say which line of the file is the span's line `number`; reads what is before the span."""
    before = 0
    if span.start:
        head = Span(span.file, 0, span.start)
        before = sum(chunk.count(b"\n") for chunk in _chunks(head))
    return f":{before + number}"


def nth_place(unit: str, number: int) -> str:
    return f", {unit} {number}"


def not_utf8(error: UnicodeDecodeError, unit: str) -> str:
    found = error.object[error.start]
    return f"byte 0x{found:02x} at byte {error.start} of the {unit} isn't UTF-8 ({error.reason})"


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
        raise Damaged(str(error)) from error


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
        raise Damaged(str(error)) from error
    if inside:
        raise Damaged("the file ends inside a compressed frame")
