"""Records of any format to conversations: what each format looks like, and what is wrong with a record that isn't so.

Between `records` and `turns`. A conversation's messages are as OpenAI's interface has them, with a key of ours, `loss`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ternlm.config.sft import FormatName
from ternlm.data.errors import DataError
from ternlm.data.records import type_name

ROLES = ("system", "user", "assistant", "tool")
_FROM = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
EXPECTED = (
    "messages; conversations (sharegpt); instruction and output (alpaca); "
    + ", ".join(" and ".join(pair) for pair in _PAIRS)
    + " (pairs); text"
)
_PREFERENCE = "is preference data (chosen, rejected), which is for preference training, not for fine-tuning"
_LABELLED = "is preference data (a label, true or false), which is for preference training, not for fine-tuning"


class NoAnswer(DataError):
    """A conversation in which nothing is to be trained."""


class OtherFormat(DataError):
    """A record that isn't of the format that it should have."""


@dataclass(frozen=True)
class Conversation:
    """What a record holds: messages, or a text without any."""

    messages: list[dict[str, Any]]
    """role, content (a text, "" beside tool_calls), loss (only of an assistant's); and where there are some
    tool_calls, tool_call_id, name, reasoning_content."""
    tools: list[dict[str, Any]] | None = None
    """As OpenAI's interface has them: `{"type": "function", "function": {"name", ...}}`."""
    text: str | None = None
    """A document, trained whole; there are no messages then."""


def detect_format(record: Mapping[str, Any]) -> FormatName | None:
    """Tell the format of a record by its fields; None if it has those of none."""
    fields = {name for name, value in record.items() if value is not None}
    if _is_preference(record):
        return None
    if "messages" in fields:
        return "messages"
    if "conversations" in fields:
        return "sharegpt"
    if {"instruction", "output"} <= fields:
        return "alpaca"
    if _pair_of(fields):
        return "pairs"
    return "text" if "text" in fields else None


def _is_preference(record: Mapping[str, Any]) -> bool:
    return record.get("rejected") is not None or isinstance(record.get("label"), bool)


def unknown_format(record: Mapping[str, Any]) -> str:
    """Say why a record has none of the formats."""
    if _is_preference(record):
        return _PREFERENCE if "rejected" in record else _LABELLED
    return f"has the fields {_names(record)}, which are no conversation; expected are {EXPECTED}"


def read_conversation(record: Mapping[str, Any], format: FormatName) -> Conversation:
    """Take the conversation out of a record; raises DataError with the reason where there is none to train on."""
    record = {name: value for name, value in record.items() if value is not None}
    if _is_preference(record):
        raise OtherFormat(unknown_format(record))
    _check_format(record, format)
    if format == "text":
        if not _text(record["text"], "text").strip():
            raise NoAnswer("the text is empty, so there is nothing to train on")
        return Conversation([], text=record["text"])
    messages = _READERS[format](record)
    system = _text(record.get("system", ""), "system")
    if system:
        if any(message["role"] == "system" for message in messages):
            raise DataError("has a field system, and a system message too; leave one out")
        messages.insert(0, {"role": "system", "content": system, "loss": False})
    for number, message in enumerate(messages):
        if message["role"] == "system" and number:
            raise DataError(f"message {number} is a system message, which can only be the first")
    if not any(message["role"] == "assistant" for message in messages):
        raise NoAnswer("has no assistant message to train on")
    if not any(message["loss"] for message in messages):
        raise NoAnswer("has no answer to train on: loss is off for each assistant message")
    return Conversation(messages, _tools(record.get("tools")))


def _check_format(record: Mapping[str, Any], format: FormatName) -> None:
    needed = {"messages": ["messages"], "sharegpt": ["conversations"], "alpaca": ["instruction", "output"]}
    if format == "pairs":
        fits = _pair_of(set(record)) is not None
        lack = "no pair of fields such as prompt and completion"
    else:
        missing = [name for name in needed.get(format, [format]) if name not in record]
        fits, lack = not missing, f"no {' and no '.join(map(repr, missing))}"
    if fits:
        return
    other = detect_format(record)
    looks = f"looks like {other}" if other else f"its fields: {_names(record)}"
    raise OtherFormat(f"has {lack}, as the format {format} wants; {looks}")


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(record)[:8])) or "none"


def _from_messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_message(number, raw) for number, raw in enumerate(_list(record["messages"], "messages"))]


