"""Lines and commands in a terminal, and what becomes of the conversation."""

import io
import json
from pathlib import Path

import pytest

from ternlm.cli.terminal import Aside, Conversation, talk
from ternlm.config.section import ConfigError


class Partner:
    """Says how many messages it got and by which settings; notes them."""

    def __init__(self):
        self.asked = []

    def __call__(self, messages, settings):
        self.asked.append([dict(message) for message in messages])
        if "fail" in messages[-1]["content"]:
            raise RuntimeError("no power")
        yield f"{len(messages)} at"
        if "interrupt" in messages[-1]["content"]:
            raise KeyboardInterrupt
        yield Aside("(hm)") if "aside" in messages[-1]["content"] else ""
        yield f" {settings['temperature']}"


@pytest.fixture
def conversation():
    return Conversation(Partner(), {"temperature": 0.5, "top_k": 0})


@pytest.fixture
def say(conversation, monkeypatch, capsys):
    def run(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        talk(conversation)
        return capsys.readouterr().out.splitlines()

    return run


def contents(conversation):
    return [message["content"] for message in conversation.messages]


def test_questions_are_answered_in_turns(conversation, say):
    assert say("one", "", "two") == ["1 at 0.5", "3 at 0.5"]
    assert contents(conversation) == ["one", "1 at 0.5", "two", "3 at 0.5"]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_several_lines_make_one_question(conversation, say):
    say('"""one', "  two", "", 'three"""', '"""four"""', '"""', "five", '"""')
    assert contents(conversation)[::2] == ["one\n  two\n\nthree", "four", "five"]


def test_a_new_conversation_keeps_what_the_model_was_told(conversation, say):
    assert say("/system be kind", "one", "/new", "two", "/system", "three") == ["2 at 0.5", "2 at 0.5", "1 at 0.5"]
    assert [asked[0]["role"] for asked in conversation.answer.asked] == ["system", "system", "user"]


def test_the_last_answer_can_be_made_anew_or_forgotten(conversation, say):
    assert say("/regenerate", "/undo")[0] == "[nothing was asked yet]"
    assert say("one", "two", "/regenerate", "/undo", "/undo", "/undo")[-1] == "[nothing was asked yet]"
    assert [len(asked) for asked in conversation.answer.asked] == [1, 3, 3]
    assert conversation.messages == []


def test_what_fails_or_is_ended_loses_nothing(conversation, say):
    assert say("one", "fail", "interrupt") == ["1 at 0.5", "[no power]", "3 at [ended]"]
    assert contents(conversation) == ["one", "1 at 0.5", "interrupt", "3 at"]
    conversation.messages[-2] = {"role": "user", "content": "fail now"}
    assert say("/regenerate") == ["[no power]"]
    assert contents(conversation) == ["one", "1 at 0.5", "fail now", "3 at"]


def test_settings_are_shown_and_changed_to_values_of_their_kind(conversation, say):
    assert say("/set", "/set temperature 1", "one") == ["temperature = 0.5", "top_k = 0", "1 at 1.0"]
    assert say("/set temper 1", "/set top_k 0.5", "/set top_k", "/set temperature warm") == [
        "[there is no setting temper; there are temperature, top_k]",
        "[top_k = 0.5 must be a whole number, as 0 is]",
        "[/set top_k needs a value: /set top_k 0]",
        "[temperature = warm must be a number, as 1.0 is]",
    ]


def test_settings_that_may_be_null_become_so_and_others_dont(conversation, say):
    conversation.settings["seed"], conversation.optional = None, {"seed": int}
    assert say(
        "/set seed 5", "/set seed null", "/set seed soon", "/set temperature null", "/set top_k true", "/set"
    ) == [
        "[seed = soon must be a whole number, or null]",
        "[temperature = null must be a number, as 0.5 is]",
        "[top_k = true must be a whole number, as 0 is]",
        "temperature = 0.5",
        "top_k = 0",
        "seed = null",
    ]


def test_asides_are_shown_and_not_kept(conversation, say):
    assert say("aside") == ["1 at(hm) 0.5"]
    assert contents(conversation) == ["aside", "1 at 0.5"]


def test_a_conversation_is_saved_as_training_takes_it_and_loaded(conversation, say, tmp_path: Path):
    file = tmp_path / "talk.json"
    say("/system be kind", "你好", f"/save {file}")
    record = json.loads(file.read_text("utf-8"))
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
    assert say("/system", f"/load {file}", "two", "/show") == [
        "4 at 0.5",
        "[system] be kind",
        "[user] 你好",
        "[assistant] 2 at 0.5",
        "[user] two",
        "[assistant] 4 at 0.5",
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "not a conversation"),
        ("{", "Expecting property name"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must come in turns"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "not a conversation"),
    ],
)
def test_what_is_no_conversation_is_not_loaded(content, told, conversation, say, tmp_path: Path):
    (tmp_path / "talk.json").write_text(content)
    (line,) = say("one", f"/load {tmp_path / 'talk.json'}")[1:]
    assert told in line
    assert contents(conversation) == ["one", "1 at 0.5"]


def test_commands_that_cant_be_done_say_so_and_others_are_there(conversation, say, tmp_path: Path):
    out = say("/dance", "/save", f"/load {tmp_path / 'none.json'}", "/help", "/quit", "one")
    assert out[0] == "[there is no /dance; /help tells what there is]"
    assert out[1] == "[/save needs a file: /save talk.json]"
    assert "No such file" in out[2]
    assert conversation.messages == []
    assert any(line.startswith("/regenerate") for line in out)


def test_what_the_input_ends_within_is_asked(conversation, say):
    assert say('"""one', "two") == ["1 at 0.5"]
    assert contents(conversation)[0] == "one\ntwo"


def test_a_file_nested_too_deeply_is_told(conversation, say, tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    assert "recursion" in say(f"/load {tmp_path}/deep.json")[0]


def test_bytes_that_the_terminal_does_not_know_end_nothing(conversation, monkeypatch):
    told = io.BytesIO()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("燕?\n".encode()), "ascii"))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(told, "ascii", write_through=True))
    conversation.answer = lambda messages, settings: iter(["燕"])
    talk(conversation)
    assert told.getvalue() == b"?\n"
    assert contents(conversation)[0].endswith("?")


@pytest.mark.parametrize("closed", ["stdin", "stdout"])
def test_without_an_input_or_output_there_is_no_conversation(conversation, monkeypatch, closed):
    monkeypatch.setattr(f"sys.{closed}", None)
    with pytest.raises(ConfigError, match="one of them is closed"):
        talk(conversation)
