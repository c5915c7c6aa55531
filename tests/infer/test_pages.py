"""Blocks: shared by equal beginnings, taken back, never two owners of what is written."""

import random

import pytest

from ternlm.infer.pages import BLOCK, BlockPool


def tokens(count, seed=0):
    return [(seed * 7919 + 31 * i) % 1000 for i in range(count)]


def stored(pool, text, rope_length=0):
    """Pages of a text all of whose tokens are stored."""
    pages, _ = pool.begin(text, rope_length)
    assert pool.grow(pages, len(text))
    pool.tell(pages, text, len(text))
    return pages


def test_a_beginning_that_is_stored_is_found_by_whole_blocks():
    pool = BlockPool(20)
    first = stored(pool, tokens(4 * BLOCK + 3))
    for length, found in [(4 * BLOCK + 3, 4), (4 * BLOCK, 3), (4 * BLOCK + 1, 4), (BLOCK, 0), (BLOCK + 1, 1), (1, 0)]:
        pages, count = pool.begin(tokens(length), 0)
        assert (count, pages.blocks) == (found * BLOCK, first.blocks[:found])
        pool.end(pages)
    other = tokens(3 * BLOCK)
    other[BLOCK + 2] += 1
    pages, count = pool.begin(other, 0)
    assert (count, pages.blocks) == (BLOCK, first.blocks[:1])


def test_equal_blocks_behind_other_ones_are_others():
    pool, same = BlockPool(20), tokens(BLOCK)
    stored(pool, [*tokens(BLOCK, 1), *same, 0])
    pages, count = pool.begin([*tokens(BLOCK, 2), *same, 0], 0)
    assert (count, pages.blocks) == (0, [])
    pages, count = pool.begin([*same, 0], 0)
    assert count == 0


def test_keys_of_another_rotation_are_not_found():
    pool, text = BlockPool(20), tokens(3 * BLOCK)
    stored(pool, text, rope_length=64)
    assert pool.begin(text, 128)[1] == 0
    assert pool.begin(text, 64)[1] == 2 * BLOCK


def test_what_ended_can_be_found_until_its_place_is_needed_the_oldest_first():
    pool = BlockPool(6)
    old, new = stored(pool, tokens(2 * BLOCK, 1)), stored(pool, tokens(3 * BLOCK, 2))
    pool.end(old)
    pool.end(new)
    assert pool.num_free == 6
    third, _ = pool.begin((), 0)
    assert pool.grow(third, 3 * BLOCK)  # one that was never used, then the old text's
    pages, count = pool.begin([*tokens(2 * BLOCK, 1), 0], 0)
    assert count == 0
    pages, count = pool.begin([*tokens(3 * BLOCK, 2), 0], 0)
    assert count == 3 * BLOCK
    assert pool.num_free == 0
    assert not pool.grow(pages, 3 * BLOCK + 1)
    assert len(pages.blocks) == 3


def test_the_end_of_a_text_is_given_away_before_its_beginning():
    pool = BlockPool(4)
    pool.end(stored(pool, tokens(4 * BLOCK)))
    other, _ = pool.begin((), 0)
    assert pool.grow(other, BLOCK)
    assert pool.begin(tokens(4 * BLOCK), 0)[1] == 3 * BLOCK


def test_a_shared_block_lives_as_long_as_its_last_user():
    pool, text = BlockPool(4), tokens(2 * BLOCK + 1)
    first = stored(pool, text)
    second, _ = pool.begin(text, 0)
    pool.end(first)
    assert (pool.num_free, pool.num_used) == (2, 2)
    assert pool.grow(second, 4 * BLOCK)
    assert not pool.grow(second, 5 * BLOCK)
    assert len(set(second.blocks)) == 4


def test_forgetting_finds_nothing_any_more():
    pool, text = BlockPool(4), tokens(2 * BLOCK + 1)
    pool.end(stored(pool, text))
    pool.forget()
    assert (pool.begin(text, 0)[1], pool.num_free) == (0, 4)


def test_no_block_is_lost_or_written_by_two_over_thousands_of_steps():
    rng = random.Random(3)
    pool, running = BlockPool(40), []
    for _ in range(5000):
        if running and rng.random() < 0.45:
            pages, _, _ = running.pop(rng.randrange(len(running)))
            pool.end(pages)
        else:
            text = [*tokens(rng.randrange(1, 70), rng.randrange(4)), rng.randrange(1000)]
            pages, found = pool.begin(text, 0)
            if not pool.grow(pages, len(text)):
                pool.end(pages)
                continue
            pool.tell(pages, text, len(text))
            running.append((pages, text, found))
        written = [block for pages, text, found in running for block in pages.blocks[found // BLOCK :]]
        assert len(written) == len(set(written))
        used = {block for pages, _, _ in running for block in pages.blocks}
        assert pool.num_used == len(used)
    for pages, _, _ in running:
        pool.end(pages)
    assert pool.num_free == 40


def test_a_pool_without_blocks_is_refused():
    with pytest.raises(ValueError, match="num_blocks = 0"):
        BlockPool(0)
