"""Errors as OpenAI's clients read them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ternlm.config.section import UserError
from ternlm.infer.worker import Closed, Overloaded

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return what is sent."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, usual)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the whole answer to a request."""
        return json_response(self.body(), self.status, self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """Say what a client is told of an error; what isn't its fault is logged, and told without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="overloaded", headers={"Retry-After": "1"})
    if isinstance(error, Closed):
        return shutting_down()
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, RecursionError):
        return ApiError(400, "the request is nested too deeply; make it flatter")
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors(), error.body)
    if isinstance(error, HTTPException):
        told = {404: "there is nothing at this path; see /v1/models", 405: "this path doesn't take this method"}
        return ApiError(error.status_code, told.get(error.status_code, str(error.detail)), headers=error.headers)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def shutting_down() -> ApiError:
    """Return what new requests are told while the server ends."""
    message = "the server is shutting down; send the request to another, or later"
    return ApiError(503, message, code="shutting_down", headers={"Retry-After": "5", "Connection": "close"})


def handle_errors(app: FastAPI) -> None:
    """Make an application answer in OpenAI's shape what is the client's fault; `Guard` answers the rest."""

    async def handle(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for kind in (ApiError, UserError, RecursionError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer of JSON; half characters that somebody sent become question marks."""
    return Response(dumps(content), status, headers=dict(headers or {}), media_type="application/json")


def dumps(content: Any) -> bytes:
    """Return JSON in UTF-8."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def _of_validation(errors: Sequence[Any], body: Any) -> ApiError:
    """Tell the first thing that is wrong with a body, by the name of its field."""
    places = [_place(error, body) for error in errors]
    # A field that may be of several types has an error by each; the one that came furthest is of what was meant.
    alike = [i for i, place in enumerate(places) if place[:1] == places[0][:1]]
    furthest = max(alike, key=lambda i: len(places[i]))
    first, place = errors[furthest], places[furthest]
    param = ".".join(place) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "is not known here; leave it out"
    elif first["type"] == "json_invalid":
        param, message = None, f"the body isn't JSON ({first.get('ctx', {}).get('error', 'unreadable')})"
    elif not place and first["type"] != "value_error":
        message = f"the body must be a JSON object, sent as application/json ({message})"
    more = len({place[:1] for place in places}) - 1
    others = f" (and {more} more)" if more else ""
    return ApiError(400, (f"{param}: {message}" if param else message) + others, param=param, code=first["type"])


def _place(error: Any, body: Any) -> tuple[str, ...]:
    """Return where in a body an error is, without the types that were tried."""
    found: list[str] = []
    for part in error["loc"][1:]:  # behind "body"
        if (isinstance(body, Mapping) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        found.append(str(part))
    return tuple(found)
