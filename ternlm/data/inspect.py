"""`tern data inspect`: what a folder of tokens holds: counts, shards, tokenizer, and documents decoded.

Reads prepared folders and InternLM's .bin files through the same stores as training does.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ternlm.data.errors import DataError
from ternlm.data.internlm import InternLMFiles
from ternlm.data.measure import describe, measure
from ternlm.data.shards import ShardSet
from ternlm.data.source import open_store
from ternlm.data.tokenizer import Tokenizer, load_tokenizer

_FULL_TABLE = 12  # shards; of more, the first and last few are listed
_ENDS = 4
_FIRST = 256  # documents of .bin files that are looked at for tokens without loss
_BLOCK = 1 << 20  # documents or tokens read at a time when all are checked
_SPECIAL_STYLE, _NO_LOSS_STYLE = "bold magenta", "dim italic"


def inspect(
    path: str | Path,
    *,
    documents: int = 3,
    chars: int = 600,
    tokenizer: str | Path | None = None,
    verify: bool = False,
    seq_len: int | None = None,
    plain: bool = False,
    title: str | None = None,
    console: Console | None = None,
) -> None:
    """Print what a prepared folder, or a file or folder of InternLM .bin files, holds.

    documents: how many to decode, evenly spread. chars: of each, at most. tokenizer: needed to decode .bin files;
    a prepared folder has its own. verify: read everything, and check checksums and ids. seq_len: tell what sequences
    of so many tokens would cut off. plain: put [[ ]] around what is trained. title: to print for the path. Special
    tokens are set off in colour, and tokens without loss are dim. Where some are, lengths and shares are told too.
    """
    if documents < 0 or chars < 1:
        raise DataError(f"documents = {documents} must be at least 0 and chars = {chars} at least 1")
    console = console or Console()
    store = open_store(path)
    assert isinstance(store, ShardSet | InternLMFiles)
    its = _load_tokenizer(store, tokenizer)
    _print_counts(store, its, seq_len, title or str(store.path), console)
    if isinstance(store, ShardSet):
        console.print(_shard_table(store))
    if verify:
        console.print(f"verified: {_verify(store, its)}")
    shown = min(documents, store.num_documents)
    for index in (number * store.num_documents // shown for number in range(shown)):
        _print_document(store, index, its, chars, plain, console)


def _load_tokenizer(store: ShardSet | InternLMFiles, tokenizer: str | Path | None) -> Tokenizer | None:
    """Load the tokenizer to decode with: the one given, else the prepared folder's own; check that it fits."""
    if tokenizer is None and isinstance(store, InternLMFiles):
        return None
    its = load_tokenizer(store.path if tokenizer is None else tokenizer)
    if store.fingerprint is not None and its.fingerprint != store.fingerprint:
        where = "its folder" if tokenizer is None else tokenizer
        raise DataError(
            f"{store.path} was made by tokenizer {store.fingerprint}, but the one in {where} is {its.fingerprint}; "
            "use the tokenizer that made it"
        )
    return its


def _print_counts(
    store: ShardSet | InternLMFiles, tokenizer: Tokenizer | None, seq_len: int | None, title: str, console: Console
) -> None:
    mean = store.num_tokens / max(store.num_documents, 1)
    rows = [
        ("documents", f"{store.num_documents:,}"),
        ("tokens", f"{store.num_tokens:,}, {mean:,.1f} per document"),
    ]
    if isinstance(store, ShardSet):
        num_bytes = store.manifest.get("num_bytes", 0)
        ratio = num_bytes / max(store.num_tokens, 1)
        rows.append(("text", f"{decimal(num_bytes)}, {ratio:.2f} bytes per token"))
        rows.append(("stored as", f"{store.dtype.name}, {len(store.shards):,} shards"))
        for kind, entry in store.manifest.get("options", {}).get("skipped", {}).items():
            rows.append(("left out", f"{entry['count']:,} for {kind}, the first: {entry['first']}"))
    else:
        rows.append(("stored as", f"InternLM .bin, {len(store.files):,} files"))
    if seq_len is not None or _has_mask(store):
        rows += describe(measure(store, _end_ids(store, tokenizer), seq_len), seq_len)
    if tokenizer is not None:
        ends = f"bos {tokenizer.bos_id}, eos {tokenizer.eos_id}"
        rows.append(("tokenizer", f"{tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}, {ends}"))
        rows.append(("", f"fingerprint {tokenizer.fingerprint}"))
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(Text(title, style="bold"))
    console.print(table)


def _has_mask(store: ShardSet | InternLMFiles) -> bool:
    if isinstance(store, ShardSet):
        return any(shard.masked for shard in store.shards)
    return any(store.document(index)[1] is not None for index in range(min(store.num_documents, _FIRST)))


