"""Who may ask, how much, and what becomes of requests when clients go away or the server ends."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from served import ROOT, events_of, serving, tern_serve, wait_until, write_tiny

from ternlm.config.section import ConfigError, UserError
from ternlm.serve.address import bind, check_host
from ternlm.serve.guard import Gate
from ternlm.serve.run import run

COMPLETE = "/v1/completions"
LONG = {"model": "tiny", "prompt": "The tern", "max_tokens": 400, "ignore_eos": True}


def test_another_host_needs_a_key():
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        check_host(host, None)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match="there is no API key; set TERNLM_API_KEY"):
            check_host(host, None)
        check_host(host, "secret")
    with pytest.raises(ConfigError, match="is empty"):
        check_host("127.0.0.1", "")


def test_with_a_key_every_route_but_health_needs_it():
    with serving(api_key="secret-ü") as server, server.http() as http:
        right = {"Authorization": "Bearer secret-ü".encode()}
        routes = [("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("POST", COMPLETE)]
        routes += [("POST", "/tokenize"), ("POST", "/v1/chat/completions"), ("GET", "/nowhere")]
        for method, path in routes:
            for wrong in ({}, {"Authorization": "Bearer secret"}, {"Authorization": b"Basic secret-\xc3\xbc"}):
                answer = http.request(method, path, headers=wrong)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert http.request(method, path, headers=right).status_code != 401
        assert http.get("/health").status_code == 200
        assert http.get("/v1/models", headers={"Host": "elsewhere.org", **right}).status_code == 200


def test_a_key_may_be_of_any_bytes():
    with serving(api_key="k\udcff") as server, server.http() as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers={b"Authorization": b"Bearer k\xff"}).status_code == 200


def test_without_a_key_other_names_for_this_machine_are_refused():
    with serving(local_names_only=True) as server, server.http() as http:
        for host in ("evil.example", "evil.example:80", "", "[2001:db8::1]:80", "[::1].evil.example"):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 403
        for host in ("localhost", "LocalHost.:9", "127.0.0.1:9", "[::1]:9"):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("told", [True, False])
def test_a_body_too_large_is_refused(told):
    with serving(max_body_bytes=1000) as server, server.http() as http:
        body = json.dumps({"model": "tiny", "prompt": "a" * 3_000_000}).encode()
        content = body if told else (body[i : i + 65536] for i in range(0, len(body), 65536))
        answer = http.post(COMPLETE, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        assert http.post(COMPLETE, json={"model": "tiny", "prompt": "a", "max_tokens": 1}).status_code == 200


def test_too_many_waiting_are_refused_and_told_when_to_come_back(monkeypatch):
    with serving(max_running=1, max_waiting=1) as server, server.http() as http:
        forward = server.engine._forward
        monkeypatch.setattr(server.engine, "_forward", lambda shares: time.sleep(0.01) or forward(shares))
        with http.stream("POST", COMPLETE, json={**LONG, "stream": True, "n": 2}) as stream:
            next(stream.iter_lines())
            answer = http.post(COMPLETE, json=LONG)
            assert answer.status_code == 429
            assert answer.headers["Retry-After"] == "1"
            assert answer.json()["error"]["code"] == "overloaded"
        wait_until(server.is_free)
        both = {**LONG, "max_tokens": 2, "prompt": ["a", "b"]}
        assert http.post(COMPLETE, json=both).status_code == 200
        assert http.post(COMPLETE, json={**both, "n": 2}).status_code == 400
        wait_until(server.is_free)


def test_what_a_client_that_goes_away_had_asked_for_is_let_go_of():
    with serving() as server:
        for stream in (True, False):
            for more in ({}, {"n": 12}):
                with server.http(trust_env=False) as http:
                    address = http.base_url.host, http.base_url.port
                body = json.dumps({**LONG, "stream": stream, "max_tokens": 500, **more}).encode()
                head = f"POST {COMPLETE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                with socket.create_connection(address) as connection:
                    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    wait_until(lambda: server.backend.load().running > 0)
                    before = server.backend.load().steps
                wait_until(server.is_free, 10)
                assert server.backend.load().steps - before < 300
        with server.http() as http:
            text = http.get("/metrics").text
            assert 'ternlm_requests_total{route="/v1/completions",status="499"} 2.0' in text


def test_the_server_works_though_a_step_fails(monkeypatch, caplog):
    with serving() as server, server.http() as http:
        forward = server.engine._forward
        monkeypatch.setattr(server.engine, "_forward", lambda shares: 1 / 0)
        answer = http.post(COMPLETE, json=LONG)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "ZeroDivision" not in answer.text
        *_, error = events_of(http.post(COMPLETE, json={**LONG, "stream": True}).text)
        assert error["error"]["code"] == "internal_error"
        monkeypatch.setattr(server.engine, "_forward", forward)
        assert http.post(COMPLETE, json={**LONG, "max_tokens": 3}).status_code == 200
        assert server.is_free()


def test_an_error_of_the_servers_own_is_told_without_details_and_counted(monkeypatch):
    with serving() as server, server.http() as http:
        monkeypatch.setattr(server.tokenizer, "encode", lambda text: 1 / 0)
        answer = http.post("/tokenize", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "division" not in answer.text
        assert 'ternlm_requests_total{route="/tokenize",status="500"} 1.0' in http.get("/metrics").text


def test_requests_are_logged_without_what_they_say(caplog):
    with serving(log_requests=True) as server, server.http() as http, caplog.at_level("INFO"):
        http.post(COMPLETE, json={"model": "tiny", "prompt": "my secret", "max_tokens": 1})
        http.get("/v1/models/secret")
        told = lambda: [each.getMessage() for each in caplog.records if each.name == "ternlm.serve.guard"]  # noqa: E731
        wait_until(lambda: len(told()) > 1)
    assert [message.partition(" in ")[0] for message in told()] == ["POST /v1/completions 200", "GET other 404"]


def test_while_it_ends_new_requests_are_refused():
    with serving() as server, server.http() as http:
        server.gate.is_open = False
        for answer in (http.post(COMPLETE, json=LONG), http.get("/health"), http.get("/v1/models")):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "shutting_down"
        assert http.get("/metrics").status_code == 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


def ask(url, results, **more):
    answer = httpx.post(f"{url}{COMPLETE}", json={**LONG, "seed": 1, **more}, timeout=60)
    results.append((answer.status_code, answer.json()))


def busy(url, **more):
    """Ask for much in a thread; return what will be answered once it runs."""
    results = []
    thread = threading.Thread(target=ask, args=(url, results), kwargs={"n": 60, **more})
    thread.start()
    wait_until(lambda: httpx.get(f"{url}/health").json()["running"] > 0)
    return thread, results


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_answers_that_run_when_it_is_told_to_end_are_finished(folder, number):
    with tern_serve(str(folder), "--name", "tiny", "--protocol", "chatml", "--dtype", "float32") as (process, url):
        thread, results = busy(url, n=24, max_tokens=60)
        process.send_signal(number)
        refused = None
        while thread.is_alive() and refused is None:
            answer = httpx.get(f"{url}/v1/models")
            refused = answer if answer.status_code == 503 else None
        thread.join()
        assert refused is None or refused.json()["error"]["code"] == "shutting_down"
        ((status, answer),) = results
        assert status == 200
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
        assert process.wait(20) == 0


def test_answers_that_take_too_long_are_cut_and_delivered(folder):
    words = (str(folder), "--name", "tiny", "--protocol", "chatml", "--dtype", "float32", "--grace", "0.3")
    with tern_serve(*words) as (process, url):
        thread, results = busy(url)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert time.monotonic() - began < 10
        ((status, answer),) = results
        assert status == 200
        assert "cancelled" in {choice["finish_reason"] for choice in answer["choices"]}
        assert answer["usage"]["completion_tokens"] > 0
        assert process.wait(20) == 0


def test_a_port_that_cannot_be_had_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"--port \d+ can't be used"):
            bind("127.0.0.1", other.getsockname()[1])
    with pytest.raises(ConfigError, match=r"--host no.such.host.invalid --port 0 can't be used"):
        bind("no.such.host.invalid", 0)


def test_a_port_that_another_opens_while_the_model_loads_is_told():
    ours = bind("127.0.0.1", 0)
    closed, told = [], []

    class Backend:
        async def close(self, seconds):
            closed.append(seconds)

    with bind("127.0.0.1", ours.getsockname()[1]) as other:
        other.listen()
        with pytest.raises(UserError, match=r"http://127.0.0.1:\d+ can't be opened \(Address already in use\); choose"):
            run(None, Backend(), Gate(), ours, 30.0, told.append)
    assert (closed, told) == ([30.0], [])


def test_a_server_that_may_not_start_says_why_before_it_looks_for_the_model():
    command = [sys.executable, "-m", "ternlm", "serve", "nothing", "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr.startswith("error: --host 0.0.0.0 lets others in")) == (2, True)
