"""One named source of training sequences: a token store, the documents kept of it, and its windows.

Between the stores (`shards`, `internlm`) and `pack`. It decides which documents count (length, held out or
not) and which tokens make sequence number p; the order of drawing is `order`'s and `mixture`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ternlm.config.data import DataConfig, SourceConfig
from ternlm.data.best_fit import best_fit
from ternlm.data.errors import DataError
from ternlm.data.internlm import InternLMFiles, find_bins
from ternlm.data.order import hash_words
from ternlm.data.shards import MANIFEST, ShardSet

_BLOCK = 1024  # documents between two entries of the index, which must fit in memory for billions of them
_SCAN = 1024 * _BLOCK


class TokenStore(Protocol):
    """Documents on disk, read as one run of tokens."""

    @property
    def path(self) -> Path: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def fingerprint(self) -> str | None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]: ...
    def ends(self, first: int, last: int) -> NDArray[np.int64]: ...
    def leaders(self, first: int, last: int) -> NDArray[np.int64]: ...
    def place(self, index: int) -> str: ...


@dataclass(frozen=True)
class Window:
    """The tokens behind one sequence: consecutive fragments of documents."""

    ids: NDArray[Any]
    """At most seq_len tokens, and one more if the last document goes on after them."""
    trained: NDArray[np.bool_] | None
    """Which of `ids` carry loss when they are the target; None: all of them."""
    lengths: NDArray[np.int64]
    """Tokens of each fragment; they sum to len(ids), or one less if the last document goes on."""
    documents: NDArray[np.int64]
    """Index, in the store, of the document of each fragment."""


EMPTY_WINDOW = Window(np.empty(0, np.int64), None, np.empty(0, np.int64), np.empty(0, np.int64))


class Source:
    """Sequences of seq_len tokens over the kept documents of a store.

    Held-out documents are chosen by a hash of the source's name and the document's index, whatever the seed (those
    that belong together, as the samples of one conversation do, by the index of their first);
    `validation` keeps those alone, and the final partial window; training keeps the others and drops it.
    """

    def __init__(
        self,
        name: str,
        store: TokenStore,
        *,
        seq_len: int,
        whole_documents: Literal["pad", "best_fit"] | None = None,
        too_long: Literal["cut", "drop"] = "cut",
        min_length: int = 0,
        validation_fraction: float = 0.0,
        validation: bool = False,
    ) -> None:
        """Open a source; the arguments are the settings of the same names.

        whole_documents: how documents that aren't cut into windows are put into sequences.
        """
        self.name = name
        self.store = store
        self.seq_len = seq_len
        # A document of one token has nothing to predict: alone in its row it would be a row for nothing.
        shortest = max(min_length, 2 if whole_documents else 1)
        self._kept = _KeptDocuments(store, shortest, _HeldOut(name, validation_fraction, validation))
        self.num_documents = self._kept.num_documents
        self.num_tokens = self._kept.num_tokens
        self._whole: _WholeDocuments | None = None
        if whole_documents:
            self._whole = _WholeDocuments(store, self._kept.all(), seq_len, too_long, whole_documents)
            self.num_documents, self.num_tokens = len(self._whole.lengths), int(self._whole.lengths.sum())
        whole, rest = divmod(self.num_tokens, seq_len)
        windows = whole + (1 if validation and rest else 0)
        self.num_sequences = self._whole.num_sequences if self._whole else windows

    @property
    def num_cut(self) -> int:
        """Documents whose end is lost, since they are longer than a sequence."""
        return self._whole.num_cut if self._whole else 0

    @property
    def num_dropped(self) -> int:
        """Documents left out, since they are longer than a sequence or, in best fit, since the cut leaves no target."""
        return self._whole.num_dropped if self._whole else 0

    def window(self, position: int) -> Window:
        """Read sequence `position` of range(num_sequences)."""
        if not 0 <= position < self.num_sequences:
            raise IndexError(f"source {self.name!r} has {self.num_sequences} sequences, not number {position}")
        if self._whole:
            documents, starts, lengths, goes_on = self._whole.sequence(position)
        else:
            first = position * self.seq_len
            last = min(first + self.seq_len, self.num_tokens)
            documents, starts, lengths, goes_on = self._kept.fragments(first, last)
        ids, trained = self._read(starts, lengths, 1 if goes_on else 0)
        return Window(ids, trained, lengths, documents)

    def _read(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64], extra: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Read fragments of the store, and `extra` tokens after them; neighbours are read at one go."""
        stops = starts + lengths
        cuts = np.flatnonzero(starts[1:] != stops[:-1]) + 1
        stops[-1] += extra
        runs = zip(starts[[0, *cuts]].tolist(), stops[[*(cuts - 1), -1]].tolist(), strict=True)
        parts = [self.store.read(start, stop) for start, stop in runs]
        if len(parts) == 1:
            return parts[0]
        ids = np.concatenate([ids for ids, _ in parts])
        if all(trained is None for _, trained in parts):
            return ids, None
        masks = [np.ones(len(ids), bool) if trained is None else trained for ids, trained in parts]
        return ids, np.concatenate(masks)


