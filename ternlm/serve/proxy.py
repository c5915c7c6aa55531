"""Requests handed on to another engine's server, and its answers handed back as they come.

What stands before every route here, the key, sizes, the number of requests, stands before these too.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from fastapi import FastAPI, Request, Response
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse

from ternlm.serve.errors import ApiError, as_api_error, handle_errors, json_response
from ternlm.serve.exchange import unless_gone
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
_OWN = {"host", "content-length", "connection", "authorization", "transfer-encoding", "accept-encoding"}
"""Headers of a request that are between two neighbours; the key is this server's."""
_ANSWERED = {"content-type", "retry-after"}
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError)
_TELL_SECONDS = 10.0
"""That an engine may take to tell what it serves."""


class Proxy:
    """As `Backend.close` and `load` go: an engine in another process."""

    def __init__(self, process: Process, max_open: int) -> None:
        """max_open: requests at the same time; more are refused."""
        self._process, self._max_open = process, max_open
        self._session: aiohttp.ClientSession | None = None
        self._open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._streams: set[aiohttp.ClientResponse] = set()

    async def hand_on(self, request: Request) -> Response:
        """Hand a request on; the client's going away ends it there too."""
        self._check_room()
        body = await request.body()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _OWN}
        self._begun()
        try:
            sent = self._ask(request.method, request.url.path, data=body, headers=headers)
            answer = await unless_gone(request, sent)
        except BaseException as error:
            self._ended()
            if isinstance(error, _FAILURES):
                raise _dead(error) from error
            raise
        self._streams.add(answer)
        kept = {name: value for name, value in answer.headers.items() if name.lower() in _ANSWERED}
        return StreamingResponse(
            self._pieces(answer), answer.status, headers=kept, background=BackgroundTask(self._close, answer)
        )

    async def model_named(self, name: str) -> dict[str, Any]:
        """Return what the engine's list of models tells of one: not every engine can be asked for one alone."""
        self._check_room()
        self._begun()
        try:
            async with asyncio.timeout(_TELL_SECONDS), await self._ask("GET", "/v1/models") as answer:
                answer.raise_for_status()
                models = {str(model["id"]): dict(model) for model in (await answer.json())["data"]}
        except (*_FAILURES, ValueError, KeyError, TypeError) as error:
            raise _dead(error) from error
        finally:
            self._ended()
        if name not in models:
            message = f"there is no model {name[:100]!r} here, only {', '.join(models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return models[name]

    def _check_room(self) -> None:
        if self._open >= self._max_open:
            message = f"{self._open} requests are being served or wait, of at most {self._max_open}; try later"
            raise ApiError(429, message, code="overloaded", headers={"Retry-After": "1"})

    def _begun(self) -> None:
        self._open += 1
        self._none_open.clear()

    async def _ask(self, method: str, path: str, **more: Any) -> aiohttp.ClientResponse:
        if self._session is None:  # made in the event loop that it belongs to
            # A connection for each request: llama.cpp's server closes used ones while they are being used again.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, auto_decompress=False, skip_auto_headers=["Accept-Encoding"]
            )
        return await self._session.request(method, self._process.url + path, allow_redirects=False, **more)

    async def _pieces(self, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for piece in answer.content.iter_any():
                yield piece
        except _FAILURES as error:  # ended, or its process has: what was told stays told
            logger.warning("an answer broke off: %s", error)
        finally:
            await self._close(answer)

    async def _close(self, answer: aiohttp.ClientResponse) -> None:
        if answer in self._streams:
            self._streams.discard(answer)
            answer.close()
            self._ended()

    def _ended(self) -> None:
        self._open -= 1
        if not self._open:
            self._none_open.set()

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
        await asyncio.to_thread(self._process.end)
        if self._session is not None:
            await self._session.close()


def _dead(error: Exception) -> ApiError:
    """Log why an engine can't be asked; return what its clients are told."""
    logger.warning("the engine can't be reached: %s", error)
    return ApiError(502, "the engine doesn't answer; its server's log says why", code="engine_dead")


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
