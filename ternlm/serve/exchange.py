"""One request's answers on their way to the client: as a stream of events, or whole once they have ended.

Where the client goes away, what runs for it is let go of.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ternlm.serve.backend import Answers
from ternlm.serve.choices import Choice, usage_of
from ternlm.serve.errors import ApiError, as_api_error, dumps, json_response
from ternlm.serve.metrics import TextWatch


class Exchange:
    """The answers to one request."""

    def __init__(
        self,
        answers: Answers,
        choices: Sequence[Choice],
        watches: Sequence[TextWatch],
        prompt_lengths: Sequence[int],
        frame: Mapping[str, str],
    ) -> None:
        """frame: what stands around choices: model, what a whole and a chunk are called, how ids begin."""
        self._answers, self._choices, self._watches = answers, choices, watches
        self._prompt_lengths = prompt_lengths
        created = int(time.time())
        self._frame = {"id": f"{frame['prefix']}-{secrets.token_hex(12)}", "created": created, "model": frame["model"]}
        self._whole_kind, self._chunk_kind = frame["whole"], frame["chunk"]

    async def respond(self, request: Request, stream: bool, include_usage: bool) -> Response:
        """Return the answer: at once where it streams, else when it is whole."""
        if stream:
            more = {"media_type": "text/event-stream", "headers": {"Cache-Control": "no-cache"}}
            return Stream(self._events(include_usage), self._answers.close, **more)
        try:
            return json_response(await unless_gone(request, self._collect()))
        finally:
            self._answers.close()

    async def _collect(self) -> dict[str, Any]:
        async for number, delta in self._answers:
            self._watches[number].take(delta)
            self._choices[number].take(delta)
        choices = [choice.whole() for choice in self._choices]
        return {**self._frame, "object": self._whole_kind, "choices": choices, "usage": self._usage()}

    async def _events(self, include_usage: bool) -> AsyncIterator[bytes]:
        frame = {**self._frame, "object": self._chunk_kind}
        idle = {"usage": None} if include_usage else {}
        try:
            async for number, delta in self._answers:
                self._watches[number].take(delta)
                told = self._choices[number].take(delta)
                if told is not None:
                    yield event_of({**frame, "choices": [told], **idle})
            if include_usage:
                yield event_of({**frame, "choices": [], "usage": self._usage()})
        except Exception as error:
            yield event_of(as_api_error(error).body())
        yield b"data: [DONE]\n\n"

    def _usage(self) -> Mapping[str, Any]:
        per_prompt = len(self._watches) // len(self._prompt_lengths)
        cached = sum(watch.num_cached for watch in self._watches[::per_prompt])
        return usage_of(sum(self._prompt_lengths), cached, sum(watch.num_tokens for watch in self._watches))


class Stream(StreamingResponse):
    """An answer that is sent as it comes."""

    def __init__(self, pieces: AsyncIterator[bytes], ended: Callable[[], None], **more: Any) -> None:
        """ended: called once, when it ends in whatever way. more: as a response takes it."""
        super().__init__(pieces, **more)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def unless_gone(request: Request, work: Any) -> Any:
    """Wait for a result; raises ApiError where the client goes away first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client went away")
    finally:
        for each in (task, gone):
            each.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_of(content: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + dumps(content) + b"\n\n"
