"""A text of which nothing finite comes ends alone, and nothing stays of it."""

import pytest
import torch
from in_memory import greedy
from tiny import HEADS_OF_8, LONG, greedy_alone, random_model, random_prompts, run

from ternlm.config.section import UserError
from ternlm.infer.engine import Engine


def broken_at(token, config=LONG):
    """A model of which nothing finite comes once a text has this token."""
    model = random_model(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    return model


HEADS = pytest.mark.parametrize("more", [{}, HEADS_OF_8], ids=["heads of 16", "heads of 8"])


@HEADS
def test_what_is_not_finite_ends_its_own_text_alone(more):
    config = LONG.model_copy(update=more)
    whole, model, bad = random_model(config), broken_at(0, config), 0
    # Of the same beginning, so that they share blocks; the broken one comes in pieces, while the others go on.
    beginning, *rests = ([token for token in prompt if token != bad] for prompt in random_prompts([40, 30, 20, 100]))
    prompts = [beginning + rest for rest in rests[:2]]
    expected = [greedy_alone(whole, prompt, greedy(20)) for prompt in prompts]
    assert not any(bad in output for output in expected)
    engine = Engine(model, 4096, max_step_tokens=16)
    lost = engine.add([*beginning, bad, *rests[2]], greedy(20))
    requests = [engine.add(prompt, greedy(20)) for prompt in prompts]
    events = run(engine)
    assert [request.output for request in requests] == expected
    assert [(event.request, event.token) for event in events if event.finish == "error"] == [(lost, None)]
    assert (lost.finish, lost.output, engine.pool.num_used) == ("error", [], 0)
    # Nobody finds what it left, and it doesn't show where it was.
    for prompt in [*prompts, [*rests[2]]]:
        again = engine.add(prompt, greedy(20))
        run(engine)
        assert again.output == greedy_alone(whole, prompt, greedy(20))
    assert all(layer.isfinite().all() for layer in engine._cache.memory.layers)


@HEADS
def test_what_is_not_finite_and_not_known_yet_does_not_show_in_others(more):
    config = LONG.model_copy(update=more)
    whole, model = random_model(config), broken_at(0, config)
    *prompts, rest = ([token or 1 for token in prompt] for prompt in random_prompts([12, 60, 100]))
    expected = [greedy_alone(whole, prompt, greedy(20)) for prompt in prompts]
    assert not any(0 in output for output in expected)
    engine = Engine(model, 4096, max_step_tokens=16)
    before = engine.add([1, 2], greedy(100))  # keeps the first block for the broken one
    requests = [engine.add(prompt, greedy(20)) for prompt in prompts]
    while not requests[1].output:
        engine.step()
    engine.cancel(before)
    lost = engine.add([0, *rest], greedy(20))
    run(engine)
    assert lost.finish == "error"
    assert [request.output for request in requests] == expected


@HEADS
@pytest.mark.parametrize(
    ("texts", "cancelled"),
    [
        ([[1] * 5 + [0] + [1] * 10, [1] * 5 + [0] + [1] * 30], None),  # all blocks of one are the other's, too
        ([[1] * 5 + [0] + [1] * 30] * 3, None),  # they end in the same step, each of the same beginning
        ([[0] + [1] * 99], 0),
        ([[0] + [1] * 99, [0] + [1] * 98 + [2]], 1),
    ],
    ids=["all shared", "together", "let go of", "one let go of"],
)
def test_nothing_stays_of_what_is_not_finite(texts, cancelled, more):
    config = LONG.model_copy(update=more)
    whole, model = random_model(config), broken_at(0, config)
    prompts = [[token or 1 for token in prompt] for prompt in random_prompts([8, 5])]
    engine = Engine(model, 2048, max_step_tokens=64)
    beside = engine.add(prompts[0], greedy(9))
    lost = [engine.add(text, greedy(4)) for text in texts]
    engine.step()
    if cancelled is not None:
        engine.cancel(lost[cancelled])
    run(engine)
    assert {request.finish for request in lost} <= {"error", "cancelled"}
    assert beside.output == greedy_alone(whole, prompts[0], greedy(9))
    assert all(layer.isfinite().all() for layer in engine._cache.memory.layers)
    again = engine.add(prompts[1], greedy(20))
    run(engine)
    assert again.output == greedy_alone(whole, prompts[1], greedy(20))


def test_a_step_that_fails_lets_go_of_what_has_just_ended_too():
    class Broken:
        def allowed(self):
            return None

        def accept(self, token):
            raise RuntimeError("broken")

    engine = Engine(broken_at(0), 512)
    ended = [engine.add([1, 2], greedy(1)), engine.add([0], greedy(1)), engine.add([3], greedy(1), constraint=Broken())]
    with pytest.raises(RuntimeError, match="broken"):
        engine.step()
    assert [request.finish for request in ended] == ["length", "error", "error"]
    assert not engine.is_busy
    assert engine.pool.num_used == 0


def test_prompts_of_which_nothing_finite_comes_are_told():
    model, (good,) = broken_at(0), random_prompts([20])
    engine = Engine(model, 512)
    with pytest.raises(UserError, match="logits are not finite"):
        engine.generate([[token or 1 for token in good], [1, 0]], greedy(4))
    assert not engine.is_busy
    assert engine.pool.num_used == 0
