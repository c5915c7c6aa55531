import random

import pytest
import torch

from ternlm.config.section import ConfigError
from ternlm.infer.params import SamplingParams
from ternlm.infer.sampling import Logprobs, Row, are_finite, logprobs_of, make_generator, make_generators, sample

LOGITS = torch.tensor([2.0, -1.0, 1.0, 0.5, 3.0, -2.0])
DRAWS = 4000


def draw(logits, params, times=DRAWS, seed=0):
    """Counts of each token in so many independent draws, all in one batch."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    tokens = sample(logits.expand(times, -1), [Row(params, generator)] * times)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits))


def rows(params, prompts, seed=0):
    """A row for each prompt, with a generator of its own."""
    return [
        Row(params, generator, prompt)
        for generator, prompt in zip(make_generators(seed, prompts), prompts, strict=True)
    ]


def most_likely(number):
    """LOGITS with all but so many of the largest at minus infinity."""
    values, tokens = LOGITS.topk(min(number, len(LOGITS)))
    return torch.full_like(LOGITS, -torch.inf).scatter(0, tokens, values)


def expect(counts, probabilities):
    """Chi-square test at 1e-4: what has probability 0 never comes, the rest as often as it should."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    degrees = int(possible.sum()) - 1
    limits = {0: 1e-6, 1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74}
    assert statistic < limits[degrees]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    counts = draw(LOGITS, SamplingParams(temperature=temperature))
    expect(counts, (LOGITS / temperature).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 100])
def test_top_k_draws_from_the_k_most_likely_renormalised(top_k):
    counts = draw(LOGITS, SamplingParams(top_k=top_k))
    expect(counts, most_likely(top_k).softmax(-1))


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.05, 1), (0.61, 1), (0.64, 2), (0.90, 3), (0.96, 4), (1.0, 6)])
def test_top_p_draws_from_the_smallest_set_that_reaches_p(top_p, num_kept):
    # In order: 0.621, 0.228, 0.084, 0.051 and so on.
    expect(draw(LOGITS, SamplingParams(top_p=top_p)), most_likely(num_kept).softmax(-1))


def test_top_p_counts_among_the_top_k_at_the_temperature():
    # At temperature 2 the top 3 renormalise to 0.506, 0.307 and 0.186; without top_k the first has 0.403.
    params = SamplingParams(temperature=2.0, top_k=3, top_p=0.5)
    assert draw(LOGITS, params, times=200)[4] == 200
    params = SamplingParams(temperature=2.0, top_k=3, top_p=0.8)
    expect(draw(LOGITS, params), (most_likely(2) / 2).softmax(-1))


def test_temperature_0_is_greedy_and_draws_nothing():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert sample(LOGITS[None], [Row(SamplingParams(temperature=0.0, top_k=2, top_p=0.5), generator)]) == [4]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("params", [SamplingParams(temperature=1e-30), SamplingParams(temperature=1e-30, top_p=0.5)])
def test_a_tiny_temperature_is_greedy(params):
    assert draw(LOGITS * 1e4, params, times=10)[4] == 10


@pytest.mark.parametrize("setting", ["temperature", "top_p", "min_p"])
@pytest.mark.parametrize("value", [5e-324, 1e-46, 1e-40])
def test_settings_too_small_for_float32_are_as_the_smallest_that_are_not(setting, value):
    counts = draw(LOGITS, SamplingParams(**{setting: value}), times=200)
    if setting == "min_p":
        assert (counts > 0).sum() > 3
    else:
        assert counts[4] == 200


