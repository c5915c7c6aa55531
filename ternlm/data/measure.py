"""What the samples of a token store add up to: their lengths, what of them is trained, what a sequence would cut off.

`inspect` shows it; any `TokenStore` can be measured.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternlm.data.source import TokenStore

_BLOCK = 4096  # documents read at a time


@dataclass(frozen=True)
class Measures:
    """Per sample."""

    lengths: NDArray[np.int64]
    """Tokens."""
    trained: NDArray[np.int64]
    """Tokens with loss."""
    kept: NDArray[np.int64]
    """Of these, those among the sample's first seq_len tokens."""
    ended: NDArray[np.bool_]
    """Whether the last token with loss ends answers."""


def measure(store: TokenStore, ends: Collection[int], seq_len: int | None = None) -> Measures:
    """Read all samples of a store. ends: ids that end answers. seq_len: tokens of a sequence; None: as many as any."""
    parts = [
        _measure(store, first, min(first + _BLOCK, store.num_documents), ends, seq_len)
        for first in range(0, store.num_documents, _BLOCK)
    ]
    none = np.empty(0, np.int64)
    columns = list(zip(*parts, strict=True)) or [(none,)] * 4
    lengths, trained, kept, ended = (np.concatenate(column) for column in columns)
    return Measures(lengths, trained, kept, ended.astype(bool))


def _measure(
    store: TokenStore, first: int, last: int, ends: Collection[int], seq_len: int | None
) -> tuple[NDArray[Any], ...]:
    bounds = store.ends(max(first - 1, 0), last)
    bounds = bounds if first else np.append(0, bounds)
    ids, mask = store.read(int(bounds[0]), int(bounds[-1]))
    mask = np.ones(len(ids), dtype=bool) if mask is None else mask
    starts, lengths = bounds[:-1] - bounds[0], np.diff(bounds)
    document = np.repeat(np.arange(last - first), lengths)
    place = np.arange(len(ids)) - starts[document]
    within = mask if seq_len is None else mask & (place < seq_len)
    trained, kept = (np.bincount(document[which], minlength=last - first) for which in (mask, within))
    newest = np.full(last - first, -1, dtype=np.int64)
    newest[document[mask]] = ids[mask]  # of several in one sample the last one stays
    return lengths, trained, kept, np.isin(newest, list(ends))


def describe(measures: Measures, seq_len: int | None = None) -> list[tuple[str, str]]:
    """Say in words what was measured: (name, value) for a table."""
    lengths, total = measures.lengths, int(measures.lengths.sum())
    count = max(len(lengths), 1)
    trained = int(measures.trained.sum())
    rows = [("trained", f"{trained:,} tokens, {trained / max(total, 1):.1%} of all")]
    if len(lengths):
        median, most, nearly = (int(np.percentile(lengths, share, method="higher")) for share in (50, 90, 99))
        longest = int(lengths.max())
        told = f"median {median:,}, 90 % up to {most:,}, 99 % up to {nearly:,}, longest {longest:,}"
        rows.append(("lengths", told))
    rows.append(("ends", f"{measures.ended.sum() / count:.1%} of the samples have an end token as their last trained"))
    untrained = int((measures.trained == 0).sum())
    if untrained:
        rows.append(("without loss", f"{untrained:,} samples"))
    if seq_len is not None:
        cut, lost = int((lengths > seq_len).sum()), trained - int(measures.kept.sum())
        rows.append(
            (
                f"cut at {seq_len:,}",
                f"{cut:,} samples, {cut / count:.1%}; {lost:,} trained tokens lost, {lost / max(trained, 1):.1%}",
            )
        )
    return rows
