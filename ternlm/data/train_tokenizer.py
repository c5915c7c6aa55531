"""`tern data tokenizer`: trains a byte-level BPE on the same inputs, read the same way, as `prepare` takes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ternlm.data.encode import OnError, SkippedRecords
from ternlm.data.errors import DataError
from ternlm.data.plan import FormatChoice, find_inputs, make_units
from ternlm.data.readers import ReadOptions, TextDocument, read_documents
from ternlm.data.spans import InputFile
from ternlm.data.tokenizer import TOKENIZER_FILE, Tokenizer, train_bpe

_UNIT_BYTES = 1 << 20


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    out: str | Path,
    *,
    format: FormatChoice = "auto",
    include: str = "*",
    field: str = "text",
    text_document: TextDocument = "file",
    on_error: OnError = "fail",
    special_tokens: tuple[str, ...] = ("<s>", "</s>"),
    sample_bytes: int | None = 256 << 20,
) -> Tokenizer:
    """Train a byte-level BPE on text files and folders and save it in the folder `out`; deterministic.

    sample_bytes: of input to learn from, taken in pieces evenly spread over all of it; None: everything.
    The other options are those of `prepare`. A tokenizer that is in `out` already is not overwritten.
    """
    if (Path(out) / TOKENIZER_FILE).exists():
        raise DataError(f"{out} holds a tokenizer already, and data may depend on it; choose another folder")
    if sample_bytes is not None and sample_bytes < 1:
        raise DataError(f"sample_bytes = {sample_bytes} must be at least 1")
    files = find_inputs(inputs, format=format, include=include)
    tokens = next((file for file in files if file.format == "internlm"), None)
    if tokens:
        raise DataError(f"{tokens.path}: holds tokens, not text; give the text a tokenizer is to learn from")
    options = ReadOptions(field, text_document)
    tokenizer = train_bpe(_sample(files, options, on_error, sample_bytes), vocab_size, special_tokens)
    tokenizer.save(out)
    return tokenizer


def _sample(
    files: Sequence[InputFile], options: ReadOptions, on_error: OnError, sample_bytes: int | None
) -> Iterator[str]:
    """Yield the documents of pieces at even distances, or of all."""
    pieces = make_units(files, options.text_document, _UNIT_BYTES)
    total = sum(piece.size for piece in pieces)
    wanted = len(pieces)
    if sample_bytes is not None and total > sample_bytes:
        wanted = max(1, len(pieces) * sample_bytes // total)
    report = SkippedRecords(on_error)
    for number in range(wanted):
        left = sample_bytes // wanted if sample_bytes is not None and wanted < len(pieces) else None
        for span in pieces[number * len(pieces) // wanted].spans:
            for text in read_documents(span, options, report):
                yield text
                if left is not None and (left := left - len(text.encode())) <= 0:  # packed files are larger inside
                    break
            if left is not None and left <= 0:
                break
