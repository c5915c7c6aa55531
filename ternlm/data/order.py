"""The order of data as pure functions: a permutation without memory, and where each step's sequences begin.

Nothing here is stored but the question's integers, so any rank of any world size computes the same order from
the same seed, at any step. Which source a sequence is drawn from is `mixture`'s.
"""

import hashlib

from ternlm.config.data import BatchConfig

_ROUNDS = 8
_WORD = (1 << 64) - 1


def permute(index: int, size: int, keys: tuple[int, ...]) -> int:
    """Map `index` to its place in a pseudo-random permutation of range(size), which `keys` choose.

    A Feistel network permutes the smallest 2^(2h) >= size; a result outside the range is mapped again until
    it falls within (cycle walking: Black and Rogaway, 2002), fewer than 4 times on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


def permutation_keys(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    """Return the keys of the permutation in which `source` is read in `epoch`."""
    return tuple(hash_words(f"{seed}/{source}/{epoch}", _ROUNDS))


def hash_words(text: str, count: int = 1) -> list[int]:
    """Return `count` (at most 8) 64-bit integers that depend on the text alone, on any machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8 * count).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 8 * count, 8)]


def mix(word: int) -> int:
    """Scatter a 64-bit integer over all 64-bit integers, one to one (the finaliser of SplitMix64)."""
    word &= _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def first_sequence(batch: BatchConfig, step: int) -> int:
    """Return the global index of the first sequence of the 0-based `step`: the sum of all earlier batches."""
    if batch.rampup is None:
        return step * batch.global_sequences
    start, increment, every = batch.rampup.start, batch.rampup.increment, batch.rampup.every
    sizes_below = -(-(batch.global_sequences - start) // increment)  # batch sizes smaller than the full one
    whole, rest = divmod(min(step, sizes_below * every), every)
    growing = every * (whole * start + increment * whole * (whole - 1) // 2) + rest * (start + increment * whole)
    return growing + max(0, step - sizes_below * every) * batch.global_sequences
