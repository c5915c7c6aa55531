"""Windows of tokens -> the rows of a Batch: targets, weights, positions and segments, for all three packings.

The label rule is here and nowhere else: a token's target is the next token of the same document. Called by
`loader`, in its threads; numpy up to the last line.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ternlm.data.batch import Batch
from ternlm.data.source import Window


def pack(
    windows: Sequence[Window], types: Sequence[int], names: tuple[str, ...], *, seq_len: int, across: bool
) -> Batch:
    """Make a batch with one row per window.

    types: each row's index into `names`. across: attention and positions run over the whole row, and the last
    token of each fragment of a document, also at the row's end, has no target; else documents stay apart.
    """
    shape = (len(windows), seq_len)
    tokens, targets, positions = (np.zeros(shape, np.int64) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    lengths = []
    for row, window in enumerate(windows):
        _fill_labels(tokens[row], targets[row], weights[row], window, across)
        segments = _segments(window, seq_len, across)
        positions[row] = _count_within(segments, seq_len)
        lengths.append(tuple(segments.tolist()))
    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        targets_BT=torch.from_numpy(targets),
        weights_BT=torch.from_numpy(weights),
        positions_BT=torch.from_numpy(positions),
        lengths=tuple(lengths),
        types_B=torch.tensor(types, dtype=torch.int64),
        names=names,
    )


def _fill_labels(
    tokens: NDArray[np.int64],
    targets: NDArray[np.int64],
    weights: NDArray[np.float32],
    window: Window,
    across: bool,
) -> None:
    """Write a window into one row that is all zeros."""
    count = int(window.lengths.sum())
    if count == 0:
        return
    known = count - 1 if across else len(window.ids) - 1
    tokens[:count] = window.ids[:count]
    targets[:known] = window.ids[1 : known + 1]
    weights[:known] = 1 if window.trained is None else window.trained[1 : known + 1]
    weights[np.cumsum(window.lengths[:-1]) - 1] = 0
    targets[weights == 0] = 0


def _segments(window: Window, seq_len: int, across: bool) -> NDArray[np.int64]:
    """Return the lengths of the segments that attention may not cross; padding is the last one."""
    lengths = window.lengths.sum(keepdims=True) if across else window.lengths
    segments = np.append(lengths, seq_len - lengths.sum())
    return segments[segments > 0]


def _count_within(segments: NDArray[np.int64], seq_len: int) -> NDArray[Any]:
    """Count 0, 1, 2, ... anew in each segment."""
    starts = np.cumsum(segments) - segments
    return np.arange(seq_len) - np.repeat(starts, segments)
