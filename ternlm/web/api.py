"""A client of servers with OpenAI's interface: which models there are, and answers as they come.

Each request has a connection of its own, so that closing an answer's stream, from whatever thread, reaches the server.
"""

import contextlib
import ipaddress
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import httpx

Message = Mapping[str, Any]
Fault = Literal["unreachable", "silent", "broken", "refused"]


class ServerError(Exception):
    """Why there is no answer.

    `fault`: nobody was there; nothing came in time; the connection or what it brought was broken; or the server
    refused, by its own words. `words` are the server's or the system's, the text of the error is a whole sentence.
    """

    def __init__(self, fault: Fault, text: str, words: str = "", status: int | None = None) -> None:
        super().__init__(text)
        self.fault, self.words, self.status = fault, words or text, status


@dataclass(frozen=True)
class CallPiece:
    """What is new of a call of a tool."""

    index: int
    id: str = ""
    """In a call's first piece, as the name is."""
    name: str = ""
    arguments: str = ""
    """Text that goes on the JSON of the arguments."""


@dataclass(frozen=True)
class Piece:
    """What is new of an answer."""

    text: str = ""
    thought: str = ""
    """Reasoning, where the server tells it apart."""
    calls: tuple[CallPiece, ...] = ()
    finish: str | None = None
    """Why the answer ends: stop, length, tool_calls, or what else the server says."""
    usage: Mapping[str, Any] | None = None
    """How many tokens there were; near the end."""


