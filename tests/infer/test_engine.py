"""Requests that come and go between forward passes: nobody's text depends on the others."""

import random

import pytest
import torch
from in_memory import greedy
from tiny import CONFIGS, HEADS_OF_8, LONG, full_logits, greedy_alone, random_model, random_prompts, run

from ternlm.config.model import RopeScaling
from ternlm.config.section import ConfigError
from ternlm.infer.engine import Engine, generate
from ternlm.infer.pages import BLOCK
from ternlm.infer.params import SamplingParams

DYNAMIC = LONG.model_copy(
    update={"rope_scaling": RopeScaling(kind="dynamic", factor=2.0), "max_position_embeddings": 64}
)


@pytest.mark.parametrize(
    "config",
    [LONG, DYNAMIC, LONG.model_copy(update=HEADS_OF_8), DYNAMIC.model_copy(update=HEADS_OF_8)],
    ids=["plain", "dynamic", "plain, heads of 8", "dynamic, heads of 8"],
)
@pytest.mark.parametrize("memory", [4096, 160])
def test_texts_that_come_and_go_are_those_of_full_forward_passes(config, memory):
    model, rng = random_model(config), random.Random(5)
    prompts = random_prompts([rng.randrange(1, 90) for _ in range(24)])
    params = [greedy(rng.randrange(1, 40), [7, 8]) for _ in prompts]
    engine = Engine(model, memory, max_running=6, max_step_tokens=24)
    coming, requests = list(zip(prompts, params, strict=True)), []
    while coming or engine.is_busy:
        arrivals = min(rng.choice([0, 0, 1, 3]), len(coming))
        requests += [engine.add(*coming.pop(0)) for _ in range(arrivals)]
        engine.step()
    for prompt, own, request in zip(prompts, params, requests, strict=True):
        rope_length = max(64, len(prompt) + own.max_new_tokens)
        assert request.output == greedy_alone(model, prompt, own, rope_length)
        assert request.finish == ("length" if len(request.output) == own.max_new_tokens else "stop")
    assert (engine.scheduler.num_preemptions > 0) == (memory == 160)
    assert engine.pool.num_used == 0


def test_a_text_that_gave_its_memory_back_goes_on_with_its_own_random_numbers():
    model, prompts = random_model(LONG), random_prompts([40, 40, 40, 40])
    params = SamplingParams(max_new_tokens=60, temperature=1.3, top_p=0.9, seed=4, frequency_penalty=0.3)
    small, large = Engine(model, 224), Engine(model, 4096)
    texts = []
    for engine in (small, large):
        requests = [engine.add(prompt, params) for prompt in prompts]
        run(engine)
        texts.append([request.output for request in requests])
    assert texts[0] == texts[1]
    assert small.scheduler.num_preemptions > 0
    assert large.scheduler.num_preemptions == 0


def test_a_beginning_is_computed_once():
    model, (shared, *ends) = random_model(LONG), random_prompts([50, 5, 9, 20])
    engine = Engine(model, 4096)
    first = engine.add([*shared, *ends[0]], greedy(20))
    run(engine)
    others = [engine.add([*shared, *end], greedy(20)) for end in ends[1:]]
    events = engine.step()
    assert [request.num_cached for request in others] == [3 * BLOCK] * 2
    assert len(events) == 2
    run(engine)
    for request in (first, *others):
        assert request.output == greedy_alone(model, request.prompt, request.params)
    again = engine.add([*first.prompt, *first.output, 5], greedy(4))  # a conversation that goes on
    run(engine)
    assert again.num_cached == (len(first.prompt) + len(first.output) - 1) // BLOCK * BLOCK
    assert again.output == greedy_alone(model, again.prompt, again.params)


def test_equal_prompts_that_come_together_share_their_blocks():
    model, (prompt,) = random_model(LONG), random_prompts([70])
    engine = Engine(model, 4096, max_step_tokens=128)
    requests = [engine.add(prompt, greedy(3)) for _ in range(4)]
    engine.step()
    assert engine.pool.num_used == 4 + 4
    run(engine)
    expected = greedy_alone(model, prompt, greedy(3))
    assert [request.output for request in requests] == [expected] * 4


