import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternlm.config.data import BatchConfig, RampupConfig
from ternlm.data.order import first_sequence, hash_words, mix, permutation_keys, permute


def permutation(size: int, *keys_of) -> list[int]:
    keys = permutation_keys(*keys_of)
    return [permute(index, size, keys) for index in range(size)]


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000])
def test_every_size_is_permuted_one_to_one(size):
    assert sorted(permutation(size, 1, "en", 0)) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1 << 20, 1 << 50), st.data())
def test_large_sizes_stay_in_range_without_collision(size, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=20, unique=True))
    keys = permutation_keys(1, "en", 0)
    places = [permute(index, size, keys) for index in indices]
    assert all(0 <= place < size for place in places)
    assert len(set(places)) == len(places)


def test_the_order_is_this_one_on_any_machine_and_version():
    # A change here would reorder the data of every run that is resumed.
    assert permutation(10, 1234, "en", 0) == [7, 3, 6, 4, 1, 0, 5, 9, 2, 8]
    assert permute(123_456_789, 10**9, permutation_keys(1234, "en", 3)) == 695_537_119


def test_seed_source_and_epoch_each_give_another_order():
    orders = {tuple(permutation(50, *of)) for of in [(1, "en", 0), (2, "en", 0), (1, "cn", 0), (1, "en", 1)]}
    assert len(orders) == 4


@pytest.mark.parametrize("size", [3, 5, 10, 17])
def test_over_many_epochs_each_index_falls_on_each_place_equally_often(size):
    epochs = 1500
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[range(size), permutation(size, 1, "en", epoch)] += 1
    expected = epochs / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_are_scattered_over_the_whole_range():
    size, bins = 20_000, 10
    places = np.array(permutation(size, 1, "en", 0))
    counts = np.histogram2d(np.arange(size), places, bins=bins)[0]
    expected = size / bins**2
    freedom = (bins - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)
    steps = np.diff(places)
    assert len(np.unique(steps)) > size // 2
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05


def test_mix_is_one_to_one_and_changes_half_of_the_bits():
    words = [mix(word) for word in range(2000)]
    assert len(set(words)) == 2000
    flipped = [(mix(word) ^ mix(word ^ 1 << word % 64)).bit_count() for word in range(2000)]
    assert 31 < np.mean(flipped) < 33


def test_hash_words_differ_by_text_and_place():
    words = hash_words("a", 8) + hash_words("b", 8)
    assert len(set(words)) == 16
    assert hash_words("a", 2) == hash_words("a", 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.integers(0, 40))
def test_a_steps_first_sequence_is_the_sum_of_all_earlier_batches(start, increment, every, above):
    batch = BatchConfig(
        global_sequences=start + above,
        rampup=RampupConfig(start=start, increment=increment, every=every),
    )
    total = 0
    for step in range(120):
        assert first_sequence(batch, step) == total
        total += batch.sequences_at(step)


def test_without_ramp_up_a_steps_first_sequence_is_a_multiple_of_the_batch():
    assert first_sequence(BatchConfig(global_sequences=12), 10**9) == 12 * 10**9
