"""`tern web`: the page and its server as processes, and how they end."""

import signal
import socket
from pathlib import Path

import httpx
import pytest

pytest.importorskip("streamlit")

from served import Served, write_tiny
from typer.testing import CliRunner
from web_page import is_there, tern_web

from ternlm.cli import app
from ternlm.config import ConfigError
from ternlm.web import run


def test_a_model_is_served_beside_the_page_and_ends_with_it(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    with tern_web(str(tmp_path / "model"), "--protocol", "chatml", "--device", "cpu") as (process, urls):
        server, page = urls
        assert httpx.get(f"{server}/health").json()["status"] == "ok"
        assert "<html" in httpx.get(page).text
        assert httpx.get(f"{page}/_stcore/health").text == "ok"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert not is_there(server)
        assert not is_there(page)


def test_a_page_talks_to_a_server_that_is_there_and_ends_alone(server: Served) -> None:
    with tern_web("--url", server.url) as (process, urls):
        assert is_there(urls[-1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not is_there(urls[-1])
    assert is_there(server.url)


def test_mistakes_are_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, told in [
            (["smollm2", "--url", "http://x"], "give one of them"),
            (["--url", "ftp://x"], "--url: 'ftp://x' is no address"),
            (["--port", port], f"--port {port} can't be used"),
        ]:
            with pytest.raises(ConfigError, match=told):
                CliRunner().invoke(app, ["web", *words], catch_exceptions=False)


def test_what_cant_be_served_ends_the_command(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="didn't start, for the reason above"):
        CliRunner().invoke(app, ["web", str(tmp_path / "none"), "--port", "0"], catch_exceptions=False)
    assert "none" in capfd.readouterr().err


def test_a_key_is_in_the_environment_alone_and_nothing_is_sent_or_heard_elsewhere(tmp_path: Path) -> None:
    told = run.environment("http://x", "secret", tmp_path, {"TERNLM_WEB_URL": "old", "PATH": "p"})
    assert told["TERNLM_WEB_URL"] == "http://x"
    assert (told["TERNLM_WEB_KEY"], told["PATH"], told["TERNLM_WEB_HISTORY"]) == ("secret", "p", str(tmp_path))
    assert "TERNLM_WEB_KEY" not in run.environment("http://x", None, None, {"TERNLM_WEB_KEY": "old"})
    words = run.command(8501)
    assert words[words.index("--browser.gatherUsageStats") + 1] == "false"
    assert words[words.index("--server.address") + 1] == "127.0.0.1"
    assert words.count("--server.allowedHosts") == 2
