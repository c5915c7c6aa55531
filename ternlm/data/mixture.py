"""Which source each sequence is drawn from: a pure function of weights, seed and the sequence's index.

The sources are halved again and again; at each halving an integer product says how many of the first i draws
went left. So the shares hold at every moment to within a few draws, not only on average, and any index is
answered without those before it.
"""

from collections.abc import Sequence

from ternlm.data.order import hash_words

_ONE = 1 << 32


class Mixture:
    """Draws from sources in proportion to their weights; shares are exact to 2^-32 at each halving."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._count = len(weights)
        self._splits: dict[tuple[int, int], tuple[int, int]] = {}
        self._divide(weights, seed, 0, self._count)

    def pick(self, index: int) -> tuple[int, int]:
        """Return the source of the sequence `index`, and how many earlier sequences were drawn from it."""
        low, high = 0, self._count
        while high - low > 1:
            share, phase = self._splits[low, high]
            left = (index * share + phase) // _ONE
            goes_left = ((index + 1) * share + phase) // _ONE > left
            middle = (low + high) // 2
            low, high = (low, middle) if goes_left else (middle, high)
            index = left if goes_left else index - left
        return low, index

    def _divide(self, weights: Sequence[float], seed: int, low: int, high: int) -> None:
        """Note for the sources [low, high), and for each half of them, the left half's share (of 2^32)."""
        if high - low < 2:
            return
        middle = (low + high) // 2
        left, right = sum(weights[low:middle]), sum(weights[middle:high])
        share = round(_ONE * (left / (left + right)))
        # A share of 0 or 1 would silence a source for ever; the phase lets seeds differ.
        share = min(max(share, 1), _ONE - 1)
        self._splits[low, high] = share, hash_words(f"{seed}/mixture/{low}-{high}")[0] % _ONE
        self._divide(weights, seed, low, middle)
        self._divide(weights, seed, middle, high)
