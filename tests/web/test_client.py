"""`tern client` against a server, as somebody at a terminal meets it."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from served import Served, wait_until
from typer.testing import CliRunner

from ternlm.cli import app
from ternlm.cli.client import _answerer
from ternlm.cli.terminal import Aside
from ternlm.config import ConfigError
from ternlm.web.api import Piece


def talk(server: Served, lines: str, *options: str) -> list[str]:
    done = CliRunner().invoke(app, ["client", server.url, "--max-tokens", "8", *options], input=lines)
    assert done.exception is None, done.output
    return done.output.splitlines()


def test_a_conversation_with_a_server(server: Served, tmp_path: Path) -> None:
    said = talk(server, f"hello\n/save {tmp_path / 'talk'}\n", "--temperature", "0", "--system", "be kind")
    body = {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]}
    with server.http() as http:
        told = http.post("/v1/chat/completions", json={**body, "model": "tiny", "max_tokens": 8, "temperature": 0})
    content = told.json()["choices"][0]["message"]["content"]
    assert content.splitlines()[0] in said[0]
    assert '"role": "assistant"' in (tmp_path / "talk").read_text()


def test_what_a_server_refuses_is_told_and_the_conversation_goes_on(server: Served) -> None:
    said = talk(server, "/set temperature 9\nhello\n/set temperature 0\n/set seed 3\nhello\n/set\n")
    assert said[0].startswith("[the server answers 400: temperature: Input should be less than or equal to 2")
    assert "seed = 3" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["http://127.0.0.1:9"], "there is no server at http://127.0.0.1:9/v1"),
        (["URL", "--model", "other"], "--model other isn't at .*; there are tiny"),
        (["ftp://x"], "no address of a server"),
    ],
)
def test_mistakes_are_told_at_once(server: Served, words: list[str], told: str) -> None:
    words = [server.url if word == "URL" else word for word in words]
    with pytest.raises(ConfigError, match=told):
        CliRunner().invoke(app, ["client", *words], catch_exceptions=False)


def test_thoughts_are_shown_apart() -> None:
    class Thinker:
        def chat(self, messages: Any, model: str, settings: Any) -> Any:
            assert settings == {"temperature": 0.5}
            yield from (Piece(thought="h"), Piece(thought="m"), Piece("ye"), Piece("s", finish="length"))

    said = list(_answerer(Thinker(), "m")([], {"temperature": 0.5, "top_k": 0, "min_p": 0.0, "seed": None}))
    assert said == [Aside("[thinks] h"), Aside("m"), Aside("\n[says] "), "ye", "s", Aside(" [cut: it became too long]")]


def test_an_interrupt_ends_the_answer_on_the_server_and_not_the_conversation(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = server.engine.step

    def slow() -> object:  # so that the answer isn't whole before the signal has come
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(server.engine, "step", slow)
    command = [sys.executable, "-m", "ternlm", "client", server.url, "--temperature", "1.9", "--max-tokens", "450"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        wait_until(lambda: server.backend.load().running)
        process.send_signal(signal.SIGINT)
        wait_until(server.is_free)
        out, err = process.communicate("/show\n", timeout=60)
    assert process.returncode == 0, err
    assert " [ended]" in out
    assert "[user] hello" in out
    assert io.StringIO(out).readline() != "\n"