def test_no_settings_within_their_rules_draw_what_is_no_token():
    rng, logits = random.Random(0), torch.randn(1, 600, generator=torch.Generator().manual_seed(0)) * 20
    small, choices = (5e-324, 1e-46, 1e-30, 0.5), {}
    choices["temperature"] = (*small, 0.0, 1.0, 2.0, 1e30)
    choices["top_p"] = (*small, 1 - 1e-9, 1.0)
    choices["min_p"] = (*small, 0.0, 1.0)
    choices["top_k"] = (0, 1, 300, 2**31 - 1)
    choices["repetition_penalty"] = (0.01, 1.0, 100.0)
    choices["presence_penalty"] = choices["frequency_penalty"] = (-2.0, 0.0, 2.0)
    choices["logit_bias"] = ((), tuple((i, -100.0) for i in range(600)), tuple((i, 100.0) for i in range(599)))
    for case in range(500):
        params = SamplingParams(**{name: rng.choice(values) for name, values in choices.items()})
        allowed = None if case % 2 else torch.arange(600) == 17
        row = Row(params, make_generator(case, [1]), [1, 2], [3, 3, 3], allowed)
        (token,) = sample(logits, [row])
        assert 0 <= token < 600
        assert allowed is None or token == 17


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    # Token 4 falls from 3 to 1.5, below token 0 with 2; token 5 from -2 to -4.
    row = Row(SamplingParams(temperature=0.0, repetition_penalty=2.0), torch.Generator(), [4, 4], [5])
    assert sample(LOGITS[None], [row]) == [0]
    row = Row(SamplingParams(repetition_penalty=2.0), torch.Generator().manual_seed(0), [4], [5, 5])
    tokens = torch.tensor(sample(LOGITS.expand(DRAWS, -1), [row] * DRAWS))
    penalised = torch.tensor([2.0, -1.0, 1.0, 0.5, 1.5, -4.0])
    expect(torch.bincount(tokens, minlength=6), penalised.softmax(-1))


def test_each_of_many_rare_tokens_has_its_own_share(monkeypatch):
    logits = torch.full((1, 100_001), -20.0)
    logits[0, 0] = 0.0
    rare = torch.tensor(-20.0, dtype=torch.float64).exp().item()
    total = 1 + 100_000 * rare
    for token in (1, 50_000, 99_999):
        uniform = torch.tensor((1 + (token - 0.5) * rare) / total, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, value=uniform, **__: value)
        assert sample(logits, [Row(SamplingParams(), torch.Generator())])[0] == pytest.approx(token, abs=1)


def test_a_token_without_probability_is_never_drawn_at_either_end(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for uniform, token in [(0.0, 1), (1.0, 2)]:
        monkeypatch.setattr(torch, "rand", lambda *_, value=uniform, **__: torch.tensor(value, dtype=torch.float64))
        assert sample(logits, [Row(SamplingParams(), torch.Generator())]) == [token]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_told(broken):
    logits = torch.stack([LOGITS, LOGITS, LOGITS])
    logits[0, 2] = -torch.inf  # one that can't be drawn; the others can
    logits[1, 3] = broken
    assert are_finite(logits) == [True, False, True]
    assert are_finite(torch.full((1, 9), -torch.inf)) == [False]


def test_a_row_is_drawn_alike_alone_and_in_any_batch():
    torch.manual_seed(0)
    logits = torch.randn(5, 1000)
    prompts = [[1], [1, 2], [3], [4], [5]]
    for params in (SamplingParams(), SamplingParams(top_k=50, top_p=0.9, temperature=0.7)):
        together = sample(logits, rows(params, prompts, 7))
        alone = [sample(logits[i : i + 1], rows(params, [prompts[i]], 7))[0] for i in range(5)]
        order = [3, 1, 4]
        others = sample(logits[order], rows(params, [prompts[i] for i in order], 7))
        assert together == alone
        assert others == [together[i] for i in order]


def test_generators_depend_on_seed_prompt_and_repetition_only():
    def numbers(seed, prompts):
        return [torch.rand((), generator=g).item() for g in make_generators(seed, prompts)]

    first = numbers(0, [[1, 2], [1, 2], [3]])
    assert numbers(0, [[3], [1, 2], [9], [1, 2]]) == [first[2], first[0], numbers(0, [[9]])[0], first[1]]
    assert len({*first, *numbers(1, [[1, 2], [1, 2], [3]])}) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("repetition_penalty", 0.0),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("inf")),
        ("min_new_tokens", 129),
        ("logprobs", 21),
    ],
)
def test_a_value_outside_its_rule_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name} = {value} must be"):
        SamplingParams(**{name: value})


MIN_P = [(0.0, 6), (0.01, 5), (0.08, 4), (0.09, 3), (0.36, 2), (0.4, 1), (1.0, 1)]


@pytest.mark.parametrize(("min_p", "num_kept"), MIN_P)
def test_min_p_draws_from_those_likely_enough_beside_the_likeliest(min_p, num_kept):
    # Beside the likeliest: 1, 0.368, 0.135, 0.082, 0.018, 0.007.
    expect(draw(LOGITS, SamplingParams(min_p=min_p)), most_likely(num_kept).softmax(-1))


def test_min_p_counts_after_temperature_and_among_what_top_p_left():
    params = SamplingParams(temperature=2.0, top_p=0.8, min_p=0.5)  # 1, 0.607, 0.368 beside the likeliest
    expect(draw(LOGITS, params), (most_likely(2) / 2).softmax(-1))