def _end_ids(store: ShardSet | InternLMFiles, tokenizer: Tokenizer | None) -> set[int]:
    """Return the ids that end answers: those that conversations were prepared with, else the special tokens."""
    if tokenizer is None:
        return set()
    options = store.manifest.get("options", {}) if isinstance(store, ShardSet) else {}
    eos = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    stop = options.get("conversations", {}).get("stop", [])
    return eos | {tokenizer.id_of(token) for token in stop}


def _shard_table(store: ShardSet) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("shard")
    for column in ("tokens", "documents", "loss"):
        table.add_column(column, justify="right")
    many = len(store.shards) > _FULL_TABLE
    listed = [*store.shards[:_ENDS], None, *store.shards[-_ENDS:]] if many else store.shards
    for shard in listed:
        if shard is None:
            table.add_row("...", "", "", "")
        else:
            loss = "in part" if shard.masked else "all"
            table.add_row(shard.name, f"{shard.tokens:,}", f"{shard.documents:,}", loss)
    return table


def _print_document(
    store: ShardSet | InternLMFiles,
    index: int,
    tokenizer: Tokenizer | None,
    chars: int,
    plain: bool,
    console: Console,
) -> None:
    """Print one document between rules, cut to `chars` characters."""
    ids, trained = store.document(index)
    title = f"document {index:,}: {len(ids):,} tokens"
    if trained is not None:
        title += f", {int(trained.sum()):,} with loss"
    console.print(Rule(Text(title), align="left"))
    # A long document is cut before it is decoded; a token is seldom less than a quarter of a character.
    ids, trained = ids[: 4 * chars], None if trained is None else trained[: 4 * chars]
    try:
        text = Text()
        before = False
        for run, style, loss in _runs(ids, trained, tokenizer):
            if plain and loss != before:
                text.append("[[" if loss else "]]", style="bold")
            before = loss
            words = " ".join(map(str, run)) + " " if tokenizer is None else tokenizer.decode(run, skip_special=False)
            text.append(words, style=style)
    except DataError as error:
        raise DataError(f"{store.place(index)}: {error}") from error
    if plain and before:
        text.append("]]", style="bold")
    if len(text) > chars or len(ids) == 4 * chars:
        text = text[:chars] + Text(" ...", style="bold")
    console.print(text, soft_wrap=True)


def _runs(
    ids: NDArray[np.integer], trained: NDArray[np.bool_] | None, tokenizer: Tokenizer | None
) -> Iterator[tuple[list[int], str, bool]]:
    """Cut ids into runs of one look: special tokens, without loss, or plain; and say whether they are trained."""
    special = np.isin(ids, sorted(tokenizer.special_ids)) if tokenizer else np.zeros(len(ids), bool)
    loss = np.ones(len(ids), bool) if trained is None else trained
    looks = np.where(special, 2, np.where(loss, 0, 1))
    cuts = [0, *(np.flatnonzero(np.diff(2 * looks + loss)) + 1).tolist(), len(ids)]
    for start, stop in pairwise(cuts):
        if stop > start:
            style = ("", _NO_LOSS_STYLE, _SPECIAL_STYLE)[looks[start]]
            yield ids[start:stop].tolist(), style, bool(loss[start])


def _verify(store: ShardSet | InternLMFiles, tokenizer: Tokenizer | None) -> str:
    """Read everything: check checksums where there are some, and ids where the vocabulary is known; say which."""
    if isinstance(store, InternLMFiles):
        for index in range(store.num_documents):
            ids, _ = store.document(index)
            if tokenizer is not None and len(ids) and ids.max() >= tokenizer.vocab_size:
                raise DataError(_outside(store, index, int(ids.max()), tokenizer.vocab_size))
        return "every line can be read" + (", every id is in the vocabulary" if tokenizer else "")
    store.verify()
    for start in range(0, store.num_tokens, _BLOCK):
        ids, _ = store.read(start, min(start + _BLOCK, store.num_tokens))
        if ids.max() >= store.vocab_size:
            position = start + int(np.argmax(ids >= store.vocab_size))
            index = _document_at(store, position)
            raise DataError(_outside(store, index, int(ids.max()), store.vocab_size))
    return "every file has its checksum, every id is in the vocabulary"


def _document_at(store: ShardSet, position: int) -> int:
    """Find the document that holds the token at `position`."""
    for first in range(0, store.num_documents, _BLOCK):
        ends = store.ends(first, min(first + _BLOCK, store.num_documents))
        if position < ends[-1]:
            return first + int(np.searchsorted(ends, position, side="right"))
    raise IndexError(position)


def _outside(store: ShardSet | InternLMFiles, index: int, token: int, vocab_size: int) -> str:
    return (
        f"{store.place(index)}: id {token} is outside the vocabulary of {vocab_size}; "
        "use the tokenizer that made the ids"
    )
