"""An engine in a thread: callers in others get their own text, are refused, let go of and told of failures."""

import threading
import time

import pytest
import torch
from in_memory import greedy
from tiny import CONFIGS, random_model, random_prompts

from ternlm.config.section import ConfigError
from ternlm.infer.engine import Engine, generate
from ternlm.infer.worker import Closed, EngineThread, Home, Overloaded

LONG = CONFIGS["biases"].model_copy(update={"max_position_embeddings": 512})


class Inbox:
    """Collects what is delivered, by request."""

    def __init__(self):
        self.events = {}
        self.changed = threading.Condition()

    def __call__(self, events):
        with self.changed:
            for event in events:
                self.events.setdefault(event.request, []).append(event)
            self.changed.notify_all()

    def wait(self, request, seconds=20):
        """Return a request's tokens and how it ended."""
        with self.changed:
            told = self.changed.wait_for(lambda: any(e.finish for e in self.events.get(request, ())), seconds)
        assert told
        events = self.events[request]
        return [event.token for event in events if event.token is not None], events[-1].finish


@pytest.fixture
def inbox():
    return Inbox()


@pytest.fixture
def thread(inbox):
    made = []

    def start(model=None, tokens=4096, max_running=8, **options):
        engine = Engine(model or random_model(LONG), tokens, max_running=max_running)
        made.append(EngineThread(engine, inbox, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()
        assert not each.is_alive


def test_callers_in_many_threads_get_their_own_texts(thread, inbox):
    model, prompts = random_model(LONG), random_prompts(range(1, 41))
    worker, found = thread(model), {}

    def ask(row):
        found[row] = inbox.wait(worker.submit(prompts[row], greedy(20)))

    callers = [threading.Thread(target=ask, args=[row]) for row in range(40)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [found[row][0] for row in range(40)] == generate(model, prompts, greedy(20))
    load = worker.load()
    assert (load.waiting, load.running, load.used_blocks, load.output_tokens) == (0, 0, 0, 800)
    assert load.prompt_tokens == sum(range(1, 41))


def test_one_that_nobody_waits_for_any_more_gives_its_blocks_back(thread, inbox):
    worker = thread()
    request = worker.submit([1] * 40, greedy(400))
    while not inbox.events.get(request):
        time.sleep(0.001)
    worker.end(request)
    other = worker.submit([2], greedy(5))
    inbox.wait(other)
    assert request.finish == "cancelled"
    assert len(request.output) < 400
    assert worker.load().used_blocks == 0


def test_too_many_are_refused_and_room_comes_back(thread, inbox):
    worker = thread(max_running=2, max_waiting=3)
    requests = [worker.submit([row], greedy(100)) for row in range(5)]
    with pytest.raises(Overloaded, match="of at most 5"):
        worker.submit([9], greedy(5))
    for request in requests:
        assert inbox.wait(request)[1] == "length"
    assert inbox.wait(worker.submit([9], greedy(5)))[1] == "length"


def test_what_can_never_be_served_is_refused_where_it_is_asked_for(thread):
    worker = thread()
    with pytest.raises(ConfigError, match="token id 97"):
        worker.submit([97], greedy(5))
    assert worker.load().waiting == 0


def test_a_step_that_fails_is_told_to_its_requests_and_others_are_served(thread, inbox):
    class Broken:
        def __init__(self):
            self.tokens = []

        def allowed(self):
            if self.tokens:
                raise RuntimeError("broken")
            all_said.wait(20)

        def accept(self, token):
            self.tokens.append(token)

    model, all_said = random_model(LONG), threading.Event()
    worker = thread(model)
    requests = [worker.submit([1, 5], greedy(300), constraint=Broken())]
    requests += [worker.submit([row, 5], greedy(300)) for row in range(2)]
    all_said.set()
    assert [inbox.wait(request)[1] for request in requests] == ["error"] * 3
    assert inbox.wait(worker.submit([1, 5], greedy(5))) == (generate(model, [[1, 5]], greedy(5))[0], "length")


def test_a_text_of_which_nothing_finite_comes_is_told_alone_and_logged(thread, inbox, caplog):
    model, (prompt,) = random_model(LONG), random_prompts([9])
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("nan")
    running = thread(model)
    good, bad = (running.submit(tokens, greedy(20)) for tokens in ([token or 1 for token in prompt], [5, 0, 6]))
    assert inbox.wait(bad) == ([], "error")
    assert inbox.wait(good) == (good.output, "length")
    assert "1 texts were ended: the model's logits are not finite" in caplog.text
    assert (running.load().running, running.load().used_blocks) == (0, 0)


def test_closing_lets_what_runs_end_and_takes_nothing_more(thread, inbox):
    worker = thread()
    request = worker.submit([1], greedy(60))
    closer = threading.Thread(target=worker.close, args=[60])
    closer.start()
    while not worker.is_closing:
        time.sleep(0.001)
    with pytest.raises(Closed):
        worker.submit([2], greedy(5))
    closer.join()
    assert inbox.wait(request)[1] == "length"


def test_closing_at_once_cancels_and_tells(thread, inbox):
    worker = thread(max_running=1)
    first, second = worker.submit([1], greedy(500)), worker.submit([2], greedy(500))
    while not inbox.events.get(first):
        time.sleep(0.001)
    worker.close()
    assert inbox.wait(first)[1] == inbox.wait(second)[1] == "cancelled"


def test_an_idle_thread_takes_no_processor_time(thread, inbox):
    worker = thread()
    inbox.wait(worker.submit([1], greedy(5)))
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_each_is_told_once_that_it_ended_though_the_thread_is_closed_twice(thread, inbox):
    worker = thread()
    requests = [worker.submit([row], greedy(400)) for row in range(30)]
    closer = threading.Thread(target=worker.close, args=[60])
    closer.start()
    worker.close()  # as a second signal does
    closer.join()
    ends = [[event.finish for event in inbox.events[request] if event.finish] for request in requests]
    assert all(len(each) == 1 for each in ends)
    assert ["cancelled"] in ends


def test_a_text_that_ends_at_once_has_its_prompt_counted(thread, inbox):
    model, (prompt,) = random_model(LONG), random_prompts([30])
    worker = thread(model)
    ((first,),) = generate(model, [prompt], greedy(1))
    assert inbox.wait(worker.submit(prompt, greedy(5, [first]))) == ([], "stop")
    inbox.wait(worker.submit(prompt, greedy(1)))
    load = worker.load()
    assert (load.prompt_tokens, load.cached_tokens, load.output_tokens) == (60, 16, 1)


def test_what_a_thread_was_told_is_done_there_in_order_and_its_errors_come_back():
    home, done = Home(), []
    first = home.start(lambda: (time.sleep(0.05), done.append(threading.current_thread().name)))
    waiting = home.start(lambda: done.append("never"))
    assert waiting.cancel()
    assert home.do(lambda: len(done)) == 1
    assert first.done()
    assert done == ["engine"]
    with pytest.raises(ZeroDivisionError):
        home.do(lambda: 1 // 0)
    home.end()
    with pytest.raises(RuntimeError, match="has ended"):
        home.do(lambda: None)


def test_a_thread_serves_what_was_made_in_it_and_is_free_again(inbox):
    home = Home()

    def make():
        home.autocast = torch.autocast("cpu", torch.bfloat16)
        home.autocast.__enter__()
        return Engine(random_model(LONG), 4096)

    thread = EngineThread(home.do(make), inbox, home=home)
    request = thread.submit([1, 2, 3], greedy(5))
    assert inbox.wait(request)[1] == "length"
    assert thread.engine._cache._dtype == torch.bfloat16
    thread.close()
    assert not thread.is_alive
    home.do(lambda: home.autocast.__exit__(None, None, None))
    home.end()


def test_a_thread_that_has_died_says_why_and_takes_nothing(caplog):
    def refuse(events):
        raise ValueError("nobody listens")

    thread = EngineThread(Engine(random_model(LONG), 4096), refuse)
    thread.submit([1], greedy(3))
    end = time.monotonic() + 20
    while thread.is_alive:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert "nobody listens" in caplog.text
    with pytest.raises(Closed):
        thread.submit([1], greedy(3))
    thread.close()