def test_presence_and_frequency_penalties_count_the_text_without_the_prompt():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    row = Row(params, torch.Generator().manual_seed(0), [0, 0, 0, 2], [4, 4, 4, 2])
    tokens = torch.tensor(sample(LOGITS.expand(DRAWS, -1), [row] * DRAWS))
    expected = LOGITS - torch.tensor([0, 0, 0.75, 0, 1.25, 0])
    expect(torch.bincount(tokens, minlength=6), expected.softmax(-1))


def test_logit_bias_and_what_is_allowed_change_what_is_drawn():
    row = Row(SamplingParams(logit_bias=((1, 3.0), (4, -2.0))), torch.Generator().manual_seed(0))
    tokens = torch.tensor(sample(LOGITS.expand(DRAWS, -1), [row] * DRAWS))
    expect(torch.bincount(tokens, minlength=6), (LOGITS + torch.tensor([0, 3.0, 0, 0, -2.0, 0])).softmax(-1))
    allowed = torch.tensor([False, True, True, False, False, False])
    for params in (SamplingParams(top_p=0.99), SamplingParams(), SamplingParams(logit_bias=((4, 100.0),))):
        row = Row(params, torch.Generator().manual_seed(0), allowed_V=allowed)
        tokens = torch.tensor(sample(LOGITS.expand(DRAWS, -1), [row] * DRAWS))
        expect(torch.bincount(tokens, minlength=6), LOGITS.masked_fill(~allowed, -torch.inf).softmax(-1))
    greedy = Row(SamplingParams(temperature=0.0), torch.Generator(), allowed_V=allowed)
    assert sample(LOGITS[None], [greedy]) == [2]


def test_the_first_tokens_dont_end_a_text():
    params = SamplingParams(temperature=0.0, stop_ids=frozenset({4}), min_new_tokens=2)
    drawn = [sample(LOGITS[None], [Row(params, torch.Generator(), [1], [1] * told)])[0] for told in range(4)]
    assert drawn == [0, 0, 4, 4]


def test_rows_of_one_batch_each_keep_to_their_own_parameters():
    torch.manual_seed(1)
    logits, before = torch.randn(6, 3000) * 2, None
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(),
        SamplingParams(temperature=1.5, min_p=1e-5),  # more than are sorted at first
        SamplingParams(repetition_penalty=1.3, top_p=0.9999, frequency_penalty=0.5),
    ]
    before = logits.clone()

    def row(i):
        return Row(settings[i], make_generator(3, [i]), [1, 2, 3], [4, 4])

    together = sample(logits, [row(i) for i in range(6)])
    assert together == [sample(logits[i : i + 1], [row(i)])[0] for i in range(6)]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("params", [SamplingParams(top_p=0.995), SamplingParams(min_p=1e-6), SamplingParams(top_k=400)])
def test_limits_hold_where_more_tokens_than_are_sorted_at_first_may_be_drawn(params):
    torch.manual_seed(2)
    logits = torch.randn(2000)
    sorted_logits, order = logits.sort(descending=True)
    probabilities = sorted_logits.softmax(-1)
    if params.top_k:
        probabilities[params.top_k :] = 0
    probabilities[probabilities.cumsum(-1) - probabilities >= params.top_p] = 0
    probabilities[probabilities < params.min_p * probabilities[0]] = 0
    assert (probabilities > 0).sum() > 256
    sums = (probabilities.double() / probabilities.double().sum()).cumsum(-1)
    for seed in range(40):
        uniform = torch.rand((), generator=make_generator(seed, [1]), dtype=torch.float64)
        expected = order[torch.searchsorted(sums, uniform, right=True)]
        assert sample(logits[None], [Row(params, make_generator(seed, [1]))]) == [int(expected)]


def test_log_probabilities_are_the_logits_own():
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    expected = logits.log_softmax(-1)
    found = logprobs_of(logits, [7, 8, 9], [0, 2, 5])
    for i, each in enumerate(found):
        assert each.token == pytest.approx(float(expected[i, 7 + i]), abs=1e-5)
        values, ids = expected[i].topk((0, 2, 5)[i])
        assert [token for token, _ in each.top] == ids.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert logprobs_of(logits, [1, 2, 3], [0, 0, 0])[0] == Logprobs(pytest.approx(float(expected[0, 1]), abs=1e-5))
