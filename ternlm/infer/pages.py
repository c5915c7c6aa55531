"""Which blocks of the key/value memory belong to whom: given out, shared by equal beginnings, taken back.

Numbers only: `key_values` has the tensors. A block holds the keys and values of BLOCK neighbouring tokens of a
sequence. Full ones are known by what they hold: the tokens, all tokens before them and the length that dynamic rope
scaling assumed. One that nobody uses any more is kept until its place is needed, the longest unused one going first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK = 16
"""Tokens of a block."""

_Key = tuple[int, tuple[int, ...]]


@dataclass
class Pages:
    """The blocks of one sequence, and how much of what they hold is known to others."""

    parent: int
    """Name of the newest block that is known by what it holds, or of what lies before the first."""
    blocks: list[int] = field(default_factory=list)
    num_known: int = 0
    """Blocks, from the first, that are known."""


class BlockPool:
    """Blocks 0..num_blocks-1 and who uses them."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks = {num_blocks} must be at least 1")
        self.num_blocks, self.block = num_blocks, BLOCK
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._names = 0
        self._known: dict[_Key, tuple[int, int]] = {}
        """Block and name of a beginning, by the name of what lies before its last block and that block's tokens.

        Names are never given twice: after a block is used anew nothing can be found behind what it held.
        """
        self._keys: dict[int, _Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Known blocks that nobody uses, the longest unused one first."""

    @property
    def num_free(self) -> int:
        """Blocks that can be given out now."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that sequences use."""
        return self.num_blocks - self.num_free

    def begin(self, tokens: Sequence[int], rope_length: int) -> tuple[Pages, int]:
        """Return the pages of a new sequence, and how many of its first tokens they hold already.

        One token at least is left: without a forward pass there is nothing to go on from. rope_length: context that
        dynamic rope scaling assumes; 0 where there is none.
        """
        pages = Pages(parent=-rope_length)
        for start in range(0, (len(tokens) - 1) // BLOCK * BLOCK, BLOCK):
            found = self._known.get((pages.parent, tuple(tokens[start : start + BLOCK])))
            if found is None:
                break
            block, pages.parent = found
            self._idle.pop(block, None)
            self._users[block] += 1
            pages.blocks.append(block)
        pages.num_known = len(pages.blocks)
        return pages, pages.num_known * BLOCK

    def grow(self, pages: Pages, num_tokens: int) -> bool:
        """Give a sequence blocks for `num_tokens` in all; False, and nothing given, where there aren't enough."""
        missing = -(-num_tokens // BLOCK) - len(pages.blocks)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._forget_oldest()
            self._users[block] = 1
            pages.blocks.append(block)
        return True

    def tell(self, pages: Pages, tokens: Sequence[int], num_stored: int) -> None:
        """Let others find the full blocks of a sequence of which `num_stored` tokens are stored."""
        while (pages.num_known + 1) * BLOCK <= num_stored:
            start = pages.num_known * BLOCK
            key = (pages.parent, tuple(tokens[start : start + BLOCK]))
            if key not in self._known:
                block = pages.blocks[pages.num_known]
                self._names += 1
                self._known[key] = (block, self._names)
                self._keys[block] = key
            # Else somebody told of the same tokens first: this block is a copy, which nobody will look for.
            pages.parent = self._known[key][1]
            pages.num_known += 1

    def end(self, pages: Pages) -> None:
        """Take a sequence's blocks back. What is known of them can be found until their place is needed."""
        for block in reversed(pages.blocks):  # beginnings stay longest: without them their ends can't be found
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)
        pages.blocks.clear()

    def disown(self, pages: Pages) -> list[int]:
        """Let blocks that this sequence alone uses be found no more; return them."""
        own = [block for block in pages.blocks if self._users[block] == 1]
        for block in own:
            if (key := self._keys.pop(block, None)) is not None:
                del self._known[key]
        return own

    def forget(self) -> None:
        """Let nothing be found any more: the weights have changed."""
        self._known.clear()
        self._keys.clear()
        self._free.extend(self._idle)
        self._idle.clear()

    def _forget_oldest(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._known[self._keys.pop(block)]
        return block