class Server:
    """A server with OpenAI's interface."""

    def __init__(
        self, url: str, api_key: str | None = None, *, timeout: float = 600.0, connect_timeout: float = 10.0
    ) -> None:
        """url: with or without `/v1`. timeout: seconds that may pass before an answer's next piece."""
        self.url = _root_of(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = httpx.Timeout(timeout, connect=connect_timeout)

    def models(self) -> list[str]:
        """List the names of the models that are served. Raises ServerError."""
        with self._told(), self._client() as client:
            response = client.get(f"{self.url}/models")
            _check(response)
            content = response.json()
        entries = content.get("data") if isinstance(content, dict) else None
        names = [entry["id"] for entry in entries or () if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        if not names:
            raise ServerError("broken", f"{self.url}/models names no models; is it a server with OpenAI's interface?")
        return names

    def chat(
        self,
        messages: Sequence[Message],
        model: str,
        settings: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> "Answer":
        """Ask for the answer to a conversation; nothing is sent before its first piece is.

        settings: further fields of the request, such as temperature; those that are None are left out.
        """
        given = {name: value for name, value in (settings or {}).items() if value is not None}
        body = {**given, "model": model, "messages": list(messages), "stream": True}
        body["stream_options"] = {"include_usage": True}
        if tools:
            body["tools"] = list(tools)
        return Answer(self, body)

    def _client(self) -> httpx.Client:
        own = _is_this_machine(httpx.URL(self.url).host)  # which no proxy of the environment leads to
        mounts = dict.fromkeys(("all://", "http://", "https://")) if own else None
        return httpx.Client(headers=self._headers, timeout=self._timeout, mounts=mounts)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what goes wrong on the way into a ServerError."""
        try:
            yield
        except httpx.ConnectTimeout as error:
            raise ServerError("unreachable", f"{self.url} doesn't answer; is the server running?") from error
        except httpx.ConnectError as error:
            text = f"there is no server at {self.url} ({error}); is it running?"
            raise ServerError("unreachable", text, str(error)) from error
        except httpx.TimeoutException as error:
            seconds = self._timeout.read
            raise ServerError("silent", f"{self.url} said nothing for {seconds:g} s", f"{seconds:g} s") from error
        except (httpx.TransportError, httpx.StreamError, httpx.DecodingError) as error:
            words = str(error) or type(error).__name__
            raise ServerError("broken", f"the connection to {self.url} broke ({words})", words) from error
        except ValueError as error:  # JSON that isn't
            raise ServerError("broken", f"{self.url} answered with something else ({error})", str(error)) from error


class Answer:
    """An answer as it comes: an iterator of pieces."""

    def __init__(self, server: Server, body: Mapping[str, Any]) -> None:
        self._server, self._body = server, body
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._closed = False
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the answer, from any thread: the connection is cut, so that the server stops; the iterator ends."""
        with self._lock:
            self._closed = True
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)  # closing alone would not wake who reads

    def _run(self) -> Iterator[Piece]:
        try:
            with self._server._told():
                yield from self._receive()
        except ServerError:
            if not self._closed:
                raise

    def _receive(self) -> Iterator[Piece]:
        if self._closed:
            return
        url, hooks = f"{self._server.url}/chat/completions", {"trace": self._note}
        with self._server._client() as client:
            request = client.build_request("POST", url, json=self._body, extensions=hooks)
            response = client.send(request, stream=True)
            with contextlib.closing(response):
                if response.status_code != 200:
                    response.read()
                _check(response)
                if response.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
                    response.read()  # by a server that doesn't stream
                    yield from _pieces_of(response.json())
                    return
                for data in _events(response.iter_lines()):
                    yield from _pieces_of(json.loads(data))

    def _note(self, event: str, info: Mapping[str, Any]) -> None:
        """Keep the sockets that connections are made by."""
        if not event.startswith("connection.") or not event.endswith(".complete"):
            return
        its = getattr(info.get("return_value"), "get_extra_info", lambda _: None)("socket")
        with self._lock:
            if its is not None:
                self._sockets.append(its)
            if self._closed:
                raise httpx.ReadError("closed")


def _events(lines: Iterator[str]) -> Iterator[str]:
    """Yield the data of server-sent events, up to the one that says they end."""
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            if data == ["[DONE]"]:
                return
            yield "\n".join(data)
            data = []
    if data and data != ["[DONE]"]:
        yield "\n".join(data)


def _pieces_of(chunk: Any) -> Iterator[Piece]:
    """Yield what a chunk, or a whole answer, tells."""
    if not isinstance(chunk, dict):
        raise ValueError(f"not an object: {str(chunk)[:100]}")
    if "error" in chunk:
        words = _words_of(chunk)
        raise ServerError("refused", f"the server failed: {words}", words)
    usage = chunk.get("usage")
    choices = chunk.get("choices") or []
    for choice in choices:
        told = choice.get("delta") or choice.get("message") or {}
        calls = tuple(_call(number, call) for number, call in enumerate(told.get("tool_calls") or ()))
        thought = told.get("reasoning_content") or told.get("reasoning") or ""
        yield Piece(told.get("content") or "", thought, calls, choice.get("finish_reason"))
    if usage:
        yield Piece(usage=usage)


def _call(number: int, call: Mapping[str, Any]) -> CallPiece:
    function = call.get("function") or {}
    index = call.get("index")
    name, arguments = function.get("name") or "", function.get("arguments") or ""
    return CallPiece(number if index is None else index, call.get("id") or "", name, arguments)


def _check(response: httpx.Response) -> None:
    """Raise ServerError unless a request was answered."""
    if response.status_code == 200:
        return
    try:
        words = _words_of(response.json())
    except ValueError:
        words = " ".join(response.text.split())[:500] or response.reason_phrase
    raise ServerError("refused", f"the server answers {response.status_code}: {words}", words, response.status_code)


def _words_of(content: Any) -> str:
    """Find what a server says went wrong."""
    told = content
    for name in ("error", "message", "detail"):
        if isinstance(told, dict) and told.get(name):
            told = told[name]
    return told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)[:500]


def _root_of(url: str) -> str:
    """Return where the interface's routes begin."""
    text = url.strip()
    try:
        parsed = httpx.URL(text if "://" in text else f"http://{text}")
    except httpx.InvalidURL as error:
        raise ServerError("unreachable", f"{url!r} is no address ({error}); it looks like http://host:8000") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerError("unreachable", f"{url!r} is no address of a server; it looks like http://host:8000")
    return str(parsed).rstrip("/") + ("" if parsed.path.strip("/") else "/v1")


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