def _from_sharegpt(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = []
    for number, raw in enumerate(_list(record["conversations"], "conversations")):
        where = f"message {number}"
        item = _object(raw, where)
        if "from" not in item or "value" not in item:
            advice = "; they look like the format messages: call the field so" if "role" in item else ""
            raise DataError(f"{where} must have the fields from and value, not {_names(item)}{advice}")
        if not isinstance(item["from"], str) or item["from"] not in _FROM:
            raise DataError(f"{where} is from {item['from']!r}, an unknown role (known: {', '.join(_FROM)})")
        given = {name: value for name, value in item.items() if name in ("loss", "weight")}
        message = {"role": _FROM[item["from"]], "content": item["value"], **given}
        if item["from"] == "function_call":
            called = _parsed(_text(item["value"], f"{where}'s value"), f"{where}'s function call")
            message |= {"content": "", "tool_calls": called if isinstance(called, list) else [called]}
        messages.append(_message(number, message))
    return messages


def _from_alpaca(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = []
    for number, pair in enumerate(_list(record.get("history", []), "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"turn {number} of history must be a list of question and answer")
        turns.append((pair[0], pair[1]))
    question, more = _text(record["instruction"], "instruction"), _text(record.get("input", ""), "input")
    turns.append((f"{question}\n{more}" if more else question, _text(record["output"], "output")))
    return [message for number, turn in enumerate(turns) for message in _pair(*turn, first=2 * number)]


def _from_pairs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = _pair_of(set(record))
    assert names is not None
    question, answer = (record[name] for name in names)
    if not isinstance(question, list) and not isinstance(answer, list):
        return _pair(_text(question, names[0]), _text(answer, names[1]))
    asked = question if isinstance(question, list) else [{"role": "user", "content": question}]
    said = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    # What a prompt has of answers is not what is to be learnt.
    past = [{**_message(number, raw), "loss": False} for number, raw in enumerate(asked)]
    return past + [_message(number, raw) for number, raw in enumerate(said, len(past))]


_READERS = {"messages": _from_messages, "sharegpt": _from_sharegpt, "alpaca": _from_alpaca, "pairs": _from_pairs}


def _pair(question: Any, answer: Any, first: int = 0) -> list[dict[str, Any]]:
    return [
        _message(first, {"role": "user", "content": question}),
        _message(first + 1, {"role": "assistant", "content": answer}),
    ]


def _pair_of(fields: set[str]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if fields.issuperset(pair)), None)


def _message(number: int, raw: Any) -> dict[str, Any]:
    """Return a message as a conversation has it."""
    where = f"message {number}"
    given = _object(raw, where)
    role = given.get("role")
    if role not in ROLES:
        raise DataError(f"{where} has the unknown role {role!r} (known: {', '.join(ROLES)})")
    message: dict[str, Any] = {"role": role}
    if calls := given.get("tool_calls"):
        if role != "assistant":
            raise DataError(f"{where} is of the role {role} and calls tools, which only an assistant does")
        message["tool_calls"] = [_call(call, where) for call in _list(calls, f"{where}'s tool_calls")]
    message["content"] = _content(given.get("content", "" if calls else None), f"{where}'s content")
    for name in ("tool_call_id", "name", "reasoning_content"):
        if name in given:
            message[name] = _text(given[name], f"{where}'s {name}")
    message["loss"] = _loss(given, role, where)
    if message["loss"] and not calls and not message["content"].strip():
        raise NoAnswer(f"{where} is an empty answer")
    return message


def _content(value: Any, where: str) -> str:
    """Return a text, joined where it comes in parts."""
    if not isinstance(value, list):
        return _text(value, where)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise DataError(f"{where} has a part of type {kind!r}; only text can be trained on")
        texts.append(_text(part.get("text"), where))
    return "".join(texts)


def _loss(given: Mapping[str, Any], role: str, where: str) -> bool:
    said = {name: given[name] for name in ("loss", "weight") if name in given}
    for name, value in said.items():
        if isinstance(value, bool | int | float) and value in (0, 1):
            continue
        raise DataError(f"{where} has {name} = {value!r}, which must be true or false, 1 or 0")
    wanted = all(said.values()) if said else role == "assistant"
    if said and wanted and role != "assistant":
        raise DataError(f"{where} is of the role {role} and has a loss, which only an assistant message can have")
    return wanted


def _call(raw: Any, where: str) -> dict[str, Any]:
    """Return one call of a tool, with its arguments as an object."""
    call = _object(raw, f"{where}'s tool call")
    function = _object(call.get("function", call), f"{where}'s tool call")
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} calls a tool without a name")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}'s arguments of {name}") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"{where}'s arguments of {name} must be an object, not {type_name(arguments)}")
    given = {"id": _text(call["id"], f"{where}'s tool call's id")} if "id" in call else {}
    return {**given, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        value = _parsed(value, "tools") if value.strip() else []
    tools = []
    for number, raw in enumerate(_list([] if value is None else value, "tools")):
        tool = _object(raw, f"tool {number}")
        function = _object(tool.get("function", tool), f"tool {number}")
        if not isinstance(function.get("name"), str):
            raise DataError(f"tool {number} has no name")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools or None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object, not {type_name(value)}")
    return {name: each for name, each in value.items() if each is not None}


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list, not {type_name(value)}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, not {type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half of a surrogate pair, which isn't text") from error
    return value
