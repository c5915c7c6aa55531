"""Conversations: their forms outside, what was there before, calls without results; folders of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from ternlm.data.conversations import read_conversation
from ternlm.web.history import History
from ternlm.web.talk import Entry, Talk, as_data, as_line, as_markdown, from_data, from_lines, read_tools
from ternlm.web.words import Mistake, load_words

TOOLS = '[{"name": "weather", "parameters": {"type": "object"}}]'


def call(id: str = "c1", name: str = "weather", arguments: str = '{"city": "北京"}') -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def talk() -> Talk:
    return Talk(
        system="Be kind.",
        tools=TOOLS,
        entries=[
            Entry({"role": "user", "content": "Weather in 北京?\n"}),
            Entry({"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call()]}, {"n": 1}),
            Entry({"role": "tool", "content": "sunny", "tool_call_id": "c1"}),
            Entry({"role": "assistant", "content": "It is *sunny*."}, {"finish": "stop"}),
        ],
    )


def test_an_exported_line_comes_back_and_is_what_fine_tuning_takes() -> None:
    line = as_line(talk())
    assert line.count("\n") == 1
    (back,) = from_lines(line)
    assert [entry.message for entry in back.entries] == [entry.message for entry in talk().entries]
    assert (back.system, read_tools(back.tools)) == (talk().system, read_tools(TOOLS))
    assert as_line(back) == line
    learnt = read_conversation(json.loads(line), "messages")
    assert [message["role"] for message in learnt.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert learnt.tools == read_tools(TOOLS)


def test_several_lines_and_lists_are_read_as_the_terminal_saves_them() -> None:
    one = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    two = json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "c"}]}], "tools": None})
    for text in (f"\ufeff{one}\r\n\n{two}", f"[{one}, {two}]"):
        assert [each.name for each in from_lines(text)] == ["a", "c"]
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    (read,) = from_lines(json.dumps({"messages": [called]}))
    assert read.entries[0].calls == [call("call_0", "f", '{"a": 1}')]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{", "import_not_json"),
        ("", "import_empty"),
        ("[" * 100_000, "import_not_json"),
        ("3", "import_no_messages"),
        ('{"messages": []}', "import_no_messages"),
        ('{"messages": [3]}', "import_wrong_message"),
        ('{"messages": [{"role": "user"}]}', "import_wrong_message"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "import_wrong_message"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
            "import_wrong_message",
        ),
        ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [3]}]}', "import_wrong_message"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "{"}', "tools_not_json"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n' * 501, "import_too_many"),
    ],
)
def test_what_is_no_conversation_is_refused(text: str, name: str) -> None:
    with pytest.raises(Mistake) as caught:
        from_lines(text)
    assert caught.value.name == name
    assert all(words.of(caught.value) for words in load_words().values())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{", "tools_not_json"),
        ("3", "tools_no_name"),
        ('[{"type": "function", "function": {}}]', "tools_no_name"),
        ('[{"name": "a"}, {"name": ""}]', "tools_no_name"),
        ('{"name": "a", "parameters": []}', "tools_no_schema"),
        ('[{"name": "a"}, {"type": "function", "function": {"name": "a"}}]', "tools_twice"),
    ],
)
def test_what_are_no_tools_is_refused(text: str, name: str) -> None:
    with pytest.raises(Mistake) as caught:
        read_tools(text)
    assert caught.value.name == name


def test_tools_are_read_from_functions_and_tools() -> None:
    wanted = [{"type": "function", "function": {"name": "a"}}]
    assert read_tools('{"name": "a"}') == read_tools(json.dumps(wanted)) == wanted
    assert read_tools(" ") == []


def test_markdown_reads_well() -> None:
    text = as_markdown(talk(), load_words()["zh"])
    assert text.startswith("# Weather in 北京?\n\n## 系统提示词\n\nBe kind.\n\n## 用户\n\nWeather in 北京?\n")
    assert '> hm\n\n`weather`\n\n```json\n{"city": "北京"}\n```\n\n## 工具\n\nsunny' in text
    assert text.endswith("It is *sunny*.\n")


def test_servers_get_what_they_know_alone() -> None:
    sent = talk().messages()
    assert sent[0] == {"role": "system", "content": "Be kind."}
    assert sent[2] == {"role": "assistant", "content": "", "tool_calls": [call()]}


def test_calls_are_open_until_their_results_are_there() -> None:
    its = talk()
    assert its.open_calls() == []
    its.cut(2)
    assert its.open_calls() == [call()]
    its.entries[1].message["tool_calls"].append(call("c2"))
    its.entries.append(Entry({"role": "tool", "content": "", "tool_call_id": "c1"}))
    assert [each["id"] for each in its.open_calls()] == ["c2"]
    assert Talk().open_calls() == []


def test_a_change_can_be_taken_back_and_forth() -> None:
    its, whole = talk(), talk().entries
    its.cut(its.last_question())
    assert its.entries == whole[:3]
    its.cut(3)
    its.swap()
    assert its.entries == whole
    its.swap()
    assert its.entries == whole[:3]


def test_names_are_titles_or_how_the_first_question_begins() -> None:
    assert talk().name == "Weather in 北京?"
    assert Talk(title="T", entries=talk().entries).name == "T"
    assert Talk(title="x" * 50).name == "x" * 39 + "…"
    assert Talk().name == ""


def test_a_folder_keeps_conversations_whole(tmp_path: Path) -> None:
    history, its = History(tmp_path / "new" / "folder"), talk()
    its.cut(1)
    history.save(its)
    history.save(Talk())
    talks, others = history.load()
    assert (len(talks), others) == (2, [])
    assert its in talks
    assert not list((tmp_path / "new" / "folder").glob(".*"))
    history.remove(its)
    history.remove(its)
    assert len(history.load()[0]) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"id": "abcdef0123"}', '{"entries": [3], "before": []}'])
def test_files_that_hold_no_conversation_are_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "abcdef0123.json").write_text(content)
    assert History(tmp_path).load() == ([], ["abcdef0123.json"])
    assert (tmp_path / "abcdef0123.json").read_text() == content


def test_a_conversation_that_cant_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    history, its = History(tmp_path), talk()
    history.save(its)
    its.entries.append(Entry({"role": "user", "content": object()}))
    with pytest.raises(TypeError):
        history.save(its)
    assert [each.entries for each in history.load()[0]] == [talk().entries]
    assert len(list(tmp_path.iterdir())) == 1


def test_data_of_another_kind_is_no_conversation() -> None:
    data = as_data(talk())
    assert from_data(data) == from_data(json.loads(json.dumps(data)))
    for change in (
        {"title": 3},
        {"changed": "soon"},
        {"more": 1},
        {"entries": [{"message": {"role": "x"}, "note": {}}]},
    ):
        with pytest.raises((ValueError, TypeError)):
            from_data({**data, **change})
