"""What stands before every route: the key, the host's name, the size of bodies, the end of the server; and the counts.

Plain ASGI: bodies are read here, up to their limit, so that nothing behind it sees a larger one.
"""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ternlm.serve.address import is_local
from ternlm.serve.errors import ApiError, as_api_error, shutting_down

logger = logging.getLogger(__name__)

_NOTHING_YET = 499
"""The status of what nobody waited for."""
_PASSED_OVER = 64 * 2**20
"""Bytes of a body too large that are read and dropped, so that the client comes to read why."""


@dataclass
class Gate:
    """Whether a server takes requests; the one thing that changes while it runs."""

    is_open: bool = True


@dataclass(frozen=True)
class Rules:
    """What a server demands of requests."""

    api_key: str | None = None
    max_body_bytes: int = 4 * 2**20
    local_names_only: bool = False
    """Whether requests must name this machine as their host: keeps away pages of other sites that a browser here
    shows, whose names were made to lead here."""
    log_requests: bool = False


class Guard:
    """Middleware that lets through what keeps to the rules."""

    def __init__(
        self,
        app: ASGIApp,
        rules: Rules,
        gate: Gate,
        answered: Callable[[str, int], None],
        routes: Collection[str],
    ) -> None:
        """answered: told of each answer's route, one of `routes` or "other", and status."""
        self._app, self._rules, self._gate, self._answered = app, rules, gate, answered
        self._routes = frozenset(routes)
        self._key = None if rules.api_key is None else _digest(rules.api_key.encode(errors="surrogateescape"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), _NOTHING_YET

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body = self._refusal(scope) or await self._read(receive)
            if isinstance(body, ApiError):
                await body.response()(scope, receive, note)
            elif body is not None:
                await self._app(scope, _replayed(body, receive), note)
        except Exception as error:
            if status != _NOTHING_YET:  # the answer has begun: all that is left is to break it off
                raise
            await as_api_error(error).response()(scope, receive, note)
        finally:
            path = scope["path"] if scope["path"] in self._routes else "other"
            self._answered(path, status)
            if self._rules.log_requests:
                seconds = time.perf_counter() - began
                logger.info("%s %s %d in %.3f s", scope["method"], path, status, seconds)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._rules.local_names_only and not _names_local(headers.get(b"host", b"")):
            return ApiError(403, "without an API key requests must be for localhost by name", code="wrong_host")
        if scope["path"] != "/health" and self._key is not None:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._key):
                message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
                return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if not self._gate.is_open and scope["path"] != "/metrics":
            return shutting_down()
        return None

    async def _read(self, receive: Receive) -> bytes | ApiError | None:
        """Read a body; None where the client has gone."""
        most, size = self._rules.max_body_bytes, 0
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= most:
                parts.append(part)
            else:
                parts.clear()
            if not message.get("more_body") or size > most + _PASSED_OVER:
                break
        if size > most:
            text = f"the body is larger than the {most:,} bytes that are taken; send less"
            return ApiError(413, text, code="body_too_large", headers={"Connection": "close"})
        return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read, then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _names_local(host: bytes) -> bool:
    name, mark, rest = host.decode("latin-1").lower().partition("]")
    if mark:
        return is_local(name + mark) and rest[:1] in ("", ":")
    return is_local(name.partition(":")[0].removesuffix("."))
