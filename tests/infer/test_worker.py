"""An engine in its thread: what others submit is done as if they had asked the engine alone, and can be let go of."""

import threading
import time

import pytest
from in_memory import greedy
from tiny import CONFIGS, random_model, random_prompts

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError
from ternlm.infer.engine import Engine, generate
from ternlm.infer.worker import Closed, EngineThread, Overloaded

CONFIG = ModelConfig(
    **(CONFIGS["biases"].model_dump(exclude_none=True, by_alias=True) | {"max_position_embeddings": 256})
)


class Heard:
    """Notes what is delivered."""

    def __init__(self):
        self.events = []

    def __call__(self, events):
        self.events += events

    def of(self, request):
        return [event for event in self.events if event.request is request]

    def wait(self, request):
        end = time.monotonic() + 30
        while not any(event.finish for event in self.of(request)):
            assert time.monotonic() < end
            time.sleep(0.002)
        return self.of(request)


@pytest.fixture
def worker():
    heard = Heard()
    running = EngineThread(Engine(random_model(CONFIG), 4096, max_running=4), heard, max_waiting=60)
    yield running, heard
    running.close()


def test_what_many_threads_submit_is_what_each_would_get_alone(worker):
    thread, heard = worker
    prompts, requests = random_prompts(range(1, 41)), {}

    def submit(number):
        requests[number] = thread.submit(prompts[number], greedy(9))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(40)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    expected = generate(thread.engine.model, prompts, greedy(9))
    for number, request in requests.items():
        assert [event.token for event in heard.wait(request)] == expected[number]
    load = thread.load()
    assert (load.running, load.waiting, load.used_blocks, load.output_tokens) == (0, 0, 0, 40 * 9)
    assert load.prompt_tokens == sum(map(len, prompts))


def test_a_text_that_ends_at_once_has_its_prompt_counted(worker):
    thread, heard = worker
    (prompt,) = random_prompts([30])
    ((first,),) = generate(thread.engine.model, [prompt], greedy(1))
    (event,) = heard.wait(thread.submit(prompt, greedy(5, [first])))
    assert (event.token, event.finish) == (None, "stop")
    heard.wait(thread.submit(prompt, greedy(1)))
    load = thread.load()
    assert (load.prompt_tokens, load.cached_tokens, load.output_tokens) == (60, 16, 1)


def test_what_is_let_go_of_makes_room(worker):
    thread, heard = worker
    requests = [thread.submit([number], greedy(200)) for number in range(64)]
    with pytest.raises(Overloaded, match="64 requests are being served or wait, of at most 64"):
        thread.submit([1], greedy(3))
    for request in requests:
        thread.end(request)
        thread.end(request)
    while thread.load().waiting:  # until the step that runs has ended
        time.sleep(0.002)
    heard.wait(thread.submit([1], greedy(3)))
    load = thread.load()
    assert (load.running, load.waiting, load.used_blocks) == (0, 0, 0)
    assert {request.finish for request in requests} == {"cancelled"}


def test_what_can_never_be_served_is_refused_at_once(worker):
    thread, _ = worker
    with pytest.raises(ConfigError, match="exceed max_position_embeddings"):
        thread.submit([1], greedy(300))
    assert thread.load().waiting == 0


def test_what_runs_may_end_before_the_thread_does(worker):
    thread, heard = worker
    requests = [thread.submit([number], greedy(50)) for number in range(8)]
    thread.close(60)
    assert [heard.of(request)[-1].finish for request in requests] == ["length"] * 8
    assert not thread.is_alive
    with pytest.raises(Closed):
        thread.submit([1], greedy(3))


def test_what_takes_too_long_is_told_that_it_is_cancelled(worker):
    thread, heard = worker
    requests = [thread.submit([number], greedy(250)) for number in range(30)]
    closing = threading.Thread(target=thread.close, args=(60,))
    closing.start()
    thread.close(0)  # as a second signal does
    closing.join()
    ends = [heard.of(request)[-1] for request in requests]
    assert "cancelled" in {event.finish for event in ends}
    assert all(event.finish for event in ends)
    assert all(sum(event.finish is not None for event in heard.of(request)) == 1 for request in requests)


def test_a_step_that_fails_is_told_to_all_and_others_are_served(worker, monkeypatch, caplog):
    thread, heard = worker
    forward = thread.engine._forward
    monkeypatch.setattr(thread.engine, "_forward", lambda shares: 1 / 0)
    requests = [thread.submit([number], greedy(5)) for number in range(8)]
    for request in requests:
        assert heard.wait(request)[-1].finish == "error"
    monkeypatch.setattr(thread.engine, "_forward", forward)
    assert len(heard.wait(thread.submit([1], greedy(5)))) == 5
    assert "a step failed" in caplog.text
