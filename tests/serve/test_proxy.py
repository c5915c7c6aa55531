"""The front before another engine: what it hands on, and what becomes of answers that aren't as they should be."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from served import wait_until

from ternlm.serve import proxy as proxy_module
from ternlm.serve.address import bind, url_of
from ternlm.serve.guard import Gate, Rules
from ternlm.serve.proxy import Proxy, make_proxy_app

COMPLETE = "/v1/completions"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


class Engine:
    """An engine's server as far as its connections go: to each request it says the bytes it was given."""

    def __init__(self, answer: bytes | None) -> None:
        """answer: None says nothing until the engine ends."""
        self.asked: list[bytes] = []
        self.is_alive, self._answer, self._ended = True, answer, threading.Event()
        self.heard = threading.Event()
        """That the answer has arrived: the connection ends then."""
        self._bound = bind("127.0.0.1", 0)
        self._bound.listen()
        self.url = url_of(self._bound)
        threading.Thread(target=self._serve, daemon=True).start()

    def said(self) -> str:
        return "no memory left"

    def end(self) -> None:
        self.is_alive = False
        self._ended.set()
        self.heard.set()
        self._bound.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._bound.accept()
            except OSError:
                return
            with connection:
                text = b""
                while b"\r\n\r\n" not in text:
                    text += connection.recv(65536)
                self.asked.append(text)
                if self._answer is None:
                    self._ended.wait()
                else:
                    connection.sendall(self._answer)
                    self.heard.wait(20)


@contextmanager
def front(answer: bytes | None, max_open: int = 4) -> Iterator[SimpleNamespace]:
    """Serve what an engine answers."""
    engine = Engine(answer)
    proxy = Proxy(engine, max_open)
    bound = bind("127.0.0.1", 0)
    app = make_proxy_app(proxy, Rules(), Gate())
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        with httpx.Client(base_url=url_of(bound), timeout=20) as client:
            yield SimpleNamespace(engine=engine, proxy=proxy, http=client, address=bound.getsockname(), app=app)
        wait_until(lambda: proxy.num_open == 0)  # whatever came of a request, its place is free again
    finally:
        engine.end()
        server.should_exit = True
        thread.join()


def stream(served: SimpleNamespace) -> str:
    """Read an answer as it comes; the engine's connection ends once there is something of it."""
    text = ""
    with served.http.stream("POST", COMPLETE, json={}) as answer:
        assert answer.status_code == 200
        for piece in answer.iter_text():
            text += piece
            served.engine.heard.set()
    return text


def told(asked: bytes) -> dict[bytes, bytes]:
    """The headers of a request as the engine read them."""
    lines = asked.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    return {name.lower(): value for name, value in (line.split(b": ", 1) for line in lines)}


def test_what_is_between_client_and_front_stays_there() -> None:
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Type: application/json\r\n"
        b"Expect: 100-Continue\r\nTE: trailers\r\nKeep-Alive: timeout=5\r\nProxy-Authorization: a\r\nCookie: c=d\r\n"
        b"Authorization: Bearer secret\r\nX-Broken: a\x01b\r\nX-Far: caf\xe9\r\nX-Request-Id: 7\r\n"
        b"Traceparent: 00-1\r\nTracestate: a=1\r\nTracestate: b=2\r\nUser-Agent: me\r\nConnection: close\r\n\r\n{}"
    )
    with front(WHOLE) as served:
        with socket.create_connection(served.address, timeout=20) as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b"HTTP/1.1 200 OK" in answer
        assert answer.endswith(b"{}\r\n0\r\n\r\n")
        (asked,) = served.engine.asked
    assert asked.count(b"tracestate: a=1\r\ntracestate: b=2\r\n") == 1
    headers = told(asked)
    assert headers.pop(b"host").startswith(b"127.0.0.1:")
    assert headers.pop(b"connection") == b"close"
    assert headers == {
        b"content-length": b"2",
        b"content-type": b"application/json",
        b"x-request-id": b"7",
        b"traceparent": b"00-1",
        b"tracestate": b"b=2",
        b"user-agent": b"me",
    }


def test_nothing_is_made_up() -> None:
    with front(WHOLE) as served, socket.create_connection(served.address, timeout=20) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        assert set(told(served.engine.asked[0])) == {b"host", b"connection"}


def test_an_engine_that_dies_in_a_stream_is_told_between_events() -> None:
    with front(STREAM + chunk(b'data: {"a": 1}\n\n') + chunk(b'data: {"a": 2}\n\n')) as served:
        events = stream(served).split("\n\n")
        assert events[:2] == ['data: {"a": 1}', 'data: {"a": 2}']
        assert '"code":"engine_dead"' in events[2]
        assert events[3:] == [""]


def test_a_whole_stream_has_nothing_added() -> None:
    with front(STREAM + chunk(b"data: [DONE]\n\n") + chunk(b"")) as served:
        assert stream(served) == "data: [DONE]\n\n"


@pytest.mark.parametrize(
    "begun",
    [STREAM + chunk(b'data: {"a": 1}\n\ndata: {"a'), WHOLE.replace(b"Length: 2", b"Length: 200")],
    ids=["event", "json"],
)
def test_half_an_answer_is_broken_off(begun: bytes) -> None:
    with front(begun) as served, pytest.raises(httpx.RemoteProtocolError):
        stream(served)


def test_headers_that_cannot_be_written_again_are_left_out() -> None:
    odd = WHOLE.replace(b"\r\n\r\n", b"\r\nRetry-After: \xff\xfe\xe7\x87\x95\r\nServer: other\r\n\r\n")
    with front(odd) as served:
        answer = served.http.post(COMPLETE, json={})
        assert (answer.status_code, answer.text) == (200, "{}")
        assert answer.headers["server"] != "other"
        assert "retry-after" not in answer.headers


def test_busy_is_not_dead(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(proxy_module, "_TELL_SECONDS", 0.3)
    with front(None) as served:
        busy = served.http.get("/v1/models/tern")
        assert (busy.status_code, busy.json()["error"]["code"]) == (503, "overloaded")
        assert busy.headers["retry-after"] == "5"
        served.engine.is_alive = False
        assert "no memory left" not in caplog.text
        dead = served.http.get("/v1/models/tern")
        assert served.http.get("/health").status_code == 503
        assert caplog.text.count("the engine has ended; it said:\nno memory left") == 1
        assert (dead.status_code, dead.json()["error"]["code"]) == (502, "engine_dead")


@pytest.mark.parametrize("ask", [lambda http: http.get("/v1/models/x"), lambda http: http.post(COMPLETE, json={})])
def test_what_comes_after_the_end_is_told_so(ask: Callable[[httpx.AsyncClient], httpx.Response]) -> None:
    engine = Engine(WHOLE)
    proxy = Proxy(engine, 4)
    app = make_proxy_app(proxy, Rules(), Gate())

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            assert (await http.post(COMPLETE, json={})).status_code == 200
            await proxy.close(0.0)
            return await ask(http)

    answer = asyncio.run(run())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert proxy.num_open == 0