def open_store(path: str | Path) -> TokenStore:
    """Open a prepared folder, or a file or folder of InternLM .bin files."""
    place = Path(path)
    if not place.exists():
        raise DataError(f"{place}: no such file or folder; is the path right, seen from the current folder?")
    if not (place / MANIFEST).is_file() and find_bins(place):
        return InternLMFiles.open(place)
    if place.is_file():
        raise DataError(f"{place}: not an InternLM .bin file; turn text into tokens with `tern data prepare`")
    return ShardSet.open(place)


def open_source(config: SourceConfig, data: DataConfig, *, validation: bool, fraction: float) -> Source:
    """Open one source of the settings; a source without a single sequence is an error.

    validation: read the held-out documents, `fraction` of them all; else read the others.
    """
    whole_documents = data.packing if data.packing in ("pad", "best_fit") else None
    source = Source(
        config.name,
        open_store(config.path),
        seq_len=data.seq_len,
        whole_documents=whole_documents,
        too_long=data.too_long,
        min_length=config.min_length,
        validation_fraction=fraction,
        validation=validation,
    )
    if source.num_sequences == 0:
        store = source.store
        if whole_documents:
            raise DataError(_why_none(source, data, "held out" if validation else "left to train on", fraction))
        raise DataError(
            f"source {config.name!r} ({config.path}): no sequence of seq_len = {data.seq_len} tokens. It has "
            f"{store.num_documents} documents, {store.num_tokens} tokens; {source.num_documents} documents, "
            f"{source.num_tokens} tokens are left by min_length = {config.min_length} and as the "
            f"{'held-out' if validation else 'training'} part at data.validation_fraction = {fraction:g}. "
            "Give it more text, or change these settings"
        )
    return source


def _why_none(source: Source, data: DataConfig, part: str, fraction: float) -> str:
    """Say why none of a source's whole documents can be used."""
    name, count = f"source {source.name!r} ({source.store.path})", source.store.num_documents
    if source.num_dropped:
        how = "longer than it" if data.too_long == "drop" else "longer than it, with all that is trained behind the cut"
        return (
            f"{name}: data.seq_len = {data.seq_len} is too short: {source.num_dropped} of its {count} documents are "
            f"{how}, and no other is left; raise it"
        )
    return (
        f"{name}: data.validation_fraction = {fraction:g} of its {count} documents leaves none that is {part}; choose "
        "another fraction, or give it more"
    )


def check_tokenizers(sources: Sequence[Source], vocab_size: int, fingerprint: str | None = None) -> None:
    """Refuse sources made by different tokenizers, or by one larger than the model's vocabulary.

    fingerprint: of the tokenizer that the run uses. InternLM .bin files don't say which tokenizer made them; their
    ids are looked through instead.
    """
    for source in sources:
        if isinstance(source.store, InternLMFiles):
            source.store.check_ids(vocab_size)
    known = [source for source in sources if source.store.fingerprint is not None]
    for source in known:
        store, first = source.store, known[0].store
        if fingerprint and store.fingerprint != fingerprint:
            raise DataError(
                f"source {source.name!r} ({store.path}) was made by the tokenizer {store.fingerprint}, but "
                f"this run's is {fingerprint}; prepare the data again with the latter"
            )
        if store.fingerprint != first.fingerprint:
            raise DataError(
                f"sources {known[0].name!r} ({first.path}) and {source.name!r} ({store.path}) were made by "
                f"different tokenizers, {first.fingerprint} and {store.fingerprint}; prepare both with one"
            )
        if store.vocab_size is not None and store.vocab_size > vocab_size:
            raise DataError(
                f"source {source.name!r} ({store.path}): its tokenizer has {store.vocab_size} ids, but the "
                f"model's vocab_size = {vocab_size}; set model.vocab_size to at least {store.vocab_size}"
            )


