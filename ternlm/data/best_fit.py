"""Whole documents put together into sequences, with as little padding as best fit leaves (arXiv 2404.10830).

Each document, the longest first, goes into the fullest sequence that still has room for it. `source` reads what is
assigned here; nothing depends on seeds or ranks.
"""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assign documents of these lengths (tokens, each at most seq_len) to sequences.

    Returns the documents in the order of the sequences, and where each sequence begins among them and the last ends.
    """
    sequences: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # ascending, those of which there are sequences
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            sequence, room = len(sequences), seq_len
            sequences.append([])
        else:
            room = rooms[at]
            sequence = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        sequences[sequence].append(document)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(sequence)
    order = np.array([document for documents in sequences for document in documents], dtype=np.int64)
    return order, np.cumsum([0, *map(len, sequences)], dtype=np.int64)
