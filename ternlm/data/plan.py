"""Which inputs there are, and how they are cut into work units: the same whoever plans, and how many work.

Each unit becomes one shard. Many small files share a unit; large line-by-line and parquet files are cut.
Nothing is read here but folders, line ends around cuts and parquet footers.
"""

import fnmatch
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

from ternlm.data.errors import DataError
from ternlm.data.internlm import InternLMFiles
from ternlm.data.readers import TextDocument
from ternlm.data.spans import Compression, Format, InputFile, Span

FormatChoice = Literal["auto", "text", "json", "jsonl", "parquet", "internlm"]

logger = logging.getLogger(__name__)

_SUFFIXES: dict[str, Format] = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".bin": "internlm",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
_META = ".bin.meta"
_RECORDS = tuple(suffix for suffix in _SUFFIXES if suffix != ".txt")
_MIB = 1 << 20


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time: spans of files, and their share of the input's bytes."""

    spans: tuple[Span, ...]
    size: int


def find_inputs(
    inputs: Sequence[str | Path], *, format: FormatChoice = "auto", include: str = "*", records: bool = False
) -> list[InputFile]:
    """List the files of `inputs`, files or folders, by name.

    In folders, those whose name or path within the folder matches `include`; hidden ones are left out. records: so are
    those whose suffix says that they hold no records, such as a data set's README.md, with a word in the log.
    """
    if format not in get_args(FormatChoice):
        raise DataError(f"format = {format!r} must be one of {', '.join(get_args(FormatChoice))}")
    if not inputs:
        raise DataError("no input: give at least one file or folder")
    files: dict[Path, InputFile] = {}
    others: list[Path] = []
    places = [Path(place) for place in inputs]
    for place, label in zip(places, _labels(places), strict=True):
        for path, inner in _walk(place, include):
            name = f"{label}/{inner}" if inner else label
            if records and inner and _suffix(name)[0] not in _RECORDS:
                others.append(path)
                continue
            real = path.resolve()
            if real in files:
                raise DataError(f"{path}: is given twice; give each input once, and weights in the mixture")
            files[real] = _input_file(path, name, format)
    if others:
        logger.info("%d files hold no records (%s) and are left out, as %s", len(others), " ".join(_RECORDS), others[0])
    if not files:
        raise DataError(f"{places[0]}: holds no file of records ({' '.join(_RECORDS)})")
    return sorted(files.values(), key=lambda file: file.name)


def default_unit_bytes(total: int) -> int:
    """Choose the size of a unit for `total` bytes: 1 to 32 MiB, and more where there would be over 16,384."""
    return max(min(total // 64, 32 * _MIB), _MIB, total >> 14)


def make_units(files: Iterable[InputFile], text_document: TextDocument, unit_bytes: int) -> list[Unit]:
    """Group the files, cut where they are large, into units of about `unit_bytes`, in order."""
    units: list[Unit] = []
    current: list[Span] = []
    filled = 0
    for file in files:
        spans = _cut(file, text_document, unit_bytes)
        size = file.size // len(spans)
        for span in spans:
            if current and filled + size > unit_bytes:
                units.append(Unit(tuple(current), filled))
                current, filled = [], 0
            current.append(span)
            filled += size
    return [*units, Unit(tuple(current), filled)] if current else units


def describe_units(files: Sequence[InputFile], units: Sequence[Unit]) -> dict[str, Any]:
    """Write inputs and units down as JSON values, without absolute paths."""
    index = {file: number for number, file in enumerate(files)}
    return {
        "inputs": [
            {"name": file.name, "size": file.size, "format": file.format, "compression": file.compression}
            for file in files
        ],
        "units": [[[index[span.file], span.start, span.stop] for span in unit.spans] for unit in units],
    }


def _labels(places: list[Path]) -> list[str]:
    """Name the inputs: by their own names or, where two have the same, by paths from the folder they share."""
    paths = [Path(os.path.abspath(place)) for place in places]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def _walk(place: Path, include: str) -> Iterator[tuple[Path, str]]:
    """Yield (path, path within the input) of an input's files."""
    if place.is_file():
        yield place, ""
        return
    if not place.is_dir():
        raise DataError(f"{place}: no such file or folder")
    found = False
    for path in _files_below(place):
        inner = path.relative_to(place).as_posix()
        if fnmatch.fnmatch(path.name, include) or fnmatch.fnmatch(inner, include):
            found = True
            yield path, inner
    if not found:
        raise DataError(f"{place}: no file in it matches include = {include!r}; hidden files don't count")


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a tree in order, through links, but no folder twice."""
    seen: set[tuple[int, int]] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        stat = os.stat(where)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name)
            if not name.startswith(".") and not name.endswith(_META) and path.is_file():
                yield path


def _input_file(path: Path, name: str, format: FormatChoice) -> InputFile:
    suffix, compression = _suffix(name)
    if format == "auto" and suffix not in _SUFFIXES:
        raise DataError(
            f"{path}: can't tell its format from its suffix {suffix!r}; known are {' '.join(_SUFFIXES)}, "
            "also with .gz or .zst. Name the format (--format text, ...), or choose files (--include '*.jsonl')"
        )
    its: Format = _SUFFIXES[suffix] if format == "auto" else format
    if compression and its in ("parquet", "internlm"):
        raise DataError(f"{path}: {its} files are read in parts and can't be compressed; unpack it first")
    return InputFile(path, name, path.stat().st_size, its, compression)


def _suffix(name: str) -> tuple[str, Compression]:
    """Return a file's suffix without that of its compression, and this."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    compression: Compression = _COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    return "".join(suffixes[-2:-1] if compression else suffixes[-1:]), compression


def _cut(file: InputFile, text_document: TextDocument, unit_bytes: int) -> list[Span]:
    """Cut a file into spans of about `unit_bytes`, if it can be cut and is much larger than that."""
    number = -(-file.size // unit_bytes)
    by_line = file.format == "jsonl" or (file.format == "text" and text_document == "line")
    if file.size < unit_bytes * 3 // 2 or file.compression:
        return [Span(file)]
    if file.format == "parquet":
        return _spans(file, _even(_row_groups(file), number))
    if file.format == "internlm":
        return _spans(file, _even(InternLMFiles.open(file.path).num_documents, number))
    if by_line:
        return _spans(file, _line_starts(file, _even(file.size, number)))
    return [Span(file)]


def _even(count: int, parts: int) -> list[int]:
    return [count * part // parts for part in range(1, parts)]


def _spans(file: InputFile, cuts: list[int]) -> list[Span]:
    starts = [0, *sorted(set(cuts) - {0})]
    return [Span(file, *bounds) for bounds in zip(starts, [*starts[1:], None], strict=True)]


def _line_starts(file: InputFile, offsets: list[int]) -> list[int]:
    """Move offsets to the start of the next line; those in the last line are left out."""
    starts = []
    with open(file.path, "rb") as stream:
        for offset in offsets:
            stream.seek(offset - 1)
            stream.readline()
            if stream.tell() < file.size:
                starts.append(stream.tell())
    return starts


def _row_groups(file: InputFile) -> int:
    """Count a parquet file's row groups; one that can't be opened is left whole, for the reader to report."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{file.path}: reading parquet needs pip install 'ternlm[data]'") from error
    try:
        return pq.read_metadata(file.path).num_row_groups
    except (pa.ArrowException, OSError):
        return 0
