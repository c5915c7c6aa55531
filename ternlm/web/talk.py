"""A conversation as the page keeps it: messages with notes, what it was before the last change; and its forms outside.

Messages are as OpenAI's interface has them, with a `reasoning_content` where thoughts were told apart.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ternlm.web.words import Mistake, Words

SENT = ("role", "content", "tool_calls", "tool_call_id")
"""Fields of a message that servers take."""
_MOST_IMPORTED = 500


@dataclass
class Entry:
    """A message, and what the page knows of it: usage, seconds, finish, model."""

    message: dict[str, Any]
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def role(self) -> str:
        """Who says it."""
        return str(self.message["role"])

    @property
    def text(self) -> str:
        """What is said."""
        return str(self.message.get("content") or "")

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tools that are called."""
        return self.message.get("tool_calls") or []


@dataclass
class Talk:
    """A conversation."""

    id: str = field(default_factory=lambda: secrets.token_hex(12))
    title: str = ""
    """Empty: it is called by its first question."""
    system: str = ""
    tools: str = ""
    """JSON, as it was typed."""
    entries: list[Entry] = field(default_factory=list)
    before: list[Entry] = field(default_factory=list)
    """What the entries were before an answer was made anew or a question changed."""
    error: dict[str, Any] = field(default_factory=dict)
    """Why the last answer isn't there or isn't whole: fault, text, words, status."""
    changed: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        """Its title, or how its first question begins; nothing where it has neither."""
        first = next((entry.text for entry in self.entries if entry.role == "user"), "")
        line = " ".join((self.title or first).split())
        return line if len(line) <= 40 else line[:39] + "…"

    def messages(self) -> list[dict[str, Any]]:
        """Return what is sent to a server."""
        first = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return [*first, *({key: each.message[key] for key in SENT if key in each.message} for each in self.entries)]

    def open_calls(self) -> list[dict[str, Any]]:
        """List the calls at the end whose results aren't there yet."""
        given = set()
        for entry in reversed(self.entries):
            if entry.role != "tool":
                return [call for call in entry.calls if call["id"] not in given]
            given.add(entry.message.get("tool_call_id"))
        return []

    def cut(self, length: int) -> None:
        """Keep so many entries; what was there stays at hand in `before`."""
        if length < len(self.entries):
            self.before = list(self.entries)
        self.entries = self.entries[:length]
        self.error = {}

    def swap(self) -> None:
        """Go back to what was there before the last change, and with a second call forth."""
        if self.before:
            self.entries, self.before, self.error = self.before, self.entries, {}

    def last_question(self) -> int:
        """Return how many entries there are up to where the last answer begins; 0: nothing was asked."""
        for place in range(len(self.entries), 0, -1):
            if self.entries[place - 1].role != "assistant":
                return place
        return 0


