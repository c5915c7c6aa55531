"""The client against a real server, and against some that do otherwise."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from served import Served, serving, wait_until

from ternlm.web.api import Answer, CallPiece, Piece, Server, ServerError

ASKED = [{"role": "user", "content": "The tern"}]
LONG = {"max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def api(server: Served) -> Server:
    return Server(server.url)


def whole(answer: Answer) -> str:
    return "".join(piece.text for piece in answer)


@contextmanager
def speaking(*parts: bytes, stay: bool = False) -> Iterator[str]:
    """A server that says the same to everyone, whatever it is asked; stay: it doesn't hang up then."""
    listener = socket.create_server(("127.0.0.1", 0))
    kept = []

    def run() -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            read_request(one)
            for part in parts:
                one.sendall(part)
                time.sleep(0.01)
            if stay:
                kept.append(one)
            else:
                one.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def read_request(one: socket.socket) -> None:
    """Read a request whole: closing with something unread would reset the connection."""
    request = b""
    while b"\r\n\r\n" not in request:
        request += one.recv(65536)
    head, _, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    while length and len(body) < int(length[1]):
        body += one.recv(65536)


def says(*events: object, kind: bytes = b"text/event-stream", status: bytes = b"200 OK") -> tuple[bytes, ...]:
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: " + kind + b"\r\nConnection: close\r\n\r\n"
    return head, *(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def test_models_are_listed_and_addresses_may_be_short(server: Served) -> None:
    for url in (server.url, server.url + "/", server.url + "/v1", server.url.removeprefix("http://")):
        assert Server(url).models() == ["tiny"]


def test_no_proxy_stands_before_this_machine(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Server(server.url).models() == ["tiny"]


def test_a_streamed_answer_is_the_whole_one_with_its_usage(server: Served, api: Server) -> None:
    settings = {"max_tokens": 12, "temperature": 0, "seed": None, "ignore_eos": True}
    pieces = list(api.chat(ASKED, "tiny", settings))
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with server.http() as http:
        told = http.post("/v1/chat/completions", json=body).json()
    assert "".join(piece.text for piece in pieces) == told["choices"][0]["message"]["content"]
    assert [piece.finish for piece in pieces if piece.finish] == ["length"]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage["completion_tokens"] == 12
    assert len(pieces) > 5


def test_closing_an_answer_from_another_thread_stops_the_server(server: Served, api: Server) -> None:
    server.backend.load()
    answer, got = api.chat(ASKED, "tiny", LONG), []
    reader = threading.Thread(target=lambda: got.extend(answer))
    reader.start()
    wait_until(lambda: got)
    assert server.backend.load().running == 1
    answer.close()
    reader.join(10)
    assert not reader.is_alive()
    wait_until(server.is_free)
    assert sum(len(piece.text) > 0 for piece in got) < 400


def test_leaving_the_iterator_stops_the_server(server: Served, api: Server) -> None:
    with api.chat(ASKED, "tiny", LONG) as answer:
        for _ in answer:
            break
    wait_until(server.is_free)
    pieces = iter(api.chat(ASKED, "tiny", LONG))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    wait_until(server.is_free)


def test_an_answer_that_waits_for_its_first_word_can_be_closed() -> None:
    for parts in ((), says()):
        with speaking(*parts, stay=True) as url:
            answer = Server(url).chat(ASKED, "m")
            threading.Timer(0.3, answer.close).start()
            assert list(answer) == []


def test_a_closed_answer_is_never_asked_for() -> None:
    answer = Server("http://127.0.0.1:9").chat(ASKED, "m")
    answer.close()
    assert list(answer) == []


def test_the_servers_own_words_are_told(api: Server) -> None:
    with pytest.raises(ServerError, match="there is no model 'other' here") as caught:
        whole(api.chat(ASKED, "other"))
    assert (caught.value.fault, caught.value.status) == ("refused", 404)
    with pytest.raises(ServerError, match="temperature: Input should be less than or equal to 2"):
        whole(api.chat(ASKED, "tiny", {"temperature": 3}))


def test_the_key_is_sent() -> None:
    with serving(api_key="secret") as server:
        with pytest.raises(ServerError, match="API key is missing or wrong") as caught:
            Server(server.url).models()
        assert caught.value.status == 401
        assert Server(server.url, "secret").models() == ["tiny"]
        assert whole(Server(server.url, "secret").chat(ASKED, "tiny", {"max_tokens": 3, "ignore_eos": True}))


def test_a_server_that_isnt_there_or_says_nothing_is_told_clearly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match=rf"no server at http://127.0.0.1:{port}/v1 .* is it running") as caught:
        Server(f"http://127.0.0.1:{port}").models()
    assert caught.value.fault == "unreachable"
    with speaking(stay=True) as url, pytest.raises(ServerError, match=r"said nothing for 0\.2 s") as caught:
        whole(Server(url, timeout=0.2).chat(ASKED, "m"))
    assert caught.value.fault == "silent"


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "http://a b:c"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ServerError, match="no address"):
        Server(url)


@pytest.mark.parametrize(
    ("parts", "fault", "words"),
    [
        (says({"error": {"message": "no power"}}), "refused", "the server failed: no power"),
        (says(status=b"502 Bad Gateway", kind=b"text/html"), "refused", "answers 502: Bad Gateway"),
        ((*says(status=b"422 No"), b'{"detail": [{"msg": "no"}]}'), "refused", r'answers 422: \[{"msg": "no"}\]'),
        ((*says(), b"data: {\n\n"), "broken", "answered with something else"),
        ((*says(), b"data: 3\n\n"), "broken", "not an object"),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\ndata: {}\n\n",), "broken", "broke"),
        ((b"nonsense\r\n\r\n",), "broken", "broke"),
    ],
)
def test_failing_servers_are_told_of(parts: tuple[bytes, ...], fault: str, words: str) -> None:
    with speaking(*parts) as url, pytest.raises(ServerError, match=words) as caught:
        whole(Server(url).chat(ASKED, "m"))
    assert caught.value.fault == fault


def test_thoughts_calls_and_other_servers_habits_are_read() -> None:
    first = {"id": "c", "function": {"name": "f", "arguments": None}, "index": 0}
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "content": None, "reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"reasoning": "m"}}], "usage": None},
        {"choices": [{"delta": {"content": "yes"}}]},
        {"choices": [{"delta": {"tool_calls": [first]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}}]},
        {"choices": [{"delta": {}, "finish_reason": "tool_calls"}], "usage": {"completion_tokens": 3}},
    ]
    with speaking(says()[0], b": ping\r\n\r\n", *says(*chunks)[1:], b"data: [DONE]") as url:
        pieces = list(Server(url).chat(ASKED, "m"))
    assert "".join(piece.thought for piece in pieces) == "hmm"
    assert "".join(piece.text for piece in pieces) == "yes"
    calls = [call for piece in pieces for call in piece.calls]
    assert calls == [CallPiece(0, "c", "f"), CallPiece(0, arguments="{}")]
    assert pieces[-2:] == [Piece(finish="tool_calls"), Piece(usage={"completion_tokens": 3})]
    answer = {"choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}], "usage": {"total_tokens": 1}}
    with speaking(says(kind=b"application/json")[0], json.dumps(answer).encode()) as url:
        assert list(Server(url).chat(ASKED, "m")) == [Piece("whole", finish="stop"), Piece(usage={"total_tokens": 1})]