class _HeldOut:
    """Which documents are held out: a hash of the source's name and an index says it."""

    def __init__(self, name: str, fraction: float, wanted: bool) -> None:
        self._key = np.uint64(hash_words(f"held out/{name}")[0])
        self._limit = fraction * 2.0**53
        self._wanted = wanted
        self.keeps_all = fraction == (1.0 if wanted else 0.0)

    def keeps(self, leaders: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say for documents, each given by the first one of those it belongs with, whether they are wanted."""
        word = (leaders + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        word += self._key
        word = (word ^ word >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ word >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
        return ((word >> np.uint64(11)) < self._limit) == self._wanted


class _WholeDocuments:
    """Documents of which each lies in one sequence, alone or with others; all are listed in memory."""

    def __init__(
        self,
        store: TokenStore,
        kept: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
        seq_len: int,
        too_long: Literal["cut", "drop"],
        packing: Literal["pad", "best_fit"],
    ) -> None:
        indices, starts, lengths = kept
        long = lengths > seq_len
        usable = ~long
        if too_long == "cut":
            usable = np.ones(len(lengths), bool)
        if too_long == "cut" and packing == "best_fit":
            for place in np.flatnonzero(long).tolist():
                # The target of the last token is the one after it.
                _, trained = store.read(int(starts[place]), int(starts[place]) + seq_len + 1)
                usable[place] = trained is None or bool(trained[1:].any())
        self.num_dropped = int((~usable).sum())
        self._indices, self._starts = indices[usable], starts[usable]
        self._goes_on = long[usable]
        self.num_cut = int(self._goes_on.sum())
        self.lengths = np.minimum(lengths[usable], seq_len)
        if packing == "best_fit":
            self._order, self._firsts = best_fit(self.lengths, seq_len)
        else:
            self._order = np.arange(len(self.lengths))
            self._firsts = np.arange(len(self.lengths) + 1)
        self.num_sequences = len(self._firsts) - 1

    def sequence(self, position: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], bool]:
        """Find a sequence's documents; returns as `_KeptDocuments.fragments`."""
        chosen = self._order[self._firsts[position] : self._firsts[position + 1]]
        # One that goes on fills its sequence, so that it is the only one there.
        return self._indices[chosen], self._starts[chosen], self.lengths[chosen].copy(), bool(self._goes_on[chosen[-1]])


class _KeptDocuments:
    """The documents of a store that count, and where they lie, by an index of every 1024th document."""

    def __init__(self, store: TokenStore, shortest: int, held_out: _HeldOut) -> None:
        self._store = store
        self._shortest = shortest
        self._held_out = held_out
        documents, tokens = [], []
        for first in range(0, store.num_documents, _SCAN):
            last = min(first + _SCAN, store.num_documents)
            _, lengths = self._bounds(first, last)
            if lengths.min() < 0:
                raise DataError(f"{store.place(first + int(lengths.argmin()))}: ends before it begins; prepare again")
            kept = self._keeps(first, lengths)
            blocks = np.arange(0, last - first, _BLOCK)
            documents.append(np.add.reduceat(kept, blocks, dtype=np.int64))
            tokens.append(np.add.reduceat(np.where(kept, lengths, 0), blocks))
        self._documents = np.cumsum(np.concatenate([[0], *documents]), dtype=np.int64)
        self._tokens = np.cumsum(np.concatenate([[0], *tokens]), dtype=np.int64)
        self.num_documents = int(self._documents[-1])
        self.num_tokens = int(self._tokens[-1])

    def all(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """List the kept documents: each one's index, start and length in the store."""
        blocks = [self._block(block) for block in range(-(-self._store.num_documents // _BLOCK))]
        nothing = np.empty(0, np.int64)
        indices, starts, lengths = (np.concatenate([nothing, *(block[i] for block in blocks)]) for i in range(3))
        return indices, starts, lengths

    def fragments(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], bool]:
        """Find tokens [start, stop) of the kept documents.

        Returns per fragment of a document its document, start and length in the store, and whether the last
        document goes on after `stop`.
        """
        block = int(np.searchsorted(self._tokens, start, side="right")) - 1
        after = int(np.searchsorted(self._tokens, stop, side="left"))
        blocks = [self._block(i) for i in range(block, after)]
        indices, starts, lengths = (np.concatenate(columns) for columns in zip(*blocks, strict=True))
        ends = int(self._tokens[block]) + np.cumsum(lengths)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left")) + 1
        ends, lengths = ends[first:last], lengths[first:last]
        skipped = np.maximum(start - (ends - lengths), 0)
        cut = np.maximum(ends - stop, 0)
        return indices[first:last], starts[first:last] + skipped, lengths - skipped - cut, bool(cut[-1])

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return index, start and length of the kept documents of a block."""
        first = block * _BLOCK
        starts, lengths = self._bounds(first, min(first + _BLOCK, self._store.num_documents))
        kept = np.flatnonzero(self._keeps(first, lengths))
        return kept + first, starts[kept], lengths[kept]

    def _keeps(self, first: int, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
        long_enough = lengths >= self._shortest
        if self._held_out.keeps_all:
            return long_enough
        return long_enough & self._held_out.keeps(self._store.leaders(first, first + len(lengths)))

    def _bounds(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return start and length of documents first..last-1."""
        ends = self._store.ends(max(first - 1, 0), last)
        bounds = ends if first else np.append(0, ends)
        return bounds[:-1], np.diff(bounds)
