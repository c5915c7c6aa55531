"""Requests handed on to another engine's server, and its answers handed back as they come.

What stands before every route here, the key, sizes, the number of requests, stands before these too.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any

import aiohttp
from fastapi import FastAPI, Request, Response

from ternlm.serve.errors import ApiError, as_api_error, handle_errors, json_response, shutting_down
from ternlm.serve.exchange import Stream, event_of, unless_gone
from ternlm.serve.external import Process
from ternlm.serve.guard import Gate, Guard, Rules

logger = logging.getLogger(__name__)

ROUTES = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/models": "GET",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/metrics": "GET",
}
_HANDED_ON = {"accept", "baggage", "content-type", "traceparent", "tracestate", "user-agent"}
"""Headers that an engine is told, beside those of `X-`: the key and the connection are this server's."""
_ANSWERED = {"content-type", "retry-after"}
_UNTOLD = ["Accept", "Accept-Encoding", "Content-Type", "User-Agent"]
"""Headers that aiohttp would make up."""
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError)
_TELL_SECONDS = 10.0
"""That an engine may take to tell what it serves."""


class Proxy:
    """As `Backend.close` and `load` go: an engine in another process."""

    def __init__(self, process: Process, max_open: int) -> None:
        """max_open: requests at the same time; more are refused."""
        self._process, self._max_open = process, max_open
        self._session: aiohttp.ClientSession | None = None
        self._open, self._has_ended, self._is_end_told = 0, False, False
        self._none_open = asyncio.Event()
        self._none_open.set()

    async def hand_on(self, request: Request) -> Response:
        """Hand a request on; the client's going away ends it there too."""
        body, headers = await request.body(), _told_on(request.headers.items())
        self._enter()
        try:
            sent = self._ask(request.method, request.scope["path"], data=body or None, headers=headers)
            answer = await unless_gone(request, sent)
        except BaseException as error:
            self._leave()
            if isinstance(error, _FAILURES):
                raise self._failure(error) from error
            raise

        def end() -> None:
            answer.close()
            self._leave()

        kept = {name: value for name, value in answer.headers.items() if name.lower() in _ANSWERED and _is_plain(value)}
        return Stream(self._pieces(answer), end, status_code=answer.status, headers=kept)

    async def model_named(self, name: str) -> dict[str, Any]:
        """Return what the engine's list of models tells of one: not every engine can be asked for one alone."""
        self._enter()
        try:
            async with asyncio.timeout(_TELL_SECONDS), await self._ask("GET", "/v1/models") as answer:
                answer.raise_for_status()
                models = {str(model["id"]): dict(model) for model in (await answer.json())["data"]}
        except (*_FAILURES, ValueError, KeyError, TypeError) as error:
            raise self._failure(error) from error
        finally:
            self._leave()
        if name not in models:
            message = f"there is no model {name[:100]!r} here, only {', '.join(models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return models[name]

    async def _ask(self, method: str, path: str, **more: Any) -> aiohttp.ClientResponse:
        if self._session is None:  # made in the event loop that it belongs to
            # A connection for each request: llama.cpp's server closes used ones while they are being used again.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, auto_decompress=False, skip_auto_headers=_UNTOLD
            )
        return await self._session.request(method, self._process.url + path, allow_redirects=False, **more)

    async def _pieces(self, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        last = b"\n\n"
        try:
            async for piece in answer.content.iter_any():
                yield piece
                last = (last + piece)[-2:]
        except _FAILURES as error:  # what was told stays told, but nobody is to take it for the whole
            told = self._failure(error)
            if answer.content_type != "text/event-stream" or last != b"\n\n":
                raise  # which breaks the connection off
            yield event_of(told.body())

    def _enter(self) -> None:
        """Count a request in. Raises ApiError where there is no place for it."""
        if self._has_ended:
            raise shutting_down()
        if self._open >= self._max_open:
            message = f"{self._open} requests are being served or wait, of at most {self._max_open}; try later"
            raise ApiError(429, message, code="overloaded", headers={"Retry-After": "1"})
        self._open += 1
        self._none_open.clear()

    def _leave(self) -> None:
        self._open -= 1
        if not self._open:
            self._none_open.set()

    def _failure(self, error: Exception) -> ApiError:
        """Log why an engine didn't answer; return what its client is told."""
        if self._has_ended:
            return shutting_down()
        # Not %r, which may have the headers of the request.
        logger.warning("the engine didn't answer: %s: %s", type(error).__name__, error)
        self.tell_end()
        if isinstance(error, TimeoutError) and self.is_alive:
            message = "the engine is too busy to answer; try later"
            return ApiError(503, message, code="overloaded", headers={"Retry-After": "5"})
        return ApiError(502, "the engine doesn't answer; its server's log says why", code="engine_dead")

    def tell_end(self) -> None:
        """Log what the engine said last, once, if it has ended by itself."""
        if not (self.is_alive or self._has_ended or self._is_end_told):
            self._is_end_told = True
            logger.error("the engine has ended; it said:\n%s", self._process.said())

    @property
    def is_alive(self) -> bool:
        """As `Backend`."""
        return self._process.is_alive

    @property
    def num_open(self) -> int:
        """Requests that are being served."""
        return self._open

    async def close(self, seconds: float) -> None:
        """Let what runs go on for so long at most, then end the engine."""
        try:
            await asyncio.wait_for(self._none_open.wait(), seconds)
        except TimeoutError:
            logger.info("ending %d answers that take longer", self._open)
        self._has_ended = True
        await asyncio.to_thread(self._process.end)
        if self._session is not None:
            await self._session.close()


def _told_on(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return those of a request's headers that the engine is told."""
    told = ((name.lower(), value) for name, value in headers)
    return [(name, value) for name, value in told if (name in _HANDED_ON or name[:2] == "x-") and _is_plain(value)]


def _is_plain(value: str) -> bool:
    """Whether a header can be written again as it was read."""
    return value.isascii() and value.isprintable()


def make_proxy_app(proxy: Proxy, rules: Rules, gate: Gate) -> FastAPI:
    """Return the application that hands requests on. gate: closed, it refuses what is new."""
    app = FastAPI(title="TernLM", docs_url=None, redoc_url=None, openapi_url=None)
    handle_errors(app)

    async def hand_on(request: Request) -> Response:
        try:
            return await proxy.hand_on(request)
        except Exception as error:
            return as_api_error(error).response()

    async def health() -> Response:
        proxy.tell_end()
        if not proxy.is_alive:
            raise ApiError(503, "the engine has ended; start the server anew", code="engine_dead")
        return json_response({"status": "ok", "running": proxy.num_open})

    async def show_model(name: str) -> Response:
        return json_response(await proxy.model_named(name))

    app.add_api_route("/v1/models/{name:path}", show_model, methods=["GET"])
    for path, method in ROUTES.items():
        app.add_api_route(path, hand_on, methods=[method])
    app.add_api_route("/health", health, methods=["GET"])
    app.add_middleware(Guard, rules=rules, gate=gate, answered=lambda path, status: None, routes=[*ROUTES, "/health"])
    return app
