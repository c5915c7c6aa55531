"""Records of every format become conversations; and what is said of those that don't."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import SHARED

from ternlm.data.conversations import NoAnswer, OtherFormat, detect_format, read_conversation, unknown_format
from ternlm.data.errors import DataError
from ternlm.data.plan import find_inputs
from ternlm.data.records import read_records
from ternlm.data.spans import Span

TOOL = {"name": "weather", "description": "d", "parameters": {}}
WRAPPED = {"type": "function", "function": TOOL}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def message(role, content, loss=None, **more):
    return {"role": role, "content": content, "loss": role == "assistant" if loss is None else loss, **more}


def read(record):
    return read_conversation(record, detect_format(record))


def talk(*texts):
    return [message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


FORMATS = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "output": "b", "text": "### a b"},
    "pairs": {"prompt": "a", "completion": "b"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_known_by_its_fields_and_gives_the_same_conversation(name):
    assert detect_format(FORMATS[name]) == name
    found = read(FORMATS[name])
    assert (found.messages, found.tools, found.text) == (talk("a", "b"), None, None)


def test_nulls_as_parquet_has_them_are_no_fields():
    empty = dict.fromkeys(["conversations", "instruction", "tools", "system"])
    raw = {"role": "assistant", "content": "b", "tool_calls": None, "name": None, "loss": None}
    assert read({**empty, "messages": [{"role": "user", "content": "a"}, raw]}).messages == talk("a", "b")


def test_messages_may_have_tools_calls_parts_names_and_losses():
    found = read(
        {
            "tools": json.dumps([TOOL]),
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
                {"role": "assistant", "content": "hi", "weight": 0},
                {"role": "user", "content": "a", "name": "Ann", "loss": False},
                {"role": "user", "content": "b", "weight": 0},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "7", "function": CALL["function"]}]},
                {"role": "tool", "content": "", "tool_call_id": "7"},
                {"role": "assistant", "content": "c", "loss": True, "reasoning_content": "hm"},
            ],
        }
    )
    assert found.tools == [WRAPPED]
    assert found.messages == [
        message("system", "be kind"),
        message("assistant", "hi", loss=False),
        message("user", "a", name="Ann"),
        message("user", "b"),
        message("assistant", "", tool_calls=[{"id": "7", **CALL}]),
        message("tool", "", tool_call_id="7"),
        message("assistant", "c", reasoning_content="hm"),
    ]


def test_arguments_come_as_objects_or_json():
    for arguments in ({"city": "Oslo"}, '{"city": "Oslo"}'):
        calls = [{"function": {"name": "weather", "arguments": arguments}}]
        (found,) = read({"messages": [{"role": "assistant", "tool_calls": calls}]}).messages
        assert found["tool_calls"] == [CALL]


def test_sharegpt_has_calls_results_and_a_system_message_of_its_own():
    named = {"name": "weather", "arguments": {"city": "Oslo"}}
    items = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(named)},
        {"from": "observation", "value": "1"},
        {"from": "function_call", "value": json.dumps([named, named])},
        {"from": "tool", "value": "2"},
        {"from": "gpt", "value": "b"},
    ]
    found = read({"conversations": items, "system": "be kind", "tools": json.dumps([WRAPPED])})
    assert found.tools == [WRAPPED]
    assert found.messages == [
        message("system", "be kind"),
        message("user", "a"),
        message("assistant", "", tool_calls=[CALL]),
        message("tool", "1"),
        message("assistant", "", tool_calls=[CALL, CALL]),
        message("tool", "2"),
        message("assistant", "b"),
    ]
    assert read({"conversations": items, "tools": "[]"}).tools is None
    assert read({"conversations": items, "tools": ""}).tools is None


def test_alpaca_joins_instruction_and_input_and_begins_with_its_history():
    record = {"instruction": "i", "input": "", "output": "o"}
    assert read(record).messages == talk("i", "o")
    assert read({**record, "input": "x\n"}).messages == talk("i\nx\n", "o")
    full = {**record, "history": [["q", "r"], ["s", "t"]], "system": "be kind"}
    assert read(full).messages == [message("system", "be kind"), *talk("q", "r", "s", "t", "i", "o")]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("prompt", "completion"),
        ("prompt", "response"),
        ("question", "answer"),
        ("query", "response"),
        ("input", "output"),
    ],
)
def test_pairs_have_one_of_several_pairs_of_fields(question, answer):
    record = {question: "a", answer: "b", "id": 1}
    assert detect_format(record) == "pairs"
    assert read(record).messages == talk("a", "b")


def test_a_prompt_of_messages_is_not_trained():
    said = [{"role": role, "content": content} for role, content in [("user", "a"), ("assistant", "b"), ("user", "c")]]
    for answer in ("d", [{"role": "assistant", "content": "d"}]):
        found = read({"prompt": said, "completion": answer})
        assert found.messages == [*talk("a"), message("assistant", "b", loss=False), *talk("c", "d")]


def test_a_text_is_a_document():
    assert read({"text": "all of it"}).text == "all of it"
    assert read({"text": "all of it"}).messages == []


def turns(*items):
    return {"messages": [{"role": role, "content": content} for role, content in items]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            turns(("user", "a"), ("narrator", "b")),
            r"message 1 has the unknown role 'narrator' \(known: system, user, as",
        ),
        (turns(("user", "a"), ("system", "s"), ("assistant", "b")), "message 1 is a system message, which can only be"),
        (turns(("user", 5), ("assistant", "b")), "message 0's content must be text, not a number"),
        (turns(("user", None), ("assistant", "b")), "message 0's content must be text, not null"),
        (
            turns(("user", [{"type": "image_url"}]), ("assistant", "b")),
            "message 0's content has a part of type 'image_u",
        ),
        (turns(("user", "\ud800"), ("assistant", "b")), "half of a surrogate pair"),
        ({"messages": {"role": "user"}}, "messages must be a list, not an object"),
        ({"messages": ["a"]}, "message 0 must be an object, not a string"),
        (
            {"messages": [{"role": "user", "content": "a", "loss": True}]},
            "message 0 is of the role user and has a loss",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
            "has weight = 0.5, which must be true or",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
            "role user and calls tools, which only",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "message 0 calls a tool without a name",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]},
            r"message 0's arguments of f: not JSON \(Expecting property name",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
            "message 0's arguments of f must be an object, not an array",
        ),
        ({**FORMATS["messages"], "tools": "{"}, r"tools: not JSON"),
        ({**FORMATS["messages"], "tools": [{"a": 1}]}, "tool 0 has no name"),
        ({**FORMATS["sharegpt"], "system": 4}, "system must be text, not a number"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            r"message 0 is from 'alien', an unknown role \(known: syst",
        ),
        (
            {"conversations": [{"role": "user", "content": "x"}]},
            "fields from and value, not 'role', 'content'; they look",
        ),
        ({"conversations": [{"from": "function_call", "value": "hm"}]}, "message 0's function call: not JSON"),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "b"}], "system": "t"},
            "has a field system, and a system message too",
        ),
        ({"instruction": "a", "output": 5}, "output must be text, not a number"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "turn 0 of history must be a list of question and"),
    ],
)
def test_what_is_wrong_with_a_record_is_said_precisely(record, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read(record)
    assert not isinstance(caught.value, NoAnswer | OtherFormat)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (turns(("user", "a")), "has no assistant message to train on"),
        (turns(("user", "a"), ("assistant", " \n")), "message 1 is an empty answer"),
        (
            {"messages": [{"role": "assistant", "content": "a", "loss": 0}]},
            "no answer to train on: loss is off for each",
        ),
        ({"instruction": "a", "output": ""}, "message 1 is an empty answer"),
        ({"instruction": "a", "output": "b", "history": [["q", ""]]}, "message 1 is an empty answer"),
        ({"text": " "}, "the text is empty"),
    ],
)
def test_records_without_an_answer_are_told_apart(record, reason):
    with pytest.raises(NoAnswer, match=reason):
        read(record)


def test_an_empty_answer_may_stand_where_it_is_not_trained():
    record = {"messages": [{"role": "assistant", "content": "", "loss": False}, {"role": "assistant", "content": "b"}]}
    assert [each["loss"] for each in read(record).messages] == [False, True]


@pytest.mark.parametrize("wanted", FORMATS)
@pytest.mark.parametrize("given", FORMATS)
def test_a_record_of_another_format_is_told_with_what_it_looks_like(wanted, given):
    if wanted != given:
        with pytest.raises(OtherFormat, match=rf"as the format {wanted} wants; looks like {given}"):
            read_conversation(FORMATS[given], wanted)


def test_a_record_of_no_format_is_told_with_its_fields():
    assert detect_format({"a": 1, "b": 2}) is None
    assert unknown_format({"a": 1, "b": 2}).startswith(
        "has the fields 'a', 'b', which are no conversation; expected are m"
    )
    with pytest.raises(OtherFormat, match=r"has no 'output', as the format alpaca wants; its fields: 'instruction'"):
        read_conversation({"instruction": "a"}, "alpaca")


def test_preference_data_is_refused_by_name():
    record = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert detect_format(record) is None
    assert "is preference data (chosen, rejected), which is for preference training" in unknown_format(record)
    with pytest.raises(OtherFormat, match="is preference data"):
        read_conversation(record, "pairs")


def test_real_files_are_read_whole():
    if not SHARED.is_dir():
        pytest.skip("the shared data isn't there")
    counts = {}
    for path in ["alpaca/alpaca_en_demo", "alpaca/alpaca_zh_demo", "toolcall/glaive_toolcall_en_demo"]:
        found = [read(record) for record in json.loads((SHARED / f"{path}.json").read_text("utf-8"))]
        counts[path] = len(found), sum(message["loss"] for talk in found for message in talk.messages)
    assert counts == {
        "alpaca/alpaca_en_demo": (999, 999),
        "alpaca/alpaca_zh_demo": (1000, 1000),
        "toolcall/glaive_toolcall_en_demo": (300, 957),
    }


def test_fields_that_a_column_gives_every_row_arent_arguments(tmp_path: Path) -> None:
    asks = [{"role": "user", "content": "look"}]
    calls = [{"city": "Oslo"}, {"day": 3, "where": {"street": "A"}}, {"where": {"number": 7}}]
    records = [
        {"messages": [*asks, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}]}
        for given in calls
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "calls.parquet")
    (file,) = find_inputs([tmp_path / "calls.parquet"])
    read = [read_conversation(record, "messages") for _, record in read_records(Span(file), pytest.fail)]
    found = [talk.messages[1]["tool_calls"][0]["function"]["arguments"] for talk in read]
    assert found == calls
