import pytest
import torch

from ternlm.config.section import ConfigError, UserError
from ternlm.infer.sampling import SamplingParams, make_generators, sample

LOGITS = torch.tensor([2.0, -1.0, 1.0, 0.5, 3.0, -2.0])
DRAWS = 4000


def draw(logits, params, times=DRAWS, seed=0):
    """Counts of each token in so many independent draws, all in one batch."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    tokens = sample(logits.expand(times, -1), params, [generator] * times)
    return torch.bincount(tokens, minlength=len(logits))


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
    tokens = sample(LOGITS[None], SamplingParams(temperature=0.0, top_k=2, top_p=0.5), [generator])
    assert tokens.tolist() == [4]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("params", [SamplingParams(temperature=1e-30), SamplingParams(temperature=1e-30, top_p=0.5)])
def test_a_tiny_temperature_is_greedy(params):
    assert draw(LOGITS * 1e4, params, times=10)[4] == 10


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    seen = torch.tensor([[False, False, False, False, True, True]])
    # Token 4 falls from 3 to 1.5, below token 0 with 2; token 5 from -2 to -4.
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert sample(LOGITS[None], params, [], seen).tolist() == [0]
    params = SamplingParams(repetition_penalty=2.0)
    generator = torch.Generator().manual_seed(0)
    tokens = sample(LOGITS.expand(DRAWS, -1), params, [generator] * DRAWS, seen.expand(DRAWS, -1))
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
        assert sample(logits, SamplingParams(), [torch.Generator()]).item() == pytest.approx(token, abs=1)


def test_a_token_without_probability_is_never_drawn_at_either_end(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for uniform, token in [(0.0, 1), (1.0, 2)]:
        monkeypatch.setattr(torch, "rand", lambda *_, value=uniform, **__: torch.tensor(value, dtype=torch.float64))
        assert sample(logits, SamplingParams(), [torch.Generator()]).tolist() == [token]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.0)])
def test_logits_that_are_not_finite_are_refused(params, broken):
    logits = torch.stack([LOGITS, LOGITS])
    logits[1, 3] = broken
    with pytest.raises(UserError, match="not finite"):
        sample(logits, params, make_generators(0, [[1], [2]]))


def test_a_row_is_drawn_alike_alone_and_in_any_batch():
    torch.manual_seed(0)
    logits = torch.randn(5, 1000)
    prompts = [[1], [1, 2], [3], [4], [5]]
    for params in (SamplingParams(), SamplingParams(top_k=50, top_p=0.9, temperature=0.7)):
        together = sample(logits, params, make_generators(7, prompts))
        alone = [sample(logits[i : i + 1], params, make_generators(7, [prompts[i]])).item() for i in range(5)]
        order = [3, 1, 4]
        others = sample(logits[order], params, make_generators(7, [prompts[i] for i in order]))
        assert together.tolist() == alone
        assert others.tolist() == together[order].tolist()


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
    ],
)
def test_a_value_outside_its_rule_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name} = {value} must be"):
        SamplingParams(**{name: value})
