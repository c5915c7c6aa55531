"""An engine in a thread of its own, for callers in others: requests in, events out as steps bring them.

Only that thread touches the engine. What others say waits in a queue until the step that runs has ended. It had better
be the thread that the model was loaded in: each thread that has computed on a CPU keeps helpers of its own, and where
there are more of these than cores, every parallel loop waits by sleeping: 1.5 times a step (docs/log.md).
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ternlm.config.section import UserError
from ternlm.infer.engine import Engine
from ternlm.infer.params import SamplingParams
from ternlm.infer.request import Constraint, Event, Finish, Request

logger = logging.getLogger(__name__)

R = TypeVar("R")
Deliver = Callable[[Sequence[Event]], None]
"""Takes what a step brought, called in the engine's thread; must return soon and not raise."""


class Overloaded(UserError):
    """More requests wait than may."""


class Closed(UserError):
    """The engine takes no more requests, since it is being closed."""


@dataclass(frozen=True)
class Load:
    """How busy an engine is, and what it has done since it began."""

    waiting: int
    running: int
    used_blocks: int
    num_blocks: int
    prompt_tokens: int
    cached_tokens: int
    """Of these, found stored."""
    output_tokens: int
    preemptions: int
    steps: int


class Home:
    """A thread that does one thing after another; it ends with the process at the latest."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._ended = False
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def start(self, do: Callable[[], R]) -> "Future[R]":
        """Let it do something once it has done all else; raises RuntimeError after `end`."""
        if self._ended:
            raise RuntimeError("this thread has ended; make another one")
        future: Future[R] = Future()
        self._told.put((do, future))
        return future

    def do(self, do: Callable[[], R]) -> R:
        """Let it do something; return or raise what that does, once all else has been done."""
        return self.start(do).result()

    def end(self) -> None:
        """Let it end once it has done what it was told."""
        self._ended = True
        self._told.put(None)

    def _run(self) -> None:
        while (told := self._told.get()) is not None:
            _do(*told)
            del told  # what was done may hold a model


def _do(do: Callable[[], Any], future: "Future[Any]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(do())
    except BaseException as error:  # whoever waits is to have it, whatever it is
        future.set_exception(error)


class EngineThread:
    """Runs an engine's steps while there are requests."""

    def __init__(
        self,
        engine: Engine,
        deliver: Deliver,
        *,
        max_waiting: int = 256,
        home: Home | None = None,
    ) -> None:
        """Begin.

        max_waiting: requests beyond those that run; more are refused. home: the thread that the model was loaded in,
        and autocast entered; it does nothing else until `close`, then it is free again. If none is given, a new one.
        """
        self.engine, self.max_waiting, self._deliver = engine, max_waiting, deliver
        self._said: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Request] = set()
        self._closing = False
        self._counts = dict.fromkeys(("prompt", "cached", "output", "steps"), 0)
        own = Home() if home is None else home
        self._ran = own.start(self._run)
        if home is None:
            own.end()

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        generator: torch.Generator | None = None,
        constraint: Constraint | None = None,
        wants_prompt: bool = False,
    ) -> Request:
        """Take a request in; its events are delivered. Raises ConfigError for what can never be served, Overloaded
        where too many wait, Closed after `close`."""
        request = self.engine.make(
            prompt, params, generator=generator, constraint=constraint, wants_prompt=wants_prompt
        )
        with self._lock:
            if self._closing or not self.is_alive:
                raise Closed("the server is shutting down; send the request to another, or later")
            room = self.engine.scheduler.max_running + self.max_waiting
            if len(self._open) >= room:
                raise Overloaded(f"{len(self._open)} requests are being served or wait, of at most {room}; try later")
            self._open.add(request)
            # Within the lock: the thread ends only after everything that was said before `close`.
            self._said.put(lambda: self.engine.scheduler.add(request))
        return request

    def end(self, request: Request, finish: Finish = "cancelled") -> None:
        """Let go of a request; its text may get a token more while this is on its way. No event tells of it."""

        def let_go() -> None:
            self.engine.finish(request, finish)
            self._forget([request])

        self._said.put(let_go)

    def load(self) -> Load:
        """Return how busy the engine is now."""
        scheduler, pool = self.engine.scheduler, self.engine.pool
        with self._lock:
            running = len(scheduler.running)
            waiting = max(len(self._open) - running, 0)
        counts = self._counts
        return Load(
            waiting=waiting,
            running=running,
            used_blocks=pool.num_used,
            num_blocks=pool.num_blocks,
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            output_tokens=counts["output"],
            preemptions=scheduler.num_preemptions,
            steps=counts["steps"],
        )

    @property
    def is_closing(self) -> bool:
        """Whether nothing more is taken."""
        return self._closing

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return not self._ran.done()

    def close(self, seconds: float = 0.0) -> None:
        """Take nothing more; let what runs go on for so long at most, cancel the rest, and end the thread."""
        with self._lock:
            self._closing = True
        self._said.put(None)
        wait([self._ran], seconds)
        if self._ran.done():
            return

        def cancel_all() -> None:
            with self._lock:
                requests = list(self._open)
            for request in requests:
                self.engine.cancel(request)
            self._tell([Event(request, None, None, "cancelled") for request in requests])

        self._said.put(cancel_all)
        wait([self._ran])

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:
            logger.exception("the engine's thread has ended; no request is served any more")
            raise

    def _serve(self) -> None:
        while True:
            self._listen()
            if self._closing and not self.engine.is_busy and self._said.empty():
                return
            if self.engine.is_busy:
                self._step()

    def _listen(self) -> None:
        """Do what was said; wait for something to be said while there is nothing to do."""
        while True:
            idle = not self.engine.is_busy and not self._closing
            try:
                said = self._said.get(block=idle)
            except queue.Empty:
                return
            if said is not None:
                said()

    def _step(self) -> None:
        before = list(self.engine.scheduler.running), list(self.engine.scheduler.waiting)
        try:
            events = self.engine.step()
        except Exception:
            logger.exception("a step failed; its requests are lost, others are served")
            self._tell([Event(request, None, None, "error") for request in (*before[0], *before[1])])
            return
        self._counts["steps"] += 1
        self._tell(events)

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            self._counts["output"] += event.token is not None
            is_first = len(event.request.output) == (event.token is not None)
            if is_first and event.finish not in ("cancelled", "error"):
                self._counts["prompt"] += len(event.request.prompt)
                self._counts["cached"] += event.request.num_cached
        self._forget([event.request for event in events if event.finish is not None])
        if events:
            self._deliver(events)

    def _forget(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self._open.difference_update(requests)
