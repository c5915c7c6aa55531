import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternlm.data.mixture import Mixture


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9), st.integers(0, 1 << 30))
def test_shares_hold_at_every_moment_and_draws_of_a_source_count_up(weights, seed):
    mixture = Mixture(weights, seed)
    drawn = [0] * len(weights)
    levels = math.ceil(math.log2(len(weights)))
    for index in range(300):
        source, draw = mixture.pick(index)
        assert draw == drawn[source]
        drawn[source] += 1
        for weight, count in zip(weights, drawn, strict=True):
            assert abs(count - (index + 1) * weight / sum(weights)) <= max(levels, 1)


def test_shares_hold_far_into_a_run():
    weights = [0.62, 0.3, 0.08]
    mixture = Mixture(weights, 7)
    start = 10**15
    picks = [mixture.pick(index) for index in range(start, start + 10_000)]
    for source, weight in enumerate(weights):
        draws = [draw for picked, draw in picks if picked == source]
        assert abs(len(draws) - 10_000 * weight) <= 2
        assert draws == list(range(draws[0], draws[0] + len(draws)))
        assert draws[0] / start == pytest.approx(weight, rel=1e-8)


def test_a_source_of_tiny_weight_is_still_drawn():
    mixture = Mixture([1.0, 1e-30], 1)
    assert mixture.pick(1 << 34)[1] < 1 << 34
    assert 1 <= (1 << 34) - mixture.pick(1 << 34)[1] <= 5


def test_one_source_takes_every_draw():
    assert [Mixture([3.0], 1).pick(index) for index in range(4)] == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_weights_count_only_relative_to_each_other():
    small, large = Mixture([1.0, 2.0, 5.0], 3), Mixture([10.0, 20.0, 50.0], 3)
    assert [small.pick(i) for i in range(500)] == [large.pick(i) for i in range(500)]


def test_seeds_interleave_the_sources_differently():
    orders = {tuple(Mixture([3.0, 2.0, 2.0], seed).pick(i)[0] for i in range(40)) for seed in range(8)}
    assert len(orders) > 4


def test_the_mixture_is_this_one_on_any_machine_and_version():
    # A change here would reorder the data of every run that is resumed.
    mixture = Mixture([0.5, 0.2, 0.2, 0.1], 1234)
    assert [mixture.pick(i)[0] for i in itertools.chain(range(12), [10**12])] == [
        2,
        1,
        0,
        0,
        3,
        1,
        0,
        2,
        0,
        0,
        2,
        1,
        0,
    ]
