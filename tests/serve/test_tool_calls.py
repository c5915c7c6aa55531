"""Calls in what a model says come out the same, however the text is cut."""

import json
from itertools import combinations

import pytest
from chats import tokenizer_for

from ternlm.data.protocols import PROTOCOLS
from ternlm.serve.tool_calls import HERMES, INTERNLM2, LLAMA3, CallPiece, ToolCallParser, format_of

ARGUMENTS = '{"city": "Pa\\"}{ris", "days": [1, {"a": 2}], "燕": "<\\u00e9>"}'
A, B = '<tool_call>\n{"name": "f", "arguments": ' + ARGUMENTS + "}\n</tool_call>", '{"name": "g", "arguments": {}}'
SAID = {
    "hermes: a call": (HERMES, A, "", [("f", ARGUMENTS)]),
    "hermes: words before it": (HERMES, "Let me see.\n" + A, "Let me see.\n", [("f", ARGUMENTS)]),
    "hermes: two calls": (HERMES, f"{A}\n<tool_call>{B}</tool_call>\n", "", [("f", ARGUMENTS), ("g", "{}")]),
    "hermes: words behind it": (HERMES, A + " Done.", " Done.", [("f", ARGUMENTS)]),
    "hermes: another order": (
        HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')],
    ),
    "hermes: arguments as text": (
        HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')],
    ),
    "hermes: no arguments": (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    "hermes: an end in a text": (
        HERMES, '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', "",
        [("f", '{"a": "</tool_call>"}')],
    ),
    "hermes: no JSON": (HERMES, "a <tool_call>oh no</tool_call> b", "a <tool_call>oh no</tool_call> b", []),
    "hermes: no call at all": (HERMES, "a < b <tool and {", "a < b <tool and {", []),
    "hermes: never ended": (HERMES, '<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
    "hermes: cut in its arguments": (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    "internlm2: a call": (
        INTERNLM2, 'Yes.<|action_start|><|plugin|>\n{"name": "f", "parameters": ' + ARGUMENTS + "}<|action_end|>\n",
        "Yes.", [("f", ARGUMENTS)],
    ),
    "internlm2: the interpreter": (
        INTERNLM2, "<|action_start|><|interpreter|>\nprint(1)<|action_end|>",
        "<|action_start|><|interpreter|>\nprint(1)<|action_end|>", [],
    ),
    "llama3: a call": (LLAMA3, '{"name": "f", "parameters": ' + ARGUMENTS + "}", "", [("f", ARGUMENTS)]),
    "llama3: marked": (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "llama3: several": (
        LLAMA3, '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    "llama3: words": (LLAMA3, "I can't call {}.", "I can't call {}.", []),
    "llama3: another object": (LLAMA3, '{"answer": 3}', '{"answer": 3}', []),
    "llama3: another order": (LLAMA3, '{"parameters": {"a": 1}, "name": "f"}', "", [("f", '{"a": 1}')]),
}  # fmt: skip


def parse(form, pieces):
    parser = ToolCallParser(form)
    told = [each for piece in pieces for each in parser.add(piece)] + parser.finish()
    calls: dict[int, list[str]] = {}
    ids: dict[int, set[str]] = {}
    for each in told:
        if isinstance(each, CallPiece):
            if each.name is not None:
                calls[each.index] = [each.name, ""]
            calls[each.index][1] += each.arguments
            ids.setdefault(each.index, set()).add(each.id)
    assert list(calls) == list(range(len(calls))) == list(range(parser.num_calls))
    assert all(len(own) == 1 for own in ids.values())
    return "".join(each for each in told if isinstance(each, str)), [tuple(call) for call in calls.values()]


@pytest.mark.parametrize("case", SAID.values(), ids=SAID)
def test_calls_are_found_however_the_text_is_cut(case):
    form, text, content, calls = case
    expected = content, calls
    assert parse(form, [text]) == expected
    assert parse(form, text) == expected
    for first, second in combinations(range(len(text) + 1), 2):
        assert parse(form, [text[:first], text[first:second], text[second:]]) == expected


def test_arguments_are_told_as_they_come():
    parser = ToolCallParser(HERMES)
    told = [piece for character in A for piece in parser.add(character)]
    assert [piece.name for piece in told][:2] == ["f", None]
    assert "".join(piece.arguments for piece in told) == ARGUMENTS
    assert len(told) > 20


@pytest.mark.parametrize(("name", "form"), [("internlm2", INTERNLM2), ("chatml", HERMES), ("llama3", LLAMA3)])
def test_a_protocols_own_calls_are_read_back(name, form):
    from ternlm.data.chat import render

    template = PROTOCOLS[name].template
    assert format_of(template) is form
    assert format_of(PROTOCOLS["internlm"].template) is None
    call = {"function": {"name": "weather", "arguments": {"city": "燕", "days": 2}}}
    conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "weather"}}
    text = render(template, conversation, False, tools=[tool])
    start = {"internlm2": "assistant\n", "chatml": "assistant\n", "llama3": "assistant<|end_header_id|>\n\n"}[name]
    said = text.rpartition(start)[2].split("<|im_end|>")[0].split("<|eot_id|>")[0]
    content, ((called, arguments),) = parse(form, said)
    assert (content.strip(), called, json.loads(arguments)) == ("", "weather", {"city": "燕", "days": 2})


def test_special_tokens_that_mark_calls_are_known():
    tokenizer = tokenizer_for("internlm2")
    names = ("<|action_start|>", "<|plugin|>", "<|action_end|>")
    assert set(INTERNLM2.marks(tokenizer)) == {tokenizer.id_of(name) for name in names}
    assert HERMES.marks(tokenizer_for("chatml")) == ()
