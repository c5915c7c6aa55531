"""TernLM's own engine as a backend: its thread's events, brought into the event loop and made answers."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from threading import Lock

from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.answer import Answer, Delta
from ternlm.infer.constraint import GrammarConstraint, Grammars
from ternlm.infer.engine import Engine
from ternlm.infer.request import Event, Request
from ternlm.infer.sampling import make_generator
from ternlm.infer.worker import EngineThread, Home, Load
from ternlm.serve.backend import Job

logger = logging.getLogger(__name__)


class TorchBackend:
    """As `Backend`. All but the engine's steps happens in one event loop."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        max_waiting: int = 256,
        home: Home | None = None,
    ) -> None:
        """Start the engine's thread; max_waiting and home as for `EngineThread`."""
        self._engine, self._tokenizer = engine, tokenizer
        self._queues: dict[Request, asyncio.Queue[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._grammars: Grammars | None = None
        self._lock = Lock()
        self._thread = EngineThread(engine, self._deliver, max_waiting=max_waiting, home=home)

    async def start(self, jobs: Sequence[Job]) -> "EngineAnswers":
        """As `Backend`."""
        self._loop = asyncio.get_running_loop()
        grammars = [job.grammar for job in jobs]
        constraints: list[GrammarConstraint | None] = [None] * len(jobs)
        if any(grammars):
            constraints = await asyncio.to_thread(self._compile, jobs)
        answers = EngineAnswers(self._thread, self._queues)
        try:
            for job, constraint in zip(jobs, constraints, strict=True):
                request = self._thread.submit(
                    job.prompt,
                    job.params,
                    generator=make_generator(job.params.seed, job.prompt, job.time),
                    constraint=constraint,
                    wants_prompt=job.wants_prompt,
                )
                least = job.params.min_new_tokens
                answers.add(request, Answer(self._tokenizer, job.prompt, job.stops, job.shown, least))
        except BaseException:
            answers.close()
            raise
        return answers

    def load(self) -> Load:
        """As `Backend`."""
        return self._thread.load()

    @property
    def is_alive(self) -> bool:
        """As `Backend`."""
        return self._thread.is_alive

    async def close(self, seconds: float) -> None:
        """As `Backend`."""
        await asyncio.to_thread(self._thread.close, seconds)

    def _compile(self, jobs: Sequence[Job]) -> list[GrammarConstraint | None]:
        with self._lock:
            if self._grammars is None:
                engine = self._engine
                self._grammars = Grammars(self._tokenizer, engine.config.vocab_size, engine.device)
        grammars = self._grammars
        return [grammars.compile(job.grammar, job.params.stop_ids) if job.grammar else None for job in jobs]

    def _deliver(self, events: Sequence[Event]) -> None:
        """Hand events over from the engine's thread."""
        assert self._loop is not None  # no event comes before a request
        try:
            self._loop.call_soon_threadsafe(self._hand_out, events)
        except RuntimeError:  # the loop has ended, and those who waited with it
            logger.info("%d events came when nobody listened any more", len(events))

    def _hand_out(self, events: Sequence[Event]) -> None:
        for event in events:
            queue = self._queues.get(event.request)
            if queue is not None:  # else it was let go of
                queue.put_nowait(event)


class EngineAnswers:
    """As `Answers`."""

    def __init__(self, thread: EngineThread, queues: dict[Request, asyncio.Queue[Event]]) -> None:
        self._thread, self._queues = thread, queues
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._open: dict[Request, tuple[int, Answer]] = {}
        self._count = 0

    def add(self, request: Request, answer: Answer) -> None:
        """Wait for the events of a request, too."""
        self._queues[request] = self._queue
        self._open[request] = self._count, answer
        self._count += 1

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """As `Answers`."""
        while self._open:
            event = await self._queue.get()
            if event.request not in self._open:
                continue  # a token that was on its way when a stop string had been found
            number, answer = self._open[event.request]
            delta = answer.take(event)
            if delta is None:
                continue
            if delta.finish is not None:
                self._forget(event.request)
                if event.finish is None:
                    self._thread.end(event.request, "stop")
            yield number, delta

    def close(self) -> None:
        """As `Answers`."""
        for request in list(self._open):
            self._forget(request)
            self._thread.end(request)

    def _forget(self, request: Request) -> None:
        del self._open[request]
        self._queues.pop(request, None)