def read_tools(text: str) -> list[dict[str, Any]]:
    """Return tools from JSON: a list of OpenAI's, or of bare functions; or one. Raises Mistake."""
    if not text.strip():
        return []
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Mistake("tools_not_json", words=error) from error
    tools: list[dict[str, Any]] = []
    for number, tool in enumerate(given if isinstance(given, list) else [given], 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Mistake("tools_no_name", number=number)
        if not isinstance(function.get("parameters", {}), dict):
            raise Mistake("tools_no_schema", name=function["name"])
        if function["name"] in [other["function"]["name"] for other in tools]:
            raise Mistake("tools_twice", name=function["name"])
        tools.append({"type": "function", "function": function})
    return tools


def as_line(talk: Talk) -> str:
    """Return a conversation as the line of JSON that fine-tuning takes."""
    first = [{"role": "system", "content": talk.system}] if talk.system.strip() else []
    record: dict[str, Any] = {"messages": [*first, *(entry.message for entry in talk.entries)]}
    try:
        tools = read_tools(talk.tools)
    except Mistake:
        tools = []
    return json.dumps({**record, "tools": tools} if tools else record, ensure_ascii=False) + "\n"


def as_markdown(talk: Talk, words: Words) -> str:
    """Return a conversation to be read."""
    parts = [f"# {talk.name or words('untitled')}"]
    if talk.system.strip():
        parts.append(f"## {words('system')}\n\n{talk.system.strip()}")
    for entry in talk.entries:
        parts.append(f"## {words(f'role_{entry.role}')}")
        if thoughts := entry.message.get("reasoning_content"):
            parts.append("\n".join(f"> {line}" for line in thoughts.strip().splitlines()))
        if entry.text.strip():
            parts.append(entry.text.strip())
        for call in entry.calls:
            function = call["function"]
            parts.append(f"`{function['name']}`\n\n```json\n{function['arguments']}\n```")
    return "\n\n".join(parts) + "\n"


def from_lines(text: str) -> list[Talk]:
    """Read conversations of one line of JSON each, or of one JSON. Raises Mistake where any isn't one."""
    try:
        records = list(_records(text))
    except (ValueError, RecursionError) as error:
        raise Mistake("import_not_json", words=error) from error
    if not records:
        raise Mistake("import_empty")
    if len(records) > _MOST_IMPORTED:
        raise Mistake("import_too_many", number=len(records), most=_MOST_IMPORTED)
    return [_from_record(number, record) for number, record in enumerate(records, 1)]


def _records(text: str) -> Iterator[Any]:
    text = text.removeprefix("\ufeff").strip()
    try:
        whole = json.loads(text)
    except ValueError:
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
        return
    yield from whole if isinstance(whole, list) else [whole]


def _from_record(number: int, record: Any) -> Talk:
    given = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(given, list) or not given:
        raise Mistake("import_no_messages", number=number)
    messages = [_message(number, place, message) for place, message in enumerate(given)]
    talk = Talk()
    if messages[0]["role"] == "system":
        talk.system = messages.pop(0)["content"]
    talk.entries = [Entry(message) for message in messages]
    if tools := record.get("tools"):
        talk.tools = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False, indent=2)
        read_tools(talk.tools)
    return talk


def _message(number: int, place: int, given: Any) -> dict[str, Any]:
    """Return a message as servers take it, with whatever else it has."""
    wrong = Mistake("import_wrong_message", number=number, place=place)
    if not isinstance(given, dict):
        raise wrong
    role, content = given.get("role"), given.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise wrong
        content = "".join(part["text"] for part in content)
    calls = given.get("tool_calls")
    if content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str) or role not in ("user", "assistant", "tool", *(["system"] if place == 0 else [])):
        raise wrong
    message = {**given, "content": content}
    if calls:
        message["tool_calls"] = _calls(calls, wrong)
    return {name: value for name, value in message.items() if value is not None}


def _calls(given: Any, wrong: Mistake) -> list[dict[str, Any]]:
    calls = []
    for place, call in enumerate(given if isinstance(given, list) else [None]):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong
        arguments = function.get("arguments", "{}")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        told = {"name": function["name"], "arguments": arguments}
        calls.append({"id": str(call.get("id") or f"call_{place}"), "type": "function", "function": told})
    return calls


def as_data(talk: Talk) -> dict[str, Any]:
    """Return all of a conversation, as a file keeps it."""
    return asdict(talk)


def from_data(data: Mapping[str, Any]) -> Talk:
    """Return a conversation that a file kept; raises ValueError, TypeError or KeyError where it isn't one."""
    talk = Talk(**{**data, "entries": _entries(data["entries"]), "before": _entries(data["before"])})
    texts: Sequence[Any] = (talk.id, talk.title, talk.system, talk.tools)
    if not all(isinstance(text, str) for text in texts) or not isinstance(talk.error, dict):
        raise ValueError("not a conversation")
    talk.changed = float(talk.changed)
    return talk


def _entries(given: Sequence[Any]) -> list[Entry]:
    return [Entry(_message(0, place + 1, each["message"]), dict(each["note"])) for place, each in enumerate(given)]