def test_new_weights_make_what_is_stored_worthless():
    model, (prompt,) = random_model(LONG), random_prompts([50])
    engine = Engine(model, 4096)
    engine.add(prompt, greedy(3))
    engine.step()
    with pytest.raises(RuntimeError, match="1 requests are running"):
        engine.forget()
    run(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.forget()
    request = engine.add(prompt, greedy(10))
    run(engine)
    assert request.num_cached == 0
    assert request.output == greedy_alone(model, prompt, greedy(10))


def test_a_request_can_be_let_go_wherever_it_is():
    model, prompts = random_model(LONG), random_prompts([30, 30, 30])
    engine = Engine(model, 4096, max_running=2)
    first, second, third = (engine.add(prompt, greedy(30)) for prompt in prompts)
    for _ in range(5):
        engine.step()
    engine.cancel(first)
    engine.cancel(third)
    engine.cancel(third)
    run(engine)
    engine.cancel(second)
    assert (first.finish, second.finish, third.finish) == ("cancelled", "length", "cancelled")
    assert (len(first.output), len(third.output)) == (5, 0)
    assert second.output == greedy_alone(model, prompts[1], greedy(30))
    assert engine.pool.num_used == 0


def test_a_long_prompt_comes_in_pieces_between_which_others_go_on():
    model, (short, long) = random_model(LONG), random_prompts([4, 100])
    engine = Engine(model, 4096, max_step_tokens=11)
    first = engine.add(short, greedy(30))
    engine.step()
    second = engine.add(long, greedy(5))
    while not second.output:
        before = len(first.output)
        engine.step()
        assert len(first.output) == before + 1
    assert len(first.output) == 11
    run(engine)
    assert second.output == greedy_alone(model, long, greedy(5))


def test_log_probabilities_of_prompt_and_text():
    model, (prompt,) = random_model(LONG), random_prompts([90])
    engine = Engine(model, 4096, max_step_tokens=40)
    run_before = engine.add(prompt, greedy(2))
    run(engine)
    params = SamplingParams(max_new_tokens=6, temperature=2.0, repetition_penalty=1.5, logprobs=3)
    request = engine.add(prompt, params, wants_prompt=True)
    events = run(engine)
    assert run_before.prompt_logprobs == []
    expected = full_logits(model, request.tokens(), 0).log_softmax(-1)
    told = [*request.prompt_logprobs, *(event.logprobs for event in events)]
    assert len(told) == 90 + 6 - 1
    for place, each in enumerate(told):
        token = request.tokens()[place + 1]
        assert each.token == pytest.approx(float(expected[place, token]), abs=1e-4)
        values, ids = expected[place].topk(3)
        assert [token for token, _ in each.top] == ids.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_prompts_log_probabilities_are_told_once_though_it_is_computed_twice():
    model, prompts = random_model(LONG), random_prompts([60, 60, 60])
    small, large = Engine(model, 224, max_step_tokens=40), Engine(model, 4096)
    told = []
    for engine in (small, large):
        requests = [engine.add(prompt, greedy(40, logprobs=0), wants_prompt=True) for prompt in prompts]
        run(engine)
        told.append([[each.token for each in request.prompt_logprobs] for request in requests])
    assert small.scheduler.num_preemptions > 0
    for ours, expected in zip(*told, strict=True):
        assert ours == pytest.approx(expected, abs=1e-4)


def test_a_constraint_says_what_may_come():
    class Counting:
        def __init__(self):
            self.next = 10

        def allowed(self):
            return torch.arange(97) == self.next

        def accept(self, token):
            assert token == self.next
            self.next += 1

    engine = Engine(random_model(LONG), 4096)
    request = engine.add([1], SamplingParams(max_new_tokens=5), constraint=Counting())
    run(engine)
    assert request.output == [10, 11, 12, 13, 14]


def test_a_step_that_fails_lets_go_of_all_and_leaves_the_engine_usable():
    model, (prompt,) = random_model(LONG), random_prompts([20])
    engine = Engine(model, 4096)
    request = engine.add(prompt, greedy(10))
    engine.step()

    class Broken:
        def allowed(self):
            raise RuntimeError("broken")

    engine.add(prompt, greedy(10), constraint=Broken())
    with pytest.raises(RuntimeError, match="broken"):
        engine.step()
    assert (request.finish, engine.is_busy, engine.pool.num_used) == ("error", False, 0)
    again = engine.add(prompt, greedy(10))
    run(engine)
    assert again.num_cached == 0
    assert again.output == greedy_alone(model, prompt, greedy(10))


def test_what_is_taken_out_of_the_memory_for_many_texts_stays_small(monkeypatch):
    model, prompts = random_model(LONG.model_copy(update=HEADS_OF_8)), random_prompts([70, 12, 65, 80, 66])
    monkeypatch.setattr("ternlm.infer.paged._MOST_TAKEN", 2**14)
    engine = Engine(model, 4096)
    requests = [engine.add(prompt, greedy(10)) for prompt in prompts]
    run(engine)
    assert [request.output for request in requests] == [greedy_alone(model, prompt, greedy(10)) for prompt in prompts]
    assert engine._cache._taken.nbytes < 2**16


@pytest.mark.parametrize(
    ("prompt", "params", "told"),
    [
        ([], greedy(3), "the prompt is empty"),
        ([97], greedy(3), "token id 97"),
        ([1] * 250, greedy(7), "exceed max_position_embeddings = 256"),
        ([1] * 100, greedy(40), "may need memory for 140 tokens, and there is for 128"),
        ([1], SamplingParams(logit_bias=((97, 1.0),)), "logit_bias has the token id 97"),
    ],
)
def test_what_could_never_be_served_is_refused_at_once(prompt, params, told):
    engine = Engine(random_model(LONG), 128)
    with pytest.raises(ConfigError, match=told):
        engine.add(prompt, params)
    assert not engine.is_busy


def test_a_generator_given_makes_the_text():
    model, (prompt,) = random_model(LONG), random_prompts([20])
    params = SamplingParams(max_new_tokens=20)
    engine = Engine(model, 4096)
    requests = [engine.add(prompt, params, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    run(engine)
    assert requests[0].output == requests[1].output != requests[2].output


def test_more_prompts_than_run_at_once():
    model, prompts = random_model(LONG), random_prompts([10, 20, 30, 5, 40, 3])
    assert generate(model, prompts, greedy(8), max_running=2) == [
        greedy_alone(model, prompt, greedy(8)) for prompt in prompts
    ]


def test_an_engine_is_kept_for_more_than_one_set_of_prompts_and_for_other_requests():
    model, prompts = random_model(LONG), random_prompts([30, 30, 9])
    engine = Engine(model, 2048)
    other = engine.add(prompts[2], greedy(30))
    told = []
    texts = engine.generate(prompts[:2], greedy(10), on_token=lambda row, token: told.append((row, token)))
    assert texts == [greedy_alone(model, prompt, greedy(10)) for prompt in prompts[:2]]
    assert [[token for row, token in told if row == own] for own in (0, 1)] == texts
    assert other.finish is None
    assert len(other.output) >= 10
    run(engine)
    assert other.output == greedy_alone(model, prompts[2], greedy(30))
    assert engine.generate(prompts[:1], greedy(10)) == texts[:1]
    with torch.no_grad():  # as after a step of training
        for parameter in model.parameters():
            parameter.mul_(1.2)
    engine.forget()
    assert engine.generate(prompts[:1], greedy(10)) == [greedy_alone(model, prompts[0], greedy(10))]
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        engine.generate([[1], []], greedy(3))
    assert not engine.is_busy


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_prompts_that_are_left_in_the_middle_are_let_go_of(error):
    model, (other, *prompts) = random_model(CONFIGS["biases"]), random_prompts([4, 5, 3, 6])
    engine = Engine(model, 512, max_running=2)
    kept = engine.add(other, greedy(12))

    def leave(row, token):
        raise error("enough")

    with pytest.raises(error, match="enough"):
        engine.generate(prompts, greedy(12), on_token=leave)
    run(engine)
    assert kept.output == greedy_alone(model, other, greedy(12))
    assert engine.pool.num_free == engine.pool.num_blocks
    assert engine.generate(prompts, greedy(12)) == generate(model, prompts, greedy(12))
