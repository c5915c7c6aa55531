"""The token ids that every configuration of a workload trains on, as two .npy files.

Ids follow Zipf's law over the vocabulary, so that rows of the embedding are touched as in text; they mean nothing.
"""

from pathlib import Path

import numpy as np
from workloads import Workload

FIRST_ID = 3  # ids below are left to padding, begin and end of a document


def write_documents(workload: Workload, num_rows: int, folder: Path) -> list[int]:
    """Write tokens.npy (uint32 ids) and ends.npy (int64 end offsets), about `num_rows` rows; return the lengths.

    Each document fills a row exactly, or has a log-normal length with the workload's mean, at most a row.
    """
    rng = np.random.default_rng(20231)
    if workload.mean_document is None:
        lengths = np.full(num_rows, workload.seq_len)
    else:
        lengths = _short_lengths(rng, workload.mean_document, workload.seq_len, num_rows * workload.seq_len)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = np.arange(1, workload.shape.vocab_size - FIRST_ID + 1)
    share = 1.0 / (ranks + 2.7)
    ids = FIRST_ID + rng.choice(len(ranks), size=int(lengths.sum()), p=share / share.sum())
    np.save(folder / "tokens.npy", ids.astype(np.uint32))
    np.save(folder / "ends.npy", lengths.cumsum().astype(np.int64))
    return [int(n) for n in lengths]


def _short_lengths(rng: np.random.Generator, mean: int, longest: int, total: int) -> np.ndarray:
    """Draw log-normal lengths (sigma 0.8: most are shorter than the mean), at most `longest`; `total` tokens or so."""
    drawn = rng.lognormal(sigma=0.8, size=total // mean)
    scale = mean / drawn.mean()
    for _ in range(20):  # cutting the longest lowers the mean: scale the rest up until it's right
        lengths = (scale * drawn).round().clip(min(8, longest), longest)
        scale *= mean / lengths.mean()
    return lengths.astype(np.int64)
